"""What a microbatch is, as far as its time goes: a few counts; and what it took, part by part."""

from functools import partial
from typing import NamedTuple

from pipeserve.core.nouns import Microbatch


class Work(NamedTuple):
    """All of a microbatch that its time depends on."""

    num_tokens: int
    num_logits: int
    prefills: tuple[tuple[int, int], ...]
    """(positions before it, positions) of each chunk longer than one position."""
    num_decodes: int
    """Chunks of one position."""
    context: int
    """Positions of KV that the decodes read, their own included."""


new_work = partial(tuple.__new__, Work)
"""What its own constructor does, without a Python call: many are made for each microbatch."""


class PartSeconds(NamedTuple):
    """What each part of a model takes for one microbatch on one rank."""

    layers: tuple[float, ...]
    """Of each of the model, whichever stage has it."""
    embedding: float
    head: float
    """With sampling. Both are 0 on a rank that does not have it."""
    host: float = 0.0
    """What a microbatch costs a stage besides."""
    all_reduce: float = 0.0
    """Of the seconds of a layer, those in which the ranks of its stage add up what they have."""


def work_of(microbatch: Microbatch) -> Work:
    """O(chunks), and little Python for a decode: 125 of them cost about 20 us."""
    chunks = microbatch.chunks
    starts = [chunk.start for chunk in chunks]
    stops = [chunk.stop for chunk in chunks]
    num_logits = sum([chunk.num_logits for chunk in chunks])
    num_tokens = sum(stops) - sum(starts)
    if num_tokens == len(chunks):
        return Work(num_tokens, num_logits, (), num_tokens, sum(stops))
    spans = zip(starts, stops, strict=True)
    prefills = tuple([(start, stop - start) for start, stop in spans if stop - start > 1])
    context = sum(stops) - sum([start + tokens for start, tokens in prefills])
    return Work(num_tokens, num_logits, prefills, len(chunks) - len(prefills), context)
