"""What `pipeserve generate` is given: one prompt, or a JSONL file of them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeserve.configs import RunConfig
from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError
from pipeserve.frontend.params import (
    PARAM_NAMES,
    check_params,
    check_priority,
    params_from,
    seeded,
)
from pipeserve.frontend.prompt_forms import Prompt, plain_prompt
from pipeserve.launch.inputs.jsonl import read_objects
from pipeserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pipeserve.stages.config.model_config import ModelConfig

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")

_UNKNOWN = SamplingParams(max_tokens=None)
"""What is left out until the model is known, whose generation_config.json may say how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One prompt of the input."""

    index: int
    """Line number in the file, from 0."""
    shown: dict[str, Any]
    """The key and value that the result repeats."""
    prompt: Prompt
    options: Mapping[str, Any]
    """Sampling parameters as the line and the flags give them; what neither does is the model's."""
    priority: int = 0
    """The lowest goes first, under `--order priority`."""

    def params(
        self, defaults: SamplingParams, run_seed: int, vocab_size: int | None = None
    ) -> SamplingParams:
        """All of them, with a seed that depends on the line's number in the file and not on which
        lines run beside it: a resumed run draws what an uninterrupted one does. ConfigError."""
        try:
            params = check_params(params_from(self.options, defaults), vocab_size)
            return seeded(params, run_seed, self.index)
        except ConfigError as error:
            raise ConfigError(f"prompt {self.index}: {error}") from None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for flags that no model could do."""
    params_from(options, _UNKNOWN)


def read_prompts(path: Path, options: Mapping[str, Any], chat: bool) -> list[PromptLine]:
    """The prompts of a JSONL file, each with `options` but for what its line says.

    A line is {"prompt": text | "prompt_token_ids": [...] | "messages": [...]}, a "priority" if
    wanted, and any field of SamplingParams; null is as if absent. Raises ConfigError (FILE:LINE)
    for a line that is not.
    """
    prompts = []
    for index, line in read_objects(path):
        try:
            prompts.append(_parse_line(index, line, options, chat))
        except ConfigError as error:
            raise ConfigError(f"{path}:{index + 1}: {error}") from None
    return prompts


def one_prompt(text: str, options: Mapping[str, Any], chat: bool) -> PromptLine:
    """What `--prompt` gives."""
    plain_prompt(text)  # raises where the shell handed over no text
    return PromptLine(
        index=0, shown={"prompt": text}, prompt=_as_chat(text) if chat else text, options=options
    )


def check_order(lines: Iterable[PromptLine], order: str) -> None:
    """Raise ConfigError for a priority that the run's order would pass over."""
    for line in lines:
        try:
            check_priority(line.priority, order)
        except ConfigError as error:
            raise ConfigError(f"prompt {line.index}: {error}") from None


def check_lines(lines: Iterable[PromptLine], model_config: "ModelConfig") -> None:
    """Raise ConfigError for the first line whose sampling this model cannot do."""
    for line in lines:
        line.params(_UNKNOWN, 0, model_config.vocab_size)


def job_of(config: RunConfig, lines: Sequence[PromptLine]) -> str:
    """16 hex digits that stand for all that results depend on: `lines` with their prompts and
    sampling, the seed, the model as it was named, and the dtype. How it is served (stages, policy,
    memory) is left out, so that a run may be resumed on another machine."""
    model = f"{config.model} {config.dtype} {config.generation_config} {config.seed}"
    digest = hashlib.sha256(model.encode("utf-8", "backslashreplace"))
    for line in lines:
        parts = (line.index, line.shown, line.prompt, sorted(line.options.items()))
        digest.update(f"\n{parts!r}".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]


def _parse_line(
    index: int, line: dict[str, Any], options: Mapping[str, Any], chat: bool
) -> PromptLine:
    check_keys(line, [*PROMPT_KEYS, "priority", *PARAM_NAMES])
    given = {key: value for key, value in line.items() if value is not None}
    keys = [key for key in PROMPT_KEYS if key in given]
    if len(keys) != 1:
        found = " and ".join(keys) or "none of them"
        raise ConfigError(f"a line has one of {', '.join(PROMPT_KEYS)}; this one has {found}")
    key = keys[0]
    prompt = _check_prompt(key, given.pop(key))
    priority = check_priority(given.pop("priority", 0))
    own = {**options, **given}
    check_options(own)
    return PromptLine(
        index=index,
        shown={key: line[key]},
        prompt=_as_chat(prompt) if chat and key == "prompt" else prompt,
        options=own,
        priority=priority,
    )


def _check_prompt(key: str, value: Any) -> Any:
    """As it is given: what is wrong with it whatever the model is found here."""
    kind = str if key == "prompt" else list
    if not isinstance(value, kind):
        what = {"prompt": "text", "messages": "a list of objects"}.get(key, "a list of token ids")
        raise ConfigError(f"{key} is {value!r}, must be {what}")
    parts = {"prompt_token_ids": (int, "token ids"), "messages": (dict, "objects")}.get(key)
    if parts is not None and any(type(part) is not parts[0] for part in value):
        raise ConfigError(f"{key} is {value!r}, must be a list of {parts[1]}")
    plain_prompt(value)
    return value


def _as_chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
