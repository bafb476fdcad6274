"""What a stage measured of one microbatch's own compute."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One microbatch computed on one stage: no waiting, no receiving or sending in it.

    Times are seconds of that machine's CLOCK_MONOTONIC.
    """

    stage: int
    index: int
    """Of the microbatch."""
    num_tokens: int
    start_s: float
    end_s: float
    cpu_s: float
    """Thread CPU time between start and end; less than `end_s - start_s` when the stage's core was
    taken by others."""
