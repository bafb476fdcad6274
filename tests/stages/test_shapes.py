"""Real models by shape, without a weight: parameters, bytes per stage, KV bytes per token.

Figures: the models' papers and model cards; transformers counts the same models on the meta device.
"""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import split_layers
from pipeserve.driver.shapes import find_shape, shape_of
from pipeserve.stages.attention.kv import KVCache
from pipeserve.stages.config.families import read_config
from pipeserve.stages.stage import Stage

_FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": True,
    "num_kv_heads": 8,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "vocab_size": 50272,
}


def _sizes(hidden_size, num_layers, num_heads, **more):
    counts = {"num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    return {"hidden_size": hidden_size, **counts, **more}


REAL = {
    "falcon-180b": {**_FALCON, **_sizes(14848, 80, 232)},
    "falcon-40b": {**_FALCON, **_sizes(8192, 60, 128)},
    "falcon-7b": {
        **_FALCON,
        **_sizes(4544, 32, 71, num_kv_heads=71, new_decoder_architecture=False),
    },
    "llama2-70b": {**_LLAMA, **_sizes(8192, 80, 64, intermediate_size=28672, vocab_size=32000)},
    "mistral-7b": {
        **_LLAMA,
        **_sizes(4096, 32, 32, intermediate_size=14336, vocab_size=32000),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "mixtral-8x7b": {
        **_LLAMA,
        **_sizes(4096, 32, 32, intermediate_size=14336, vocab_size=32000),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "yi-34b": {
        **_LLAMA,
        **_sizes(7168, 60, 56, intermediate_size=20480, vocab_size=64000, rope_theta=5000000.0),
    },
    "opt-13b": {**_OPT, **_sizes(5120, 40, 40, ffn_dim=20480, word_embed_proj_dim=5120)},
    "opt-66b": {**_OPT, **_sizes(9216, 64, 72, ffn_dim=36864, word_embed_proj_dim=9216)},
}
"""config.json as its publisher has it, where it decides anything; Mistral's is Instruct v0.2's."""
PUBLISHED = {
    "falcon-180b": (178.6, 163_840),
    "falcon-40b": (41.3, 122_880),
    "falcon-7b": (6.92, 8_192),
    "llama2-70b": (69.0, 327_680),
    "mistral-7b": (7.24, 131_072),
    "mixtral-8x7b": (46.7, 131_072),
    "yi-34b": (34.4, 245_760),
    "opt-13b": (12.9, 819_200),
    "opt-66b": (65.7, 2_359_296),
}
"""Billions of parameters, a tied head not counted again, and bytes of K and V a token in fp16."""


@pytest.fixture
def real(tmp_path):
    """name -> (folder, ModelConfig)"""

    def make(name):
        (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
        return tmp_path, read_config(tmp_path)

    return make


def make_stage(config, first_layer, stop_layer):
    return Stage(
        config,
        first_layer=first_layer,
        stop_layer=stop_layer,
        has_embedding=first_layer == 0,
        has_head=stop_layer == config.num_layers,
    )


def transformers_on_meta(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", REAL)
def test_parameters_are_those_of_transformers_and_of_the_papers(real, name):
    folder, config = real(name)
    billions, kv_bytes = PUBLISHED[name]
    stage = make_stage(config, 0, config.num_layers)
    table = config.vocab_size * config.hidden_size
    own = stage.num_parameters - config.tie_word_embeddings * table
    model = transformers_on_meta(folder)
    assert own == sum(parameter.numel() for parameter in model.parameters())
    assert own / 1e9 == pytest.approx(billions, rel=5e-3)
    of_token = KVCache.block_bytes(
        config, num_layers=config.num_layers, block_size=1, dtype=torch.float16
    )
    assert of_token == kv_bytes
    assert all(leaf.weight is None for leaf in stage.leaves())


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("num_stages", [2, 8])
def test_bytes_of_every_stage(real, name, num_stages):
    """Against transformers' own layers, norms and tables, cut at the same places."""
    folder, config = real(name)
    model = transformers_on_meta(folder)
    base = model.base_model.decoder if name.startswith("opt") else model.base_model
    layers = base.h if name.startswith("falcon") else base.layers

    def size(*modules):
        return 2 * sum(p.numel() for module in modules for p in module.parameters())

    layer_bytes = [size(layer) for layer in layers]
    before = [base.embed_positions] if name.startswith("opt") else []
    norm = {"falcon": "ln_f", "opt": "final_layer_norm"}.get(name.split("-")[0], "norm")
    for plan in split_layers(config.num_layers, num_stages).stages:
        expected = sum(layer_bytes[plan.first_layer : plan.stop_layer])
        if plan.has_embedding:
            expected += size(model.get_input_embeddings(), *before)
        if plan.has_head:
            expected += size(getattr(base, norm), model.get_output_embeddings())
        stage = make_stage(config, plan.first_layer, plan.stop_layer)
        assert 2 * stage.num_parameters == expected


def test_falcon_180b_over_eight_stages_by_hand(real):
    """Of a layer: Q, K, V of 232 + 2 x 8 heads of 64, the way out, up and down, two norms."""
    _, config = real("falcon-180b")
    size = 14848
    layer = (232 + 2 * 8) * 64 * size + size * size + 2 * size * 4 * size + 4 * size
    table = 65024 * size
    parameters = [make_stage(config, i, i + 10).num_parameters for i in range(0, 80, 10)]
    assert parameters == [10 * layer + table, *[10 * layer] * 6, 10 * layer + table + 2 * size]
    assert 2 * 10 * layer / 1e9 == pytest.approx(44.4, abs=0.01)


@pytest.mark.parametrize("name", sorted(set(REAL) - {"falcon-7b"}))
def test_the_catalogue_says_what_config_json_says(real, name):
    """But for Falcon's head, which the catalogue counts beside the embedding, as a pipeline of
    more than one stage holds it."""
    folder, config = real(name)
    ours, shipped = asdict(shape_of(config, name, "float16")), asdict(load_shape(name))
    if name.startswith("falcon"):
        assert ours.pop("tie_word_embeddings")
        shipped.pop("tie_word_embeddings")
    assert ours == shipped
    assert find_shape(str(folder), "auto").num_layers == config.num_layers


def test_a_window_that_no_position_leaves_is_none(real):
    folder, config = real("mistral-7b")
    assert config.windows == ()
    raw = {**REAL["mistral-7b"], "sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).windows == (4096,) * 32
    raw["sliding_window"] = 32768
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).windows == ()
    del raw["sliding_window"]  # then it is what transformers takes
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).windows == (4096,) * 32
