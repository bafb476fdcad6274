"""The text of one request as its tokens come: whole characters, at the same cost for each token."""

import codecs
from collections.abc import Sequence
from itertools import islice

from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.sampling_params import SamplingParams

_REPLACED = "\ufffd"  # what a decoder writes for bytes that are no character
_CONTEXT_TOKENS = 5  # of the prompt, which the first decode sees; as many as vLLM and TGI take
_LONGEST = 3  # tokens of a character that is not whole yet: UTF-8 has four bytes at most

# One replacement character for each byte, where a tokenizer does so; Python's "replace" writes one
# for all that began a character.
_SINGLY = "pipeserve.singly"
codecs.register_error(_SINGLY, lambda error: (_REPLACED * (error.end - error.start), error.end))


class Detokenizer:
    """Text that is given out as soon as nothing that follows can change it.

    Tokens are of two kinds. What is **bytes** (all of byte-level BPE, and sentencepiece's `<0xE2>`)
    goes through a decoder of UTF-8, which holds back the beginning of a character, and lets go of
    U+FFFD with the first byte that cannot belong to it. What is **text** depends on the token
    before it (a leading space, say), so a short window is decoded without and with the new token,
    and the difference counts.

    All pieces together are what the tokenizer makes of all tokens, with one exception. Where bytes
    of sentencepiece are no UTF-8, `tokenizers` replaces every byte since the last text, those of
    whole characters too, which may have been given out long ago; here, and in sentencepiece itself,
    only those that are no character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008  (frozen)
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = params.skip_special_tokens
        self._joins_added = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._follows_added = False
        errors = _SINGLY if tokenizer.bytes_are_replaced_singly else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        shown = (token for token in reversed(prompt) if not self._is_skipped(token))
        known = list(islice(shown, _CONTEXT_TOKENS))[::-1]
        self._begun = self._begin(known)
        self._window = known
        self._num_read = len(known)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; '' while a character is unfinished."""
        if self._is_skipped(token_id):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            text = self._end_bytes() + self._push_text(token_id)
        else:
            text = self._without_begun(self._end_text() + self._take_bytes(data))
            self._window, self._num_read = [token_id], 1
        if self._joins_added:
            text = self._joined(token_id, text)
        return text

    def flush(self) -> str:
        """What is left at the end: the replacement character for a character cut short."""
        return self._end_text() + self._end_bytes()

    # ---- bytes ----------------------------------------------------------------------------------

    def _take_bytes(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        held, _ = self._utf8.getstate()
        if held[:1] == b"\xed" and held[1:] >= b"\xa0":
            # Half a surrogate pair: Python waits for the rest of it, which is no character either.
            text += self._utf8.decode(b"", final=True)
        return text

    def _begin(self, known: Sequence[int]) -> str:
        """Takes in a character that the prompt began, if it did. Whole, it is new text; what it is
        replaced by if it never becomes whole, which this returns, is the prompt's."""
        data = b""
        for token in reversed(known):
            own = self._tokenizer.token_bytes(token)
            if own is None or len(data) >= _LONGEST:
                break
            data = own + data
        data = data[-_LONGEST:]
        _, num_whole = codecs.utf_8_decode(data, "replace", False)
        begun = data[num_whole:]
        self._utf8.decode(begun)
        return begun.decode("utf-8", self._utf8.errors)

    def _end_bytes(self) -> str:
        return self._without_begun(self._utf8.decode(b"", final=True))

    def _without_begun(self, text: str) -> str:
        if text and self._begun:
            text, self._begun = text.removeprefix(self._begun), ""
        return text

    # ---- text -----------------------------------------------------------------------------------

    def _push_text(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        num_unread = len(self._window) - self._num_read
        is_unfinished = self._tokenizer.hides_bytes and text.endswith(_REPLACED)
        return "" if is_unfinished and num_unread <= _LONGEST else self._read(text)

    def _end_text(self) -> str:
        return self._read(self._new_text()) if len(self._window) > self._num_read else ""

    def _new_text(self) -> str:
        read = self._decode(self._window[: self._num_read])
        return self._decode(self._window)[len(read) :]

    def _read(self, text: str) -> str:
        """What is new becomes the context of what comes, which needs no more than one token that
        is text."""
        if text:
            self._window = self._window[self._num_read :]
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._num_read = len(self._window)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skips_special)

    # ---- special tokens -------------------------------------------------------------------------

    def _is_skipped(self, token_id: int) -> bool:
        return self._skips_special and token_id in self._tokenizer.special_ids

    def _joined(self, token_id: int, text: str) -> str:
        """As vLLM does without `spaces_between_special_tokens`: an added token behind another is
        its own text alone."""
        added = self._tokenizer.added_tokens.get(token_id)
        if added is not None and self._follows_added:
            text = added
        self._follows_added = added is not None
        return text
