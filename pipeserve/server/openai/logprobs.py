"""Log-probabilities in OpenAI's two shapes."""

from collections.abc import Iterable, Sequence
from typing import Any

from pipeserve.core.nouns import TokenLogprobs
from pipeserve.frontend.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no -infinity: OpenAI's and vLLM's word for it


class LegacyLogprobs:
    """Those of a completion: parallel lists, with `text_offset` from the beginning of the text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top
        self._offset = 0

    def of(
        self, token_ids: Sequence[int], entries: Iterable[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """Of the tokens that come next. None where nothing precedes a token."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self._tokenizer.token_text(token_id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            logprobs.append(None if entry is None else _finite(entry.sampled))
            tops.append(None if entry is None else self._top(text, entry))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        """By text. Of tokens with one text the likeliest stands, and the token itself is there."""
        top: dict[str, float] = {}
        for token_id, logprob in list(entry.top.items())[: self._num_top]:
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        top.setdefault(text, _finite(entry.sampled))
        return top


def chat_logprobs(
    tokenizer: Tokenizer,
    num_top: int,
    token_ids: Sequence[int],
    entries: Iterable[TokenLogprobs],
) -> dict[str, Any]:
    """Those of a chat: a list of objects, with the bytes of each token."""
    return {
        "content": [
            {
                **_of_token(tokenizer, token_id, entry.sampled),
                "top_logprobs": [
                    _of_token(tokenizer, other, logprob)
                    for other, logprob in list(entry.top.items())[:num_top]
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


def _of_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    own = tokenizer.token_bytes(token_id)
    return {
        "token": text,
        "logprob": _finite(logprob),
        "bytes": list(text.encode() if own is None else own),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
