"""What `pipeserve generate` is given: one prompt, or a JSONL file of them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeserve.configs import RunConfig
from pipeserve.configs.recipes import check_keys
from pipeserve.core.nouns import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.launch.jsonl import read_objects
from pipeserve.params import PARAM_NAMES, check_params, params_from, seeded

if TYPE_CHECKING:
    from pipeserve.llm import Prompt
    from pipeserve.stages.config import ModelConfig

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One prompt of the input."""

    index: int
    """Line number in the file, from 0."""
    shown: dict[str, Any]
    """The key and value that the result repeats."""
    prompt: "Prompt"
    params: SamplingParams


def read_prompts(path: Path, defaults: SamplingParams, chat: bool) -> list[PromptLine]:
    """The prompts of a JSONL file, each with `defaults` but for what its line says.

    A line is {"prompt": text | "prompt_token_ids": [...] | "messages": [...]} and any field of
    SamplingParams. Raises ConfigError (FILE:LINE) for a line that is not.
    """
    prompts = []
    for index, line in read_objects(path):
        try:
            prompts.append(_parse_line(index, line, defaults, chat))
        except ConfigError as error:
            raise ConfigError(f"{path}:{index + 1}: {error}") from None
    return prompts


def one_prompt(text: str, params: SamplingParams, chat: bool) -> PromptLine:
    """What `--prompt` gives."""
    return PromptLine(
        index=0, shown={"prompt": text}, prompt=_as_chat(text) if chat else text, params=params
    )


def with_seeds(lines: Sequence[PromptLine], run_seed: int) -> list[PromptLine]:
    """`lines`, each with a seed of its own that depends on its number in the file and not on which
    lines run beside it: a resumed run draws what an uninterrupted one does."""
    return [replace(line, params=seeded(line.params, run_seed, line.index)) for line in lines]


def check_lines(lines: Iterable[PromptLine], model_config: "ModelConfig") -> None:
    """Raise ConfigError for the first line whose sampling this model cannot do."""
    for line in lines:
        try:
            check_params(line.params, model_config.vocab_size)
        except ConfigError as error:
            raise ConfigError(f"prompt {line.index}: {error}") from None


def job_of(config: RunConfig, lines: Sequence[PromptLine]) -> str:
    """16 hex digits that stand for all that results depend on: `lines` with their prompts, sampling
    and seeds, the model as it was named, and the dtype. How it is served (stages, policy, memory)
    is left out, so that a run may be resumed on another machine."""
    digest = hashlib.sha256(f"{config.model} {config.dtype}".encode())
    for line in lines:
        digest.update(f"\n{line!r}".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]


def _parse_line(
    index: int, line: dict[str, Any], defaults: SamplingParams, chat: bool
) -> PromptLine:
    check_keys(line, [*PROMPT_KEYS, *PARAM_NAMES])
    keys = [key for key in PROMPT_KEYS if key in line]
    if len(keys) != 1:
        found = " and ".join(keys) or "none of them"
        raise ConfigError(f"a line has one of {', '.join(PROMPT_KEYS)}; this one has {found}")
    key = keys[0]
    prompt = _check_prompt(key, line[key])
    return PromptLine(
        index=index,
        shown={key: line[key]},
        prompt=_as_chat(prompt) if chat and key == "prompt" else prompt,
        params=params_from({name: line[name] for name in PARAM_NAMES if name in line}, defaults),
    )


def _check_prompt(key: str, value: Any) -> Any:
    if key == "prompt":
        if not isinstance(value, str):
            raise ConfigError(f"prompt is {value!r}, must be text")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ConfigError("prompt has half a surrogate pair, which is no text; leave it out")
        return value
    kind, what = (int, "token ids") if key == "prompt_token_ids" else (dict, "objects")
    if not isinstance(value, list) or any(type(part) is not kind for part in value):
        raise ConfigError(f"{key} is {value!r}, must be a list of {what}")
    return value


def _as_chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
