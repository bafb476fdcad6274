"""Every key of every family's config.json, changed in turn: transformers' logits, or a refusal.

Which keys there are is asked of transformers: the fields of a family's config class, what its code
takes out of the rest, and every attribute that loading and running the model reads. Keys that a
family's code never reads may not change ours.
"""

import inspect
import json
import re
import shutil
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import TINY, expected_logits, random_prompts, tiny, transformers_model
from cut_model import TOLERANCE, Stages
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, modeling_rope_utils
from transformers.initialization import no_init_weights

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.weights import check_checkpoint
from pipeserve.stages.config.families import read_config
from pipeserve.stages.config.model_config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = (
    "llama", "mistral", "qwen2_window", "qwen3", "qwen3_moe", "mixtral", "phi3_window",
    "gemma2", "gemma3", "falcon_new", "falcon_multi_query", "falcon_rw", "opt",
)  # fmt: skip
LENGTH = 40  # over the windows of 19
MISSING = object()

# ---- what transformers makes of a changed config.json -------------------------------------------

LOADED = {"tie_word_embeddings", "quantization_config", "transformers_weights", "fusion_config"}
"""Keys that loading looks at; for the others the weights are poured into a model of the config."""


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint, what transformers makes of it, and the keys that it reads for that."""

    folder: Path
    raw: dict[str, Any]
    prompt: list[int]
    weights: dict[str, torch.Tensor]
    logits: torch.Tensor
    config: ModelConfig
    keys: set[str]
    """Of config.json, that may mean something."""
    read: dict[str, Any]
    """The attributes of its own config that transformers reads to load and to run, as they are."""


UNLIKE_THEMSELVES = {"name_or_path", "_name_or_path", "per_layer_config"}
"""The folder, and an object that is made anew each time; the key of that is refused."""


class Wrong(Exception):
    """What a changed key led to."""


class Undefined(Exception):
    """transformers refuses the file, or makes weights up that the checkpoint does not hold."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = {}

    def make(name: str) -> Model:
        if name not in made:
            made[name] = read_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def read_model(name: str, folder: Path) -> Model:
    tiny(name, folder)
    (prompt,) = random_prompts(str(folder), (LENGTH,))
    reads = set()
    plain = PreTrainedConfig.__getattribute__

    def traced(self, key):
        reads.add(key)
        return plain(self, key)

    try:
        PreTrainedConfig.__getattribute__ = traced
        logits = expected_logits(str(folder), prompt)
    finally:
        PreTrainedConfig.__getattribute__ = plain
    with safe_open(folder / "model.safetensors", "pt") as file:
        has_head = "lm_head.weight" in file.keys()  # noqa: SIM118
    weights = transformers_model(str(folder)).state_dict()
    if not has_head:
        del weights["lm_head.weight"]
    raw = json.loads((folder / "config.json").read_text())
    reads = {key for key in reads if not is_of_class(key)}
    config = AutoConfig.from_pretrained(folder)
    return Model(
        folder=folder,
        raw=raw,
        prompt=prompt,
        weights=weights,
        logits=logits,
        config=read_config(folder),
        keys=keys_of(type(config)) | reads,
        read={key: getattr(config, key, MISSING) for key in reads - UNLIKE_THEMSELVES},
    )


def is_of_class(key: str) -> bool:
    """Methods and what subclasses fix: no key of a file."""
    return key.startswith("__") or callable(getattr(PreTrainedConfig, key, None))


@cache
def keys_of(config_class: type) -> set[str]:
    """Fields of the class, other names for them, and what it takes out of the rest of the file."""
    keys = {field.name for field in fields(config_class)} | {*config_class.attribute_map}
    for base in config_class.__mro__:
        if base.__module__.startswith("transformers"):
            keys |= {*re.findall(r'kwargs\.(?:get|pop)\(\s*"(\w+)"', inspect.getsource(base))}
    return keys


@torch.inference_mode()
def theirs(folder: Path, model: Model, keys: set[str]) -> torch.Tensor:
    """transformers' logits. Raises Undefined. They are what they were where all that it reads is
    what it was."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if all(getattr(config, key, MISSING) == old for key, old in model.read.items()):
            return model.logits
        if keys & LOADED:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            made_up = info["missing_keys"]
        else:
            config.dtype = torch.float32
            with no_init_weights():
                loaded = AutoModelForCausalLM.from_config(config)
            made_up = set(loaded.load_state_dict(model.weights, strict=False).missing_keys)
            if config.tie_word_embeddings:
                loaded.tie_weights()
                made_up -= {"lm_head.weight"}
        logits = loaded.eval()(torch.tensor([model.prompt]), return_dict=True).logits[0]
    except Exception as error:  # whatever it raises
        raise Undefined(str(error)) from None
    if made_up or logits.shape != model.logits.shape:
        raise Undefined(str(made_up))
    return logits


# ---- what to change -----------------------------------------------------------------------------

ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0, "rope_theta": 500.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 8.0, "beta_slow": 2, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8, "factor": 3.0},
    {
        "type": "su",
        "short_factor": [1.5, 1.2, 1.1, 1.0],
        "long_factor": [2.0] * 4,
        "attention_factor": 1.3,
    },
    {"rope_type": "axial"},
    {"full_attention": {"rope_type": "linear", "factor": 4.0}, "sliding_attention": None},
    {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
    {
        "full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        "sliding_attention": {"rope_type": "default"},
    },
    {"full_attention": {"type": "yarn", "factor": 4.0}, "sliding_attention": {"rope_theta": 9.0}},
    {},
]
ACTIVATIONS = ["silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "x"]
KINDS = ["full_attention", "sliding_attention"]
LAYER_TYPES = [KINDS[:1] * 4, KINDS[1:] * 4, KINDS * 2, ["chunked_attention"] * 4, ["x"] * 4, [], 4]

VALUES: dict[str, list[Any]] = {
    "activation": ACTIVATIONS,
    "activation_function": ACTIVATIONS,
    "architectures": [["MistralForCausalLM"], ["LlamaForCausalLM"], ["LlamaModel"]],
    "attention_chunk_size": [8, 19],
    "attn_logit_softcapping": [5.0, 50],
    "bos_token_id": [5],
    "configuration_files": [["config.4.0.0.json"]],
    "decoder": [{"model_type": "llama"}],
    "dtype": ["bfloat16", "float16", "float64", "auto", "torch.bfloat16"],
    "eos_token_id": [[2, 3], 300],
    "ffn_hidden_size": [96, 192],
    "final_logit_softcapping": [3.0, 30],
    "fusion_config": [{"a": 1}],
    "generator": [{"model_type": "llama"}],
    "head_dim": [8, 16, 12, 7],
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "layer_types": LAYER_TYPES,
    "max_position_embeddings": [128, 255, 512],
    "max_window_layers": [0, 2, 4, -1, "2"],
    "mlp_only_layers": [[1], []],
    "model_type": ["llama", "mistral", "qwen2", "gemma", "unheard_of"],
    "n_embed": [48, 60],
    "num_attention_heads": [3, 6, 12],
    "num_kv_heads": [1, 2, 6],
    "num_ln_in_parallel_attn": [1, 2, 3],
    "num_key_value_heads": [1, 2, 3, 6],
    "original_max_position_embeddings": [64, 1024],
    "pad_token_id": [7],
    "partial_rotary_factor": [0.5, 1.0],
    "per_layer_config": [{"1": {"rms_norm_eps": 0.5}}],
    "problem_type": ["regression"],
    "quantization_config": [{"quant_method": "fp8"}],
    "query_pre_attn_scalar": [16, 48, 24.5],
    "rope_local_base_freq": [300.0],
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": [500.0, 500, "x"],
    "sliding_window": [19, 5, 300, 0],
    "sliding_window_pattern": [2, 3],
    "_sliding_window_pattern": [2],
    "text_config": [{"model_type": "llama"}],
    "torch_dtype": ["bfloat16"],
    "transformers_weights": ["other.safetensors"],
    "word_embed_proj_dim": [48, 32],
}
"""To change a key to; others are changed by the type of what they are."""

TOGETHER: list[dict[str, Any]] = [
    {"rope_scaling": ROPES[4], "rope_theta": 700.0},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": MISSING},
    {"rope_parameters": MISSING, "rope_theta": 700.0},
    {"rope_parameters": MISSING, "rope_scaling": ROPES[1], "rope_theta": 700.0},
    {"rope_parameters": ROPES[4], "original_max_position_embeddings": 32},
    {"rope_parameters": ROPES[11], "original_max_position_embeddings": 64},
    {"rope_scaling": ROPES[11], "original_max_position_embeddings": 64, "rope_theta": 700.0},
    {"rope_parameters": ROPES[17], "original_max_position_embeddings": 64},
    {"rope_parameters": ROPES[19], "original_max_position_embeddings": 64},
    {"rope_scaling": ROPES[18], "original_max_position_embeddings": 128, "rope_theta": 5e5},
    {"rope_parameters": ROPES[5], "partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5},
    {"rope_parameters": MISSING, "rope_scaling": ROPES[19], "partial_rotary_factor": 0.75},
    {"rope_parameters": MISSING, "rope_theta": 700.0, "rope_local_base_freq": 90.0},
    {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 19, "layer_types": KINDS * 2},
    {"use_sliding_window": True, "sliding_window": None, "layer_types": KINDS * 2},
    {"use_sliding_window": False, "sliding_window": 19, "layer_types": KINDS * 2},
    {"num_local_experts": 5, "num_experts": 3},
    {"num_local_experts": 3, "num_experts": 5},
    {"num_local_experts": MISSING, "num_experts": 5},
    {"dtype": MISSING, "torch_dtype": "float16"},
    {"dtype": "float32", "torch_dtype": "float16"},
    {"new_decoder_architecture": True, "num_kv_heads": 6, "parallel_attn": False},
    {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False},
    {"new_decoder_architecture": False, "num_ln_in_parallel_attn": 2},
    {"alibi": True, "rope_scaling": ROPES[4]},
    {"layer_types": MISSING, "sliding_window_pattern": 2},
    {"layer_types": MISSING, "sliding_window_pattern": MISSING},
    {"layer_types": MISSING, "_sliding_window_pattern": 2, "sliding_window_pattern": MISSING},
    {"layer_types": KINDS[:1] * 4, "sliding_window": None},
    {"hidden_size": 48, "n_embed": 48},
]
"""Old names beside new ones, and keys that mean something together only."""

FINE = {
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "output_attentions", "_output_attentions",
}  # fmt: skip
"""Which of its kernels transformers takes. They are to compute the same; where they do not (ALiBi
is added twice by Falcon's eager one), what it takes by itself is what holds."""


def values_for(key: str, old: Any) -> list[Any]:
    values = list(VALUES.get(key, by_type(old)))
    return [value for value in (*values, None, MISSING) if value is not old]


def by_type(old: Any) -> list[Any]:
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [old + 1, max(old // 2, 1)]
    if isinstance(old, float):
        return [old * 2 + 0.25]
    return [7] if old is None or old is MISSING else ["x"]


def test_each_key_has_values_to_change_to(model):
    """Of those that a family's code reads none is tried with a guess alone."""
    guessed = {key for name in MODELS for key in model(name).keys if key in VALUES}
    assert guessed >= {*VALUES} - {"configuration_files", "_sliding_window_pattern"}


# ---- ours ---------------------------------------------------------------------------------------


def ours(folder: Path, model: Model) -> torch.Tensor | None:
    """Logits; None where the config says what it said before. Raises ConfigError."""
    config = read_config(folder)
    if same(config, model.config):
        return None
    check_checkpoint(folder, config)
    return Stages(str(folder), (config.num_layers,), config=config).logits(model.prompt, LENGTH)


def same(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether both compute the same."""
    fine = {"dtype", "eos_token_ids", "max_position_embeddings"}
    return type(one) is type(other) and all(
        getattr(one, field.name) == getattr(other, field.name)
        for field in fields(one)
        if field.name not in fine
    )


CONTRADICTED = re.compile(r"has shape \(|has no tensor \S+, which its config|has a tensor \S+, wh")
"""How a refusal begins that names the tensor that the changed key contradicts."""


def check_changed(model: Model, folder: Path, changes: dict[str, Any], is_read: bool) -> None:
    raw = {k: v for k, v in {**model.raw, **changes}.items() if v is not MISSING}
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        got = ours(folder, model)
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
        named = {word for key, value in changes.items() for word in (key, *inner_keys(value))}
        if named & {"architectures", "model_type"}:
            named |= {"architecture", "model_type"}
        is_named = any(re.search(rf"\b{key}\b", message) for key in named)
        if not is_named and not CONTRADICTED.search(message):
            raise Wrong(f"not named: {message}") from None
        return
    if not is_read:
        if got is not None:
            raise Wrong("our model changes, and transformers does not read the key")
        return
    try:
        expected = theirs(folder, model, {*changes})
    except Undefined:
        return
    got = model.logits if got is None else got
    difference = (got - expected).abs().max()
    if not difference < TOLERANCE:
        raise Wrong(f"logits differ by {difference}")


def inner_keys(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    return [word for key, inner in value.items() for word in (key, *inner_keys(inner))]


@pytest.fixture
def folder(tmp_path, request, model):
    """With the checkpoint of the test's `name`, to change the config in."""
    made = model(request.getfixturevalue("name")).folder
    for file in made.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    shutil.copy(made / "config.json", tmp_path)
    transformers.logging.set_verbosity_error()
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_every_key_changed_in_turn(model, folder, name):
    changed = model(name)
    everywhere = set().union(*(model(other).keys for other in MODELS)) | {*VALUES}
    failures = []
    for key in sorted(everywhere - FINE):
        for value in values_for(key, changed.raw.get(key, MISSING)):
            if key in changed.raw or value is not MISSING:
                try:
                    check_changed(changed, folder, {key: value}, key in changed.keys)
                except Exception as error:
                    failures.append(f"{key}={value!r}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", MODELS)
def test_keys_changed_together(model, folder, name):
    failures = []
    for changes in TOGETHER:
        try:
            check_changed(model(name), folder, changes, is_read=True)
        except Exception as error:
            failures.append(f"{changes}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n".join(failures)


def test_every_key_of_a_rope_is_tried():
    tried = {word for rope in ROPES for word in inner_keys(rope)}
    assert tried >= {*modeling_rope_utils.RopeParameters.__annotations__} - {"mrope_section"}


def test_these_models_are_of_every_family():
    assert {TINY[name].family for name in MODELS} == {kind.family for kind in TINY.values()}
