"""A tokenizer by `tokenizers` alone, where its folder says no more than tokenizer.json: to import
transformers takes seconds on the way to a first token.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of transformers that take tokenizer.json so; others build theirs anew, by rules of their
own."""
_CHANGES = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
"""Keys of tokenizer_config.json by which these do so, too."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
            "mask_token")  # fmt: skip
_MORE_SPECIAL = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)


def load_plain(folder: Path) -> "PlainTokenizer | None":
    """None: it takes transformers. What cannot be read, that says better, too."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("tokenizer_class") not in _AS_IT_IS or any(
            config.get(name) is not None for name in _CHANGES
        ):
            return None
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception:
        return None
    added = backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    listed = {
        int(number): entry for number, entry in config.get("added_tokens_decoder", {}).items()
    }
    if not (_named(config) <= special) or any(
        number not in added or added[number].content != _content(entry)
        for number, entry in listed.items()
    ):
        return None
    backend.no_truncation()
    backend.no_padding()
    return PlainTokenizer(backend, config)


def _named(config: Mapping[str, Any]) -> set[str]:
    """All special tokens that the configuration has."""
    named = [config.get(name) for name in _SPECIAL]
    for name in _MORE_SPECIAL:
        more = config.get(name) or []
        named += more.values() if isinstance(more, dict) else more
    return {_content(token) for token in named if token is not None}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


class PlainTokenizer:
    """What `Tokenizer` asks of one of transformers' for text, by the same names."""

    is_fast = True

    def __init__(self, backend: "Backend", config: Mapping[str, Any]) -> None:
        self.backend_tokenizer = backend
        eos = config.get("eos_token")
        self.eos_token_id = None if eos is None else backend.token_to_id(_content(eos))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        return self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token_id)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    @cached_property
    def added_tokens_decoder(self) -> dict[int, "AddedToken"]:
        return self.backend_tokenizer.get_added_tokens_decoder()
