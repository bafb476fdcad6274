"""A microbatch and its result on the wire, and what is made of the core's form for it.

A request is registered once, with prompt and outputs so far; after that a step names only its new
positions and new blocks.
"""

import array
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import attrgetter, ne
from typing import Any

import msgspec

from pipeserve.core.nouns import Microbatch, Request, RequestId, StepResult, TokenLogprobs
from pipeserve.core.records import Headed, Span
from pipeserve.sampling_params import DRAW_OPTIONS, DrawParams
from pipeserve.wire.message import Message

# ---- the messages -------------------------------------------------------------------------------


class Registration(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request that starts, or starts again: everything a stage needs to know of it."""

    request_id: int
    token_ids: bytes
    """Prompt and outputs so far: int32, native order."""
    num_prompt_tokens: int
    blocks: list[int]
    params: dict[int, Any]
    """`pack_params` of its options."""
    stop_ids: list[int]
    bad_word_ids: tuple[tuple[int, ...], ...]


class StepChunk(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`Chunk`, on the wire."""

    request_id: int
    start: int
    stop: int
    new_blocks: tuple[int, ...]
    token_from: int | None
    num_logits: int
    num_scored: int

    @property
    def samples(self) -> bool:
        return self.num_logits > self.num_scored


class Step(Message):
    """One microbatch: the same bytes go to every stage."""

    index: int
    released: tuple[int, ...]
    admitted: list[Registration]
    chunks: list[StepChunk]
    head_at_first: bool = False


class Sampled(Message):
    """The answer to a step, of the stage that has applied the head."""

    index: int
    tokens: list[int]
    counts: bytes
    """How many of them each chunk of the step sampled."""
    logprobs: list[tuple[float, list[tuple[int, float]]] | None]
    """Parallel to `tokens`, or empty: (of the sampled token, the most likely ones)."""
    prompt_logprobs: list[tuple[float, list[tuple[int, float]]]]
    """Likewise of each scored prompt token, chunk after chunk."""
    failed: dict[int, str] = msgspec.field(default_factory=dict)
    """Why, for each chunk (by its place in the step) that has no result; its entries above mean
    nothing."""


class Timing(Message):
    """When a stage computed a microbatch; told behind its output."""

    span: Span


class HeadTiming(Message):
    """Likewise, of a head at the first stage."""

    headed: Headed


# ---- to and from the core -----------------------------------------------------------------------


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    return array.array("i", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> array.array:
    return array.array("i", packed)


_draw_values = attrgetter(*(option.name for option in DRAW_OPTIONS))
_DRAW_DEFAULTS = tuple(option.default for option in DRAW_OPTIONS)


def pack_params(params: DrawParams) -> dict[int, Any]:
    """What is not at its default, by its place among `DRAW_OPTIONS`; both ends have one version."""
    values = _draw_values(params)
    return dict(compress(enumerate(values), map(ne, values, _DRAW_DEFAULTS)))


def unpack_params(packed: Mapping[int, Any]) -> DrawParams:
    """Token ids become an array."""
    values = {
        DRAW_OPTIONS[place].name: array.array("i", value) if isinstance(value, list) else value
        for place, value in packed.items()
    }
    return DrawParams(**values)


def step_message(microbatch: Microbatch, requests: Mapping[RequestId, Request]) -> Step:
    """The wire form of `microbatch`; `requests` holds those that it admits."""
    admitted = []
    for admission in microbatch.admitted:
        request = requests[admission.request_id]
        assert request.params.seed is not None, "the client gives every request a seed"
        admitted.append(
            Registration(
                request_id=request.id,
                token_ids=pack_tokens(admission.token_ids),
                num_prompt_tokens=admission.num_prompt_tokens,
                blocks=list(admission.blocks),
                params=pack_params(request.params),
                stop_ids=sorted(request.stop_ids),
                bad_word_ids=request.bad_word_ids,
            )
        )
    chunks = [StepChunk(*chunk) for chunk in microbatch.chunks]
    return Step(microbatch.index, microbatch.released, admitted, chunks, microbatch.head_at_first)


def step_result(sampled: Sampled) -> StepResult:
    """The core's form of what the stage with the head sent."""
    return StepResult(
        sampled.index,
        tuple(sampled.tokens),
        sampled.counts,
        tuple(None if entry is None else _token_logprobs(entry) for entry in sampled.logprobs),
        tuple(_token_logprobs(entry) for entry in sampled.prompt_logprobs),
        sampled.failed,
    )


def _token_logprobs(entry: tuple[float, list[tuple[int, float]]]) -> TokenLogprobs:
    return TokenLogprobs(entry[0], dict(entry[1]))
