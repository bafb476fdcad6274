"""The bubble ledger: every idle interval of every stage, put down to causes that sum to the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeserve.core.nouns import RequestId
from pipeserve.profiling.recording import Recording


class Idle(NamedTuple):
    """A stage without work, from one microbatch's end to the next one's start."""

    stage: int
    index: int
    """Of the microbatch that ended it; -1 for what follows the stage's last one."""
    start_s: float
    end_s: float
    seconds: tuple[float, ...]
    """By cause, in the order of `CAUSES`; none is negative, and they sum to the interval."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A recording, explained. Times in seconds of the driver's clock."""

    start_s: float
    """First arrival."""
    stop_s: float
    """Last token, or the fault that ended the run."""
    idle: tuple[list[Idle], ...]
    """Of each stage, by time. Intervals of no length are left out."""
    busy_s: tuple[float, ...]
    """Of each stage; with its idle intervals exactly `stop_s - start_s`."""

    def idle_s(self, stage: int) -> dict[str, float]:
        """Seconds of a stage by cause; every cause is there."""
        raise NotImplementedError

    def idle_shares(self, stage: int) -> dict[str, float]:
        """Shares of wall time by cause, of those that are over 0: `idle_by_cause` in `--json`."""
        raise NotImplementedError

    def over_time(self, num_bins: int) -> np.ndarray:
        """Seconds, shape (stages, bins of equal length, causes)."""
        raise NotImplementedError

    def by_microbatch(self) -> dict[int, tuple[float, ...]]:
        """Index -> seconds by cause that stages stood idle before it, all stages together."""
        raise NotImplementedError

    def by_request(self, recording: Recording) -> dict[RequestId, tuple[float, ...]]:
        """Request -> seconds by cause that stages stood idle before its microbatches: SARATHI's
        bubble time of a request (arXiv:2308.16369, section 3.3), by cause."""
        raise NotImplementedError


def explain(recording: Recording) -> Ledger:
    """The ledger of a recording that has at least one completed microbatch."""
    raise NotImplementedError
