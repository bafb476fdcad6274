"""What comes back for a prompt: piece by piece (`Delta`), or whole (`Completion`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeserve.core.nouns import Output, Request, TokenLogprobs
from pipeserve.tokenizer import Detokenizer, StopStrings, Tokenizer

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
    """"stop" (eos, a stop id or a stop string) or "length" (max_tokens or the context)."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each of `token_ids`; None when not asked for."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
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


class Generation:
    """One request's way from tokens to text: what the engine says in, `Delta`s out."""

    def __init__(
        self, index: int, sample: int, unfinished: set[int], request: Request, tokenizer: Tokenizer
    ) -> None:
        """`unfinished`: the prompt's samples that go on, which its generations keep together."""
        self._index = index
        self._sample = sample
        self._unfinished = unfinished
        self._request = request
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stop_strings = StopStrings(request.params.stop)
        self._num_tokens = 0

    def take(self, output: Output) -> Delta:
        """The next delta. Its finish reason is "stop" too when a stop string was found; the
        engine does not know of that, so the caller ends the request there."""
        text = self._text(output)
        finish_reason = "stop" if self._stop_strings.found else output.finish_reason
        if finish_reason is not None:
            self._unfinished.discard(self._sample)
        logprobs = prompt_logprobs = None
        if self._request.params.logprobs is not None:
            logprobs = () if output.logprobs is None else (output.logprobs,)
        if output.prompt_logprobs is not None:
            prompt_logprobs = (None, *output.prompt_logprobs)
        return Delta(
            index=self._index,
            sample=self._sample,
            prompt_token_ids=self._request.prompt,
            token_ids=() if output.token is None else (output.token,),
            text=text,
            finish_reason=finish_reason,
            finished=not self._unfinished,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _text(self, output: Output) -> str:
        text = ""
        ended_by_token = output.finish_reason == "stop" and output.token in self._request.stop_ids
        if output.token is not None:
            self._num_tokens += 1
            if not ended_by_token:
                text = self._detokenizer.push(output.token)
        ends = output.finish_reason is not None
        if ends:
            text += self._detokenizer.flush()
        if self._num_tokens <= self._request.params.min_tokens:
            return text
        text = self._stop_strings.push(text)
        return text + self._stop_strings.flush() if ends else text


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
        logprobs=None
        if last.logprobs is None
        else tuple(entry for delta in deltas for entry in delta.logprobs or ()),
    )
