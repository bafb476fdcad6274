"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from pipeserve.core.nouns import TokenLogprobs
from pipeserve.frontend.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no -infinity: OpenAI's and vLLM's word for it


class TokenNames:
    """What tokens are called: their texts; or, for clients that tell them apart by it, their ids
    (vLLM's `return_tokens_as_token_ids`)."""

    def __init__(self, tokenizer: Tokenizer, by_id: bool) -> None:
        self.tokenizer, self._by_id = tokenizer, by_id

    def of(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._by_id else self.tokenizer.token_text(token_id)


class LegacyLogprobs:
    """Those of a completion: parallel lists, with `text_offset` from the beginning of the text."""

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names, self._num_top = names, num_top
        self._offset = 0

    def of(
        self, token_ids: Sequence[int], entries: Iterable[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """Of the tokens that come next. None where nothing precedes a token."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            name = self._names.of(token_id)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(self._names.tokenizer.token_text(token_id))
            logprobs.append(None if entry is None else _finite(entry.sampled))
            tops.append(None if entry is None else self._top(name, entry))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, name: str, entry: TokenLogprobs) -> dict[str, float]:
        """By name. Of tokens with one name the likeliest stands, and the token itself is there."""
        top: dict[str, float] = {}
        for token_id, logprob in _likeliest(entry, self._num_top):
            top.setdefault(self._names.of(token_id), _finite(logprob))
        top.setdefault(name, _finite(entry.sampled))
        return top


def chat_logprobs(
    names: TokenNames,
    num_top: int,
    token_ids: Sequence[int],
    entries: Iterable[TokenLogprobs],
) -> dict[str, Any]:
    """Those of a chat: a list of objects, with the bytes of each token."""
    return {
        "content": [
            {
                **_of_token(names, token_id, entry.sampled),
                "top_logprobs": [
                    _of_token(names, other, logprob)
                    for other, logprob in _likeliest(entry, num_top)
                ],
            }
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's own field: of each token of the prompt the likeliest, by id."""
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _finite(logprob),
                "decoded_token": tokenizer.token_text(token_id),
            }
            for token_id, logprob in {**entry.top, own: entry.sampled}.items()
        }
        for own, entry in zip(prompt, entries, strict=True)
    ]


def _of_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    own = names.tokenizer.token_bytes(token_id)
    if own is None:
        own = names.tokenizer.token_text(token_id).encode()
    return {"token": names.of(token_id), "logprob": _finite(logprob), "bytes": list(own)}


def _likeliest(entry: TokenLogprobs, num_top: int) -> Iterator[tuple[int, float]]:
    """So many; -1: all."""
    return islice(entry.top.items(), None if num_top == -1 else num_top)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
