"""What config.json may say that makes no sense: one line each, before anything starts."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import edit_config, tiny

from pipeserve.errors import ConfigError
from pipeserve.stages.config.families import read_config

HUGE = 10**400  # a whole number, as JSON may have it, that is no float
LONGROPE = {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [2] * 4, "factor": 2}
WRONG = {
    "llama": [
        {"architectures": None},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"dtype": ["float32"]},
        {"rms_norm_eps": "1e-5"},
        {"rms_norm_eps": 0},
        {"tie_word_embeddings": "yes"},
        {"attention_bias": "no"},
        {"eos_token_id": "2"},
        {"eos_token_id": [2, "3"]},
        {"rope_parameters": ["default"]},
        {"rope_parameters": {"rope_type": ["default"]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_parameters": None, "rope_theta": "10000"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": HUGE}},
        {"rope_parameters": {"rope_type": "linear", "factor": HUGE}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 4}},
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 1}},
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 0.9}},
        {"rms_norm_eps": HUGE},
    ],
    "mistral": [{"sliding_window": 0}, {"sliding_window": "19"}],
    "qwen2_window": [
        {"use_sliding_window": 1},
        {"layer_types": ["sliding_attention"]},
        {"layer_types": ["chunked_attention"] * 4},
    ],
    "gemma2": [{"attn_logit_softcapping": 0}, {"query_pre_attn_scalar": "24"}],
    "gemma3": [{"rope_parameters": {"full_attention": "default"}}],
    "falcon_new": [{"alibi": "false"}, {"layer_norm_epsilon": -1}],
    "opt": [{"enable_bias": "true"}],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny(name, tmp_path_factory.mktemp(name)) for name in WRONG}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, each in WRONG.items() for changes in each],
    ids=lambda value: str(value)[:60],
)
def test_what_makes_no_sense(folders, tmp_path, name, changes):
    path = shutil.copy(Path(folders[name], "config.json"), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    assert ";" in message, "no remedy"


def test_ends_beyond_the_vocabulary_are_left_out(folders, tmp_path):
    """Of tokens that the tokenizer has and the model has not: banned before `min_tokens`, they
    would be looked for among logits that are not there."""
    shutil.copy(Path(folders["llama"], "config.json"), tmp_path)
    edit_config(tmp_path, eos_token_id=[2, 255, 256, -1])
    assert read_config(tmp_path).eos_token_ids == (2, 255)


def test_a_window_of_null_is_none(folders, tmp_path):
    shutil.copy(Path(folders["qwen2_window"], "config.json"), tmp_path)
    path = tmp_path / "config.json"
    changes = {"sliding_window": None, "layer_types": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert read_config(tmp_path).windows == ()
