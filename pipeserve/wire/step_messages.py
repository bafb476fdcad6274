"""Microbatches and their results between the core's form and the messages' (control.py)."""

import array
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import attrgetter, ne
from typing import Any

from pipeserve.core.nouns import Microbatch, Request, RequestId, StepResult, TokenLogprobs
from pipeserve.sampling_params import DRAW_OPTIONS, DrawParams
from pipeserve.wire.control import Registration, Sampled, Step, StepChunk


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
    return Step(microbatch.index, microbatch.released, admitted, chunks)


def step_result(sampled: Sampled) -> StepResult:
    """The core's form of what the last stage sent."""
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
