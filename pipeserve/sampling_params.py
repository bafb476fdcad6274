"""Every sampling option, declared once: name, type, default, help and limits.

All else follows from here: the command line's flags (`launch/inputs/flags.py`), the checks where a
request comes in (`frontend/params.py`), and what the last stage is told of a request
(`wire/step_messages.py`). What an option does to a token is written in `stages/sampling.py`, which
reads it by its name. So a new one takes a line in `DrawParams` and a line there.

Plain data that imports nothing of pipeserve: from the command line to the sampler everyone may
read it.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

_MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1  # what a 64-bit field of a message carries
_MAX_SAMPLES = 16384  # as vLLM's VLLM_MAX_N_SEQUENCES
_MAX_LOGPROBS = 256  # of each position, all of which the driver holds until the request ends
_MAX_BIAS = 100  # as OpenAI's; what is to be banned, or alone allowed, has fields of its own


class Bounds(NamedTuple):
    """The numbers that an option may be: `least` to `most`."""

    least: float
    most: float = math.inf
    words: str = ""
    """How a user is told; by default "LEAST to MOST"."""
    is_over: bool = False
    """Only what is over `least`."""
    or_all: bool = False
    """Or -1, which is as many as the vocabulary has."""

    def allow(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.is_over and value == self.least)

    def __str__(self) -> str:
        return (self.words or f"{self.least} to {self.most}") + "; or -1, all" * self.or_all


def _option(default: Any, help: str, limits: Bounds | None = None) -> Any:
    """`help` is the flag's. A number has limits; of a mapping they are its values'."""
    return field(default=default, metadata={"help": help, "limits": limits})


def _refused(why: str) -> Any:
    """A field that vLLM has and that must be left out here: `why`, and what to do instead."""
    return field(default=None, repr=False, metadata={"refused": why})


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawParams:
    """How a token is drawn from its logits: what the sampler reads (`stages/sampling.py`).

    The last stage is told those that are not at their default. There token ids are an array.
    """

    temperature: float = _option(1.0, "0 is greedy.", Bounds(0, words="0 (greedy) or more"))
    top_k: int = _option(
        0, "Sample from the k most likely tokens; 0 from all.", Bounds(0, _MAX_COUNT)
    )
    top_p: float = _option(
        1.0,
        "Sample from the most likely tokens that together have this probability.",
        Bounds(0, 1, "over 0 and at most 1 (keep all)", is_over=True),
    )
    min_p: float = _option(
        0.0,
        "Sample from tokens at least this share as probable as the likeliest.",
        Bounds(0, 1, "0 (keep all) to 1"),
    )
    repetition_penalty: float = _option(
        1.0,
        "Over 1, tokens of prompt and output become less likely.",
        Bounds(0, words="over 0; 1 is none", is_over=True),
    )
    """Divides the logits above 0 of those tokens, and multiplies the others."""
    presence_penalty: float = _option(
        0.0,
        "Taken off the logits of tokens that the output has: -2 to 2.",
        Bounds(-2, 2, "-2 to 2; 0 is none"),
    )
    frequency_penalty: float = _option(
        0.0,
        "Likewise, for each time that it has them: -2 to 2.",
        Bounds(-2, 2, "-2 to 2; 0 is none"),
    )
    logit_bias: Mapping[int, float] | None = _option(
        None,
        "ID=NUMBER: added to the logit of a token id; may be given several times.",
        Bounds(-_MAX_BIAS, _MAX_BIAS),
    )
    allowed_token_ids: tuple[int, ...] | None = _option(
        None, "Sample only these token ids, such as 16,14."
    )
    min_tokens: int = _option(
        0,
        "Output tokens before which nothing but max_tokens ends a sample.",
        Bounds(0, _MAX_COUNT),
    )
    """Stop ids are not sampled before, and a stop string that is complete then ends nothing."""
    seed: int | None = _option(None, "Of this request's draws.", Bounds(0, MAX_SEED))
    """None: the client draws one from the run's seed."""
    logprobs: int | None = _option(
        None,
        "Report, in JSON, this many log-probabilities at each position; 0: the sampled one's; -1: "
        "all.",
        Bounds(0, _MAX_LOGPROBS, or_all=True),
    )
    prompt_logprobs: int | None = _option(
        None,
        "The same for each token of the prompt but the first.",
        Bounds(0, _MAX_LOGPROBS, or_all=True),
    )
    """Such a request shares no prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(DrawParams):
    """How the tokens of one request are drawn, when they end, and how they are made text. Names,
    defaults and meanings are vLLM's, and so is the order in which they act.

    None is as if the field were left out, but for `max_tokens`. What vLLM has and this has not is
    at the end, and refused by name.
    """

    n: int = _option(1, "Samples of each prompt, whose blocks they share.", Bounds(1, _MAX_SAMPLES))
    """Each is a request of its own with the seed `seed + its index`."""
    max_tokens: int | None = _option(16, "Most output tokens of a sample.", Bounds(1, _MAX_COUNT))
    """None: as many as the context has room for. The engine's requests have a number."""
    bad_words: tuple[str, ...] = _option(
        (), "Never generate this text; may be given several times."
    )
    """The last token of one is not sampled after its others (`Request.bad_word_ids`)."""
    stop: tuple[str, ...] = _option((), "End before this text; may be given several times.")
    """The one that is complete first ends the output; of several that are complete at the same
    character the one that begins first (vLLM goes by the order of the list)."""
    stop_token_ids: tuple[int, ...] = _option(
        (), "End at this token id; may be given several times."
    )
    include_stop_str_in_output: bool = _option(
        False, "Keep the stop string, or the stop token's text."
    )
    ignore_eos: bool = _option(False, "Go on after the model's end-of-sequence token.")
    detokenize: bool = _option(True, "Make text of tokens.")
    """False: `text` is ''."""
    skip_special_tokens: bool = _option(True, "Leave special tokens out of the text.")
    spaces_between_special_tokens: bool = _option(
        True, "Keep what the tokenizer puts between added tokens."
    )
    """False: where they are in the text, one added token stands right behind another."""
    skip_reading_prefix_cache: bool = _option(
        False, "Compute the prompt though the cache has its beginning."
    )

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


# ---- the same, as a list -------------------------------------------------------------------------


class Option(NamedTuple):
    """One field of `SamplingParams` that is not refused."""

    name: str
    type: Any
    """Of a value that is not None."""
    may_be_none: bool
    default: Any
    limits: Bounds | None


def _options() -> Iterator[Option]:
    hints = get_type_hints(SamplingParams)
    for item in fields(SamplingParams):
        if "refused" not in item.metadata:
            hint = hints[item.name]
            may_be_none = isinstance(hint, UnionType)
            if may_be_none:
                (hint,) = set(get_args(hint)) - {NoneType}
            limits = item.metadata["limits"]
            yield Option(item.name, hint, may_be_none, item.default, limits)


OPTIONS = tuple(_options())
REFUSED = {
    item.name: item.metadata["refused"]
    for item in fields(SamplingParams)
    if "refused" in item.metadata
}
"""Of vLLM's parameters those that are not here, and why."""
DRAW_OPTIONS = OPTIONS[: len(fields(DrawParams))]
"""Those of `DrawParams`, in order."""
_OF_TOKENS = tuple(
    option.name for option in DRAW_OPTIONS if option.type in (tuple[int, ...], Mapping[int, float])
)


def token_ids_of(params: DrawParams) -> Iterator[Collection[int]]:
    """All that a stage looks up in its tables."""
    for name in _OF_TOKENS:
        yield getattr(params, name) or ()
