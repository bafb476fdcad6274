"""What comes back for a prompt: piece by piece (`Delta`), or whole (`Completion`)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeserve.core.nouns import Output, Request, TokenLogprobs
from pipeserve.tokenizer import Detokenizer, StopStrings, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that was generated for one prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """With the token that ended it, eos too, which `text` is without."""
    text: str
    finish_reason: str
    """"stop" (eos, a stop id or a stop string) or "length" (max_tokens or the context)."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each of `token_ids`; None when not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to the completion of one prompt."""

    index: int
    """Which of the call's prompts."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    """May be '' while a character is unfinished, or while a stop string may have begun."""
    finish_reason: str | None
    """None while it goes on; as Completion's in the last one."""
    logprobs: tuple[TokenLogprobs, ...] | None


class Generation:
    """One request's way from tokens to text: what the engine says in, `Delta`s out."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self._index = index
        self._request = request
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stop_strings = StopStrings(request.params.stop)
        self._num_tokens = 0

    def take(self, output: Output) -> Delta:
        """The next delta. Its finish reason is "stop" too when a stop string was found; the
        engine does not know of that, so the caller ends the request there."""
        text = self._text(output)
        logprobs = None
        if self._request.params.logprobs is not None:
            logprobs = () if output.logprobs is None else (output.logprobs,)
        return Delta(
            index=self._index,
            prompt_token_ids=self._request.prompt,
            token_ids=() if output.token is None else (output.token,),
            text=text,
            finish_reason="stop" if self._stop_strings.found else output.finish_reason,
            logprobs=logprobs,
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


def completed(deltas: Iterable[Delta]) -> Iterator[tuple[int, Completion]]:
    """(index, Completion) of each prompt as it ends: in the order of ending, not of asking."""
    growing: dict[int, list[Delta]] = {}
    for delta in deltas:
        growing.setdefault(delta.index, []).append(delta)
        if delta.finish_reason is not None:
            yield delta.index, _join(growing.pop(delta.index))


def _join(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None
    return Completion(
        prompt_token_ids=last.prompt_token_ids,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        finish_reason=last.finish_reason,
        logprobs=None
        if last.logprobs is None
        else tuple(entry for delta in deltas for entry in delta.logprobs or ()),
    )
