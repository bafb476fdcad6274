"""What a model's generation_config.json says of sampling, by vLLM's rules.

Its parameters fill what a request leaves out (`ModelConfig.get_diff_sampling_param` of vLLM), and
its eos ends a request beside that of the tokenizer (`SamplingParams.update_from_generation_config`
there). With `generation_config` "vllm" the parameters are not taken, and eos is; with a folder both
are of the file in there. config.json says nothing of sampling, as in transformers 5.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.frontend.params import check_params
from pipeserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pipeserve.frontend.tokenizer import Tokenizer

_FILE = "generation_config.json"
_FIELD_OF = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""By its key there, the field here; no other key counts, `do_sample` too does not."""
_WHOLE = ("top_k", "max_tokens")


def default_params(config: RunConfig, model_folder: Path) -> SamplingParams:
    """What a request without parameters goes by. Raises ConfigError for a file that cannot be read
    or has a value that cannot be."""
    if config.generation_config == "vllm":
        return SamplingParams()
    path = _path(config, model_folder)
    values = _read(path)
    given = {
        field: _whole(values[key]) if field in _WHOLE else values[key]
        for key, field in _FIELD_OF.items()
        if values.get(key) is not None
    }
    try:
        return check_params(replace(SamplingParams(), **given))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; give --generation-config vllm") from None


def eos_token_ids(
    config: RunConfig, model_ids: Sequence[int], vocab_size: int, tokenizer: "Tokenizer"
) -> tuple[int, ...]:
    """Ids that end a request, in no order; `model_ids` are those of its config.json. Raises
    ConfigError as `default_params` does."""
    ids = tuple(model_ids)
    if config.generation_config not in ("auto", "vllm"):
        path = _path(config, tokenizer.folder)
        eos = _read(path).get("eos_token_id")
        ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if any(type(each) is not int for each in ids):
            raise ConfigError(f"{path}: eos_token_id is {eos!r}, must be token ids")
    own = tokenizer.eos_token_id
    if own is not None:
        ids = (*ids, own)
    return tuple({each for each in ids if 0 <= each < vocab_size})


def _path(config: RunConfig, model_folder: Path) -> Path:
    if config.generation_config in ("auto", "vllm"):
        return model_folder / _FILE
    path = Path(os.path.expanduser(config.generation_config)) / _FILE
    if not path.is_file():
        raise ConfigError(
            f"generation_config is {config.generation_config!r}, and there is no {path}; give "
            "auto, vllm, or a folder with such a file"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; fetch it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again")
    return values


def _whole(value: Any) -> Any:
    """50.0 as 50, as some files write a top_k."""
    return int(value) if type(value) is float and value.is_integer() else value
