"""Text in, text out: the checkpoint's own tokenizer. `detokenizer.py` has text that grows.

A folder without a tokenizer serves ids. transformers is imported only for what `tokenizers` cannot
do alone (`plain_tokenizer.py`): tokenizers that are more than their file.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError, one_line
from pipeserve.frontend.plain_tokenizer import load_plain

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how sentencepiece writes a byte


class Tokenizer:
    """The tokenizer of one checkpoint folder, loaded at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exists = any((folder / name).is_file() for name in _FILES)
        self._bytes: dict[int, bytes | None] = {}

    def load(self) -> None:
        """Loads it now, where there is one. Raises ConfigError when it cannot be read."""
        if self.exists:
            _ = self._loaded

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the model expects in front. ConfigError."""
        loaded = self._loaded
        with _as_one_line(f"the tokenizer in {self.folder} cannot take this text"):
            return loaded.encode(text, add_special_tokens=add_special_tokens)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as token ids, at the beginning of a text and behind a space. ConfigError.

        vLLM takes the second only where it is as many tokens, and says " described", which is
        one, where "described", which is two, is banned (vllm#23886, vllm#32557).
        """
        forms: list[tuple[int, ...]] = []
        for word in words:
            plain, spaced = (
                tuple(self.encode(space + word.lstrip(), add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain:
                raise ConfigError(f"bad_words has {word!r}, which is no token; leave it out")
            forms.append(plain)
            if spaced[-len(plain) :] != plain:  # else it is banned with the other
                forms.append(spaced)
        return tuple(forms)

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation (dicts of `role` and `content`) up to the model's turn.

        `options` are transformers' (`apply_chat_template`): `tools`, `chat_template`, and what the
        template takes. Raises ConfigError when the model has no chat template, or the template
        refuses `messages`.
        """
        return self.encode(self.chat_text(messages, **options), add_special_tokens=False)

    def chat_text(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The same, as text."""
        loaded = self._loaded
        template = options.get("chat_template") or loaded.chat_template
        if not template:
            raise ConfigError(f"{self.folder} has no chat template; give a prompt, not messages")
        options = {"add_generation_prompt": True, **options}
        with _as_one_line("the model's chat template refuses these messages"):
            # It runs in a sandbox, without a way to files or code.
            known = _as_known(messages, str(template))
            return loaded.apply_chat_template(known, tokenize=False, **options)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; '' where there is no tokenizer."""
        if not self.exists:
            return ""
        return self._loaded.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to the bytes of a text, where the tokenizer cuts texts into bytes, as
        byte-level BPE does, or this token stands for one. None: it adds text, which may depend on
        the tokens before it."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token by itself, as people read it; bytes that are no character are replaced."""
        own = self.token_bytes(token_id)
        if own:
            return own.decode(errors="replace")
        if not self.exists:
            return f"token_id:{token_id}"
        if token_id in self.added_tokens:
            return self.added_tokens[token_id]
        piece = self._loaded.convert_ids_to_tokens(token_id)
        return "" if piece is None else str(piece).replace("\u2581", " ")

    @cached_property
    def longest_token(self) -> int:
        """Letters of the longest one: no text of more letters has so few tokens."""
        return max((len(token) for token in self._loaded.get_vocab()), default=1)

    @property
    def information(self) -> dict[str, Any]:
        """What clients ask of a tokenizer: its special tokens and its chat template."""
        if not self.exists:
            return {}
        loaded = self._loaded
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": getattr(loaded, "transformers_class", type(loaded).__name__),
            "chat_template": loaded.chat_template,
            "model_max_length": loaded.model_max_length,
            **{name: loaded.special_tokens_map.get(name) for name in names},
        }

    @property
    def eos_token_id(self) -> int | None:
        """None too where there is no tokenizer."""
        return self._loaded.eos_token_id if self.exists else None

    @cached_property
    def added_tokens(self) -> Mapping[int, str]:
        """Ids and texts of the tokens that were added to the vocabulary, special ones too."""
        if not self.exists:
            return {}
        return {number: str(token) for number, token in self._loaded.added_tokens_decoder.items()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those that `skip_special_tokens` leaves out."""
        if not self.exists:
            return frozenset()
        added = self._loaded.added_tokens_decoder
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def bytes_are_replaced_singly(self) -> bool:
        """Whether a broken character is a replacement character for each of its bytes, as in
        sentencepiece, or one for all of them."""
        return self.exists and "ByteLevel" not in self._decoder_kinds

    @cached_property
    def hides_bytes(self) -> bool:
        """Whether a token may be part of a character and `token_bytes` does not say so."""
        return self.exists and (
            not self._is_fast
            or ("ByteLevel" in self._decoder_kinds and self._decoder_kinds != ["ByteLevel"])
        )

    @property
    def _is_fast(self) -> bool:
        """Whether it is one of `tokenizers`, whose steps are known, and not written in Python."""
        return getattr(self._loaded, "is_fast", False)

    @cached_property
    def _decoder_kinds(self) -> list[str]:
        """The steps by which the tokenizer makes text of tokens, as `tokenizers` names them."""
        if not self._is_fast:
            return ["ByteFallback"]  # over sentencepiece, for the most part
        decoder = self._loaded.backend_tokenizer.decoder
        if decoder is None:
            return []
        state = json.loads(decoder.__getstate__())
        return [step["type"] for step in state.get("decoders", [state])]

    def _find_bytes(self, token_id: int) -> bytes | None:
        if not self.exists:
            return b""
        kinds = self._decoder_kinds
        piece = self._loaded.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""  # the model has more rows than the tokenizer has tokens
        if kinds == ["ByteLevel"]:
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
            return piece.encode()
        match = _BYTE_PIECE.fullmatch(piece)
        if match and "ByteFallback" in kinds:
            return bytes.fromhex(match[1])
        return None

    @cached_property
    def _loaded(self) -> Any:
        """By `tokenizers` where that suffices."""
        return load_plain(self.folder) or self._full

    @cached_property
    def _full(self) -> Any:
        """That of transformers."""
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


def _as_known(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """What a developer says is the system's word to a template that does not know the newer role;
    and all such words come first, together, for many templates take them there alone."""
    if "developer" in template or all(each.get("role") != "developer" for each in messages):
        return list(messages)
    is_theirs = [each.get("role") in ("system", "developer") for each in messages]
    words = [each["content"] for each, is_its in zip(messages, is_theirs, strict=True) if is_its]
    others = [each for each, is_its in zip(messages, is_theirs, strict=True) if not is_its]
    return [{"role": "system", "content": "\n\n".join(words)}, *others]


@contextmanager
def _as_one_line(what: str) -> Iterator[None]:
    """ConfigError, beginning with `what`, for whatever a library of others raises. BaseException,
    because a panic of the tokenizers, which are written in Rust, is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError(f"{what}: {one_line(error)}") from None


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


def _gpt2_letters() -> dict[str, int]:
    """The byte of each letter in which byte-level BPE writes it: what can be printed in Latin-1
    stands for itself, the others stand from 256 on. Source: `bytes_to_unicode` of GPT-2."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _gpt2_letters()
