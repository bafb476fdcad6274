"""Text in, text out: the checkpoint's own tokenizer, and text that grows token by token.

transformers is imported only when text is needed; a folder without a tokenizer serves ids.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole UTF-8 character
_LONGEST_REASON = 500  # characters of what a library says
_CONTEXT_TOKENS = 5  # prompt tokens that the first decode sees; as many as vLLM and TGI take


class Tokenizer:
    """The tokenizer of one checkpoint folder, loaded at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exists = any((folder / name).is_file() for name in _FILES)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model expects in front. ConfigError."""
        return self._encode(text)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as token ids, at the beginning of a text and behind a space. ConfigError.

        As vLLM does: the second form counts where it is as many tokens and begins with another.
        """
        forms: list[tuple[int, ...]] = []
        for word in words:
            plain, spaced = (
                tuple(self._encode(space + word.lstrip(), add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain:
                raise ConfigError(f"bad_words has {word!r}, which is no token; leave it out")
            forms.append(plain)
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                forms.append(spaced)
        return tuple(forms)

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation (dicts of `role` and `content`) up to the model's turn.

        Raises ConfigError when the model has no chat template, or the template refuses `messages`.
        """
        if not self._loaded.chat_template:
            raise ConfigError(f"{self.folder} has no chat template; give a prompt, not messages")
        loaded = self._loaded
        with _as_one_line("the model's chat template refuses these messages"):
            # transformers runs the template in a sandbox, without a way to files or code.
            text = loaded.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens; '' where there is no tokenizer."""
        if not self.exists:
            return ""
        return self._loaded.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str, **options: bool) -> list[int]:
        loaded = self._loaded
        with _as_one_line(f"the tokenizer in {self.folder} cannot encode this text"):
            return loaded.encode(text, **options)

    @cached_property
    def _loaded(self) -> Any:
        if not self.exists:
            raise ConfigError(
                f"{self.folder} has no tokenizer ({', '.join(_FILES)}); give prompts as token ids"
            )
        from transformers import AutoTokenizer

        try:
            with _as_one_line(f"the tokenizer in {self.folder} cannot be read"):
                return AutoTokenizer.from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False
                )
        except ConfigError as error:
            classes = _own_classes(self.folder)
            if classes and "trust_remote_code" in str(error):
                raise ConfigError(
                    f"the tokenizer in {self.folder} is the model's own class {classes}, whose "
                    "code is never run; give a folder with a tokenizer.json and no auto_map"
                ) from None
            raise


@contextmanager
def _as_one_line(what: str) -> Iterator[None]:
    """ConfigError, beginning with `what`, for whatever a library of others raises. BaseException,
    because a panic of the tokenizers, which are written in Rust, is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason[:_LONGEST_REASON]}") from None


def _own_classes(folder: Path) -> str:
    """The classes of the folder's own code that its files name for the tokenizer; '' if none."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8"))["auto_map"]
            named = named["AutoTokenizer"] if isinstance(named, dict) else named
            return ", ".join(each for each in named if each)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""


class Detokenizer:
    """The text of one request as its tokens come, never half a character.

    A token's text depends on the tokens around it, so each step decodes a short window twice,
    without and with what is new, and takes the difference (the prefix and read offsets of
    text-generation-inference and vLLM). Measured: 5 us a token, so there is one way only, streamed
    or not.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._num_read = self._num_whole_tokens()
        self._begun = self._new_text()  # of a character that the prompt began, if it did

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; '' while a character is unfinished."""
        self._window.append(token_id)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        text = text.removeprefix(self._begun)
        if text:
            self._begun = ""
            # What was just read is all the context that the next token needs.
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
        return text

    def flush(self) -> str:
        """What is left at the end: the replacement character for a character cut short."""
        text = self._new_text().removeprefix(self._begun)
        self._num_read = len(self._window)
        return text

    def _new_text(self) -> str:
        read = self._tokenizer.decode(self._window[: self._num_read])
        return self._tokenizer.decode(self._window)[len(read) :]

    def _num_whole_tokens(self) -> int:
        """How much of the prompt's end is whole characters. A character that the prompt began, in
        at most three tokens, is new text once it is whole; what looks begun and stays as it is (a
        replacement character of the user's own looks so) is the prompt's."""
        length = len(self._window)
        for num_read in range(length, max(length - 4, -1), -1):
            if not self._tokenizer.decode(self._window[:num_read]).endswith(_UNFINISHED):
                return num_read
        return length


class StopStrings:
    """Cuts growing text at the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now safe to show. Sets `found`, and ends before the stop string."""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, when no stop string came of it."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (all of `stop` not counted)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
