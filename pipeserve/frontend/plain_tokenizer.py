"""A tokenizer by `tokenizers` alone, where its folder says no more than tokenizer.json and a chat
template: to import transformers takes seconds on the way to a first token.
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
_CHANGES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "fast_tokenizer_files",
    "split_special_tokens",
)
"""Keys of tokenizer_config.json by which these do so, too."""
_OLDER = ("added_tokens.json", "special_tokens_map.json")
"""Files that are read where tokenizer_config.json does not list the added tokens itself."""
_MORE_SPECIAL = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
_USUAL, _OF_TOOLS = "default", "tool_use"
"""Names of chat templates: the one where there is one, and the one where there are tools."""
_ENDLESS = int(1e30)


def load_plain(folder: Path) -> "PlainTokenizer | None":
    """None: it takes transformers. What cannot be read, that says better, too."""
    try:
        return _load(folder)
    except Exception:
        return None


def _load(folder: Path) -> "PlainTokenizer | None":
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") not in _AS_IT_IS or any(
        config.get(name) is not None for name in _CHANGES
    ):
        return None
    if "added_tokens_decoder" not in config and any((folder / name).exists() for name in _OLDER):
        return None
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folder / "tokenizer.json"))
    added = backend.get_added_tokens_decoder()
    listed = {
        int(number): entry for number, entry in config.get("added_tokens_decoder", {}).items()
    }
    if any(
        number not in added or added[number].content != _content(entry)
        for number, entry in listed.items()
    ):
        return None
    named, others = _special_tokens(config)
    special = {token.content for token in added.values() if token.special}
    if not special.issuperset([*named.values(), *others]):
        return None
    backend.no_truncation()
    backend.no_padding()
    return PlainTokenizer(backend, config, named, _templates(folder, config))


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Those that have a name, such as eos_token, and the others."""
    named = {
        name: _content(value)
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    others: list[str] = []
    for name in _MORE_SPECIAL:
        more = config.get(name) or []
        if isinstance(more, dict):
            named |= {each: _content(token) for each, token in more.items()}
        else:
            others += map(_content, more)
    return named, others


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Where there are files, the configuration's do not count."""
    paths = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    usual = folder / "chat_template.jinja"
    if usual.is_file():
        paths = {_USUAL: usual, **paths}
    if paths:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    own = config.get("chat_template") or []
    if isinstance(own, str):
        return {_USUAL: own}
    return {each["name"]: each["template"] for each in own}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


class PlainTokenizer:
    """What `Tokenizer` asks of one of transformers' for text, by the same names."""

    is_fast = True

    transformers_class = "TokenizersBackend"

    def __init__(
        self,
        backend: "Backend",
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
    ) -> None:
        """`special_tokens`, `templates`: by name."""
        self.backend_tokenizer = backend
        self.special_tokens_map = special_tokens
        eos = special_tokens.get("eos_token")
        self.eos_token_id = None if eos is None else backend.token_to_id(eos)
        self.model_max_length = config.get("model_max_length") or _ENDLESS
        self._templates = templates

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

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """One, or several by name."""
        is_one = self._templates.keys() <= {_USUAL}
        return self._templates.get(_USUAL) if is_one else self._templates

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Text alone (`tokenize` is False). `chat_template`: a template, or the name of one."""
        from pipeserve.frontend.chat_template import render

        has_own = tools is not None and _OF_TOOLS in self._templates
        wanted = chat_template or (_OF_TOOLS if has_own else _USUAL)
        template = self._templates.get(wanted, chat_template)
        if template is None:
            names = ", ".join(sorted(self._templates))
            raise ValueError(f"there are several ({names}), and none is the usual one; name one")
        return render(template, messages, tools=tools, **{**self.special_tokens_map, **options})
