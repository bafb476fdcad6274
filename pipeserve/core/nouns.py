"""The nouns that every part of pipeserve meets at. Frozen, pure, no torch.

A `Request` is what the user asked. The engine cuts it into `Chunk`s, packs chunks into
`Microbatch`es, each of which crosses every stage once, in index order; what it samples is a
`StepResult`. `PipelinePlan` says which stage holds which layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NewType

from pipeserve.sampling_params import SamplingParams

RequestId = NewType("RequestId", int)
BlockId = NewType("BlockId", int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked. Progress (positions, blocks, outputs) is the engine's private record."""

    id: RequestId
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the request: `params.stop_token_ids`, and eos unless `params.ignore_eos`."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words` as token ids: of each sequence the last is not sampled after the others.
    """
    cache_salt: str = ""
    """Prefix blocks are shared only between requests with the same salt."""
    priority: int = 0
    """Under `--order priority` lower goes first, as in vLLM; under another order it means nothing.
    """
    num_imported: int = 0
    """Leading positions whose KV another pipeline computed (disaggregated prefill), at most all but
    the last. Whoever adds the request brings it into the blocks of its first admission; after a
    preemption it is computed here like any other."""
    sample_of: RequestId | None = None
    """An earlier request with the same prompt: this one waits until that one's prompt is planned,
    and then shares its blocks."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of the output; whoever adds a request has put a number for None."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens


class Chunk(NamedTuple):
    """The positions `[start, stop)` of one request that run in one microbatch.

    A decode is a chunk of length 1; there is no other kind.
    """

    request_id: RequestId
    start: int
    """First position computed: as many positions are in the KV cache before this chunk."""
    stop: int
    new_blocks: tuple[BlockId, ...]
    """Appended to the request's block table, in order, before this chunk runs."""
    token_from: int | None = None
    """Index of the microbatch that samples the token at `start`, while it is still on its way."""
    num_logits: int = 0
    """Trailing positions whose logits are wanted: 0 for a middle chunk, 1 to sample, more for
    prompt logprobs."""
    num_scored: int = 0
    """The first so many of these score the prompt token that comes next; one left over samples."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """Whether it is to sample; how many tokens that gave, the result says."""
        return self.num_logits > self.num_scored


def one_each(chunks: Iterable[Any]) -> bytes:
    """`StepResult.counts` of a last stage that samples one token for each chunk that is to: all of
    them do, while nothing decodes speculatively. Of `Chunk`s, or of their form on the wire."""
    return bytes([chunk.num_logits > chunk.num_scored for chunk in chunks])


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that starts, or starts again after preemption, with the microbatch that carries it.

    Carries prompt **and** outputs so far, so that a stage needs nothing that came earlier.
    """

    request_id: RequestId
    token_ids: Sequence[int]
    """Prompt and outputs so far: of the engine, an array of int32, as the stages are sent it."""
    num_prompt_tokens: int
    blocks: tuple[BlockId, ...]
    """Blocks already filled: the cached prefix that this request shares."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One unit of work that crosses every stage once. Made by the engine, never edited."""

    index: int
    """Strictly increasing; also the order of execution on every stage and link."""
    chunks: tuple[Chunk, ...]
    admitted: tuple[Admission, ...] = ()
    """Requests whose first chunk since admission is in this microbatch."""
    released: tuple[RequestId, ...] = ()
    """Requests (finished or preempted) that no later microbatch names, unless it admits them."""
    head_at_first: bool = False
    """Behind the last layer its hidden rows go back to the first stage, which has the head, too,
    and samples in place of the last one (`head_share.py`)."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    @property
    def samples(self) -> bool:
        """False when no chunk samples: such a microbatch sends no token feedback."""
        return any(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, raw logits, before temperature) at one position."""

    sampled: float
    """Of the token that stands there: sampled, or the prompt's."""
    top: Mapping[int, float] = field(default_factory=dict)
    """The most likely token ids at this position, most likely first."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What was sampled for one microbatch."""

    index: int
    tokens: tuple[int, ...]
    """Chunk after chunk in the microbatch's order."""
    counts: bytes
    """How many of them each chunk sampled; 0 where it was not to."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Parallel to `tokens`, or empty when no request of the microbatch asked for any."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each scored position, chunk after chunk in the microbatch's order."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Why, for each chunk (by its place in the microbatch) that has no result; what stands for it
    above means nothing."""


class Begun(NamedTuple):
    """How a request came to its first token."""

    num_cached: int
    """Tokens of the prompt that the prefix cache had."""
    queued_s: float
    """From its arrival until it was admitted for the first time."""
    prefill_s: float
    """From then until the token was known."""


class Output(NamedTuple):
    """One token that became known, or the end of a request, or both."""

    request_id: RequestId
    token: int | None
    finish_reason: str | None = None
    """None while it goes on; "stop", "length", "error", or what `finish` was called with."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first token of a request that asked for them: of each prompt token but the first."""
    error: str | None = None
    """What went wrong and what helps, where `finish_reason` is "error"."""
    begun: Begun | None = None
    """With the first token."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Why `Engine.plan` made no microbatch."""

    reason: str
    """"no_requests" | "window" | "kv" | "token"."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The layers `[first_layer, stop_layer)` of one stage, and what else it holds."""

    stage: int
    first_layer: int
    stop_layer: int
    has_embedding: bool
    has_head: bool
    ranks: tuple[int, ...]
    """One rank for each tensor-parallel shard."""

    @property
    def num_layers(self) -> int:
        return self.stop_layer - self.first_layer


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """All stages of one pipeline, and how many microbatches may be outstanding."""

    stages: tuple[StagePlan, ...]
    window: int
    """Microbatches that may be outstanding, the one planned ahead not counted."""
    window_follows: bool = False
    """There may be more where the ways between stages are slow (`window.py`)."""

    @property
    def shares_head(self) -> bool:
        """Both ends have the head, and each samples for some microbatches."""
        return len(self.stages) > 1 and self.stages[0].has_head


@dataclass(frozen=True, slots=True)
class StageCost:
    """Predicted seconds of one microbatch on each stage, in stage order."""

    seconds: tuple[float, ...]
