"""What comes back for a prompt: piece by piece (`Delta`), or whole (`Completion`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from pipeserve.core.nouns import Output, Request, TokenLogprobs
from pipeserve.errors import one_line
from pipeserve.frontend.detokenizer import Detokenizer
from pipeserve.frontend.stop_strings import StopStrings
from pipeserve.frontend.tokenizer import Tokenizer

_RUST_PANIC = "PanicException"  # of `tokenizers`, and no Exception

PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""One for each token of the prompt. None for the first, which nothing precedes, as in vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One sample of a prompt: what vLLM has under the same name."""

    index: int
    """0 to `n` - 1."""
    token_ids: tuple[int, ...]
    """With the token that ended it, eos too, which `text` is without."""
    text: str
    finish_reason: str
    """"stop" (eos, a stop id or a stop string), "length" (max_tokens or the context) or "error"."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each of `token_ids`; None when not asked for."""
    error: str | None = None
    """What went wrong with this sample alone, where `finish_reason` is "error"."""
    stop_reason: int | str | None = None
    """Which of `stop` or `stop_token_ids` ended it; None where it was eos, or no stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that was generated for one prompt.

    `outputs` has its `n` samples, as vLLM's `RequestOutput` has; what the first one says can be
    asked of the completion itself.
    """

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    """In order of their index."""
    prompt_logprobs: PromptLogprobs | None = None
    """None when not asked for."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


class Delta(NamedTuple):
    """What one step added to one sample of one prompt."""

    index: int
    """Which of the call's prompts."""
    sample: int
    """Which of the prompt's samples: 0 to `n` - 1."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    """May be '' while a character is unfinished, or while a stop string may have begun."""
    finish_reason: str | None
    """None while it goes on; as CompletionOutput's in the last one of the sample."""
    finished: bool
    """Whether every sample of the prompt has ended."""
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: PromptLogprobs | None
    """In the first delta of sample 0, where they were asked for."""
    num_cached: int = 0
    """In the first delta of a sample: how many of the prompt's tokens the prefix cache had."""
    error: str | None = None
    """As CompletionOutput's, in the last one of the sample."""
    stop_reason: int | str | None = None
    """Likewise."""


class Generation:
    """One request's way from tokens to text: what the engine says in, `Delta`s out."""

    def __init__(
        self, index: int, sample: int, unfinished: set[int], request: Request, tokenizer: Tokenizer
    ) -> None:
        """`unfinished`: the prompt's samples that go on, which its generations keep together."""
        self._index = index
        self._sample = sample
        self._unfinished = unfinished
        self.request = request
        self._tokenizer = tokenizer
        params = request.params
        self._stop_strings = StopStrings(params.stop, params.include_stop_str_in_output)
        self._num_tokens = 0

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        """Made with the first token, so that its errors are this request's too."""
        return Detokenizer(self._tokenizer, self.request.prompt, self.request.params)

    def take(self, output: Output) -> Delta:
        """The next delta. It may end the sample where the engine goes on, which knows nothing of
        text: a stop string was found, or no text can be made. The caller ends the request then."""
        finish_reason, error, text = output.finish_reason, output.error, ""
        try:
            text = self._text(output)
        except BaseException as wrong:  # of a tokenizer, which may raise whatever it likes
            if not isinstance(wrong, Exception) and type(wrong).__name__ != _RUST_PANIC:
                raise
            finish_reason, error = "error", f"no text can be made: {one_line(wrong)}"
        if self._stop_strings.found:
            finish_reason, error = "stop", None
        if finish_reason is not None:
            self._unfinished.discard(self._sample)
        logprobs = prompt_logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = () if output.logprobs is None else (output.logprobs,)
        if output.prompt_logprobs is not None:
            prompt_logprobs = (None, *output.prompt_logprobs)
        return Delta(
            index=self._index,
            sample=self._sample,
            prompt_token_ids=self.request.prompt,
            token_ids=() if output.token is None else (output.token,),
            text=text,
            finish_reason=finish_reason,
            finished=not self._unfinished,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached=output.begun.num_cached if output.begun is not None else 0,
            error=error,
            stop_reason=self._stopped_by(output) if finish_reason == "stop" else None,
        )

    def _stopped_by(self, output: Output) -> int | str | None:
        if self._stop_strings.found:
            return self._stop_strings.found
        return output.token if output.token in self.request.params.stop_token_ids else None

    def _text(self, output: Output) -> str:
        """What is now safe to show: neither half a character, nor what may begin a stop string."""
        params, text = self.request.params, ""
        if not params.detokenize:
            return ""
        if output.token is not None:
            self._num_tokens += 1
            ends = output.finish_reason == "stop" and output.token in self.request.stop_ids
            if not ends or params.include_stop_str_in_output:
                text = self._detokenizer.push(output.token)
        is_last = output.finish_reason is not None
        if is_last:
            text += self._detokenizer.flush()
        may_end = self._num_tokens > params.min_tokens
        text = self._stop_strings.push(text, may_end=may_end)
        return text + self._stop_strings.flush() if is_last else text


@dataclass(slots=True)
class _Growing:
    """One prompt's deltas so far, by sample."""

    samples: dict[int, list[Delta]] = field(default_factory=dict)
    prompt_logprobs: PromptLogprobs | None = None


def completed(deltas: Iterable[Delta]) -> Iterator[tuple[int, Completion]]:
    """(index, Completion) of each prompt as it ends: in the order of ending, not of asking."""
    growing: dict[int, _Growing] = {}
    for delta in deltas:
        prompt = growing.setdefault(delta.index, _Growing())
        prompt.samples.setdefault(delta.sample, []).append(delta)
        prompt.prompt_logprobs = prompt.prompt_logprobs or delta.prompt_logprobs
        if delta.finished:
            del growing[delta.index]
            yield (
                delta.index,
                Completion(
                    prompt_token_ids=delta.prompt_token_ids,
                    outputs=tuple(_join(pieces) for _, pieces in sorted(prompt.samples.items())),
                    prompt_logprobs=prompt.prompt_logprobs,
                ),
            )


def _join(deltas: list[Delta]) -> CompletionOutput:
    last = deltas[-1]
    assert last.finish_reason is not None
    return CompletionOutput(
        index=last.sample,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        finish_reason=last.finish_reason,
        error=last.error,
        stop_reason=last.stop_reason,
        logprobs=None
        if last.logprobs is None
        else tuple(entry for delta in deltas for entry in delta.logprobs or ()),
    )
