"""The nouns that every part of pipeserve meets at. Frozen, pure, no torch.

A `Request` is what the user asked. The engine cuts it into `Chunk`s, packs chunks into
`Microbatch`es, each of which crosses every stage once, in index order; the last stage answers each
with a `StepResult`. `PipelinePlan` says which stage holds which layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NewType

RequestId = NewType("RequestId", int)
BlockId = NewType("BlockId", int)


def _refused(why: str) -> Any:
    """A field that vLLM has and that must be left out here: `why`, and what to do instead."""
    return field(default=None, repr=False, metadata={"refused": why})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and made text. Names, defaults and meanings are
    vLLM's, and so is the order in which they act (`stages/sampling.py`).

    None is as if the field were left out, but for `max_tokens`. What vLLM has and this has not is
    at the end, and refused by name.
    """

    n: int = 1
    """Samples of the prompt, each a request of its own with the seed `seed + its index`."""
    max_tokens: int | None = 16
    """None: as many as the context has room for. The engine's requests have a number."""
    min_tokens: int = 0
    """Stop ids are not sampled before this many output tokens, and a stop string that is complete
    with them ends nothing."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this share."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that prompt or output have, and multiplies the others.
    """
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Likewise, for each time that it has them."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated: the last token of one is not sampled after its others."""
    allowed_token_ids: tuple[int, ...] | None = None
    """No other token is sampled."""
    seed: int | None = None
    """None: the driver draws one when the request is added."""
    stop: tuple[str, ...] = ()
    """Texts that end the output: the one that is complete first; of several that are complete at
    the same character the one that begins first (vLLM goes by the order of the list)."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    """Whether the text has the stop string, or the text of the stop token, that ended it."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens to report at each position (0: the sampled one alone; -1:
    the whole vocabulary)."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first. Such a request shares no prefix."""
    detokenize: bool = True
    """False: no text is made, and `text` is ''."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    spaces_between_special_tokens: bool = True
    """False: where they are in the text, one added token stands right behind another, whatever the
    tokenizer would put between."""
    skip_reading_prefix_cache: bool = False
    """Whether the prompt is computed although the cache has blocks of it."""

    best_of: None = _refused("vLLM itself has it no more; give n")
    use_beam_search: None = _refused("there is no beam search; leave it out")
    length_penalty: None = _refused("there is no beam search; leave it out")
    early_stopping: None = _refused("there is no beam search; leave it out")
    structured_outputs: None = _refused("it is not there yet; leave it out")
    guided_decoding: None = _refused("it is not there yet; leave it out")
    logits_processors: None = _refused(
        "stages run no code of a request; give logit_bias, bad_words or allowed_token_ids"
    )
    extra_args: None = _refused("there are no plugins to read it; leave it out")
    thinking_token_budget: None = _refused("it is not there; give max_tokens")
    repetition_detection: None = _refused("it is not there; give repetition_penalty or max_tokens")
    trace_decode_token_ids: None = _refused("tokens are not forced; leave it out")
    routed_experts_prompt_start: None = _refused("routing is not reported; leave it out")
    logprob_token_ids: None = _refused("it is not there; give logprobs")
    prompt_logprob_token_ids: None = _refused("it is not there; give prompt_logprobs")
    prompt_logprob_start: None = _refused("it is not there; prompt_logprobs are of all tokens")
    flat_logprobs: None = _refused("logprobs have one form; leave it out")
    output_kind: None = _refused("stream gives what is new and generate the whole; leave it out")
    stream_interval: None = _refused("stream gives each token as it comes; leave it out")
    skip_clone: None = _refused("these are frozen and need no clone; leave it out")
    truncate_prompt_tokens: None = _refused("give a shorter prompt")


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

    @property
    def num_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    @property
    def samples(self) -> bool:
        """False when no chunk samples: such a microbatch sends no token feedback."""
        return any(chunk.num_logits > chunk.num_scored for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, raw logits, before temperature) at one position."""

    sampled: float
    """Of the token that stands there: sampled, or the prompt's."""
    top: Mapping[int, float] = field(default_factory=dict)
    """The most likely token ids at this position, most likely first."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage sampled for one microbatch."""

    index: int
    tokens: tuple[int, ...]
    """One token for each chunk that samples, in the microbatch's order."""
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Parallel to `tokens`, or empty when no request of the microbatch asked for any."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each scored position, chunk after chunk in the microbatch's order."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Why, for each chunk (by its place in the microbatch) that has no result; what stands for it
    above means nothing."""


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


@dataclass(frozen=True, slots=True)
class StageCost:
    """Predicted seconds of one microbatch on each stage, in stage order."""

    seconds: tuple[float, ...]

    @property
    def bottleneck(self) -> float:
        return max(self.seconds)
