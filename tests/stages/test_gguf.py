"""GGUF files, made here as llama.cpp makes them, read by the real converter."""

import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import expected_logits, random_prompts, tiny
from cut_model import Stages, assert_close
from fake_client import _gpt2_bytes
from safetensors.torch import load_file

from pipeserve.errors import ConfigError
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.stages.checkpoint.convert import convert
from pipeserve.stages.checkpoint.sources import convert_gguf, resolve
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.stage import Stage
from pipeserve.stages.tensor_parallel.shard import Shard

# What the converter of transformers takes for granted where GGUF does not say it.
SIZES = {"vocab_size": 257, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
MORE = {"qwen3": {"head_dim": 128}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("model"))


def make(name, folder):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    return Path(tiny(name, folder, **SIZES, rope_parameters=rope, **MORE.get(name, {})))


def write_gguf(path, folder, architecture, *, file_type=0, quantised=None, more=None):
    """The checkpoint in `folder` as one GGUF file, its matrices as `quantised` or float32; `more`
    is called with the writer."""
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(letter for _, letter in sorted(_gpt2_bytes())), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if more is not None:
        more(writer)
    [kind] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if architecture == "llama":
            tensor = _interleaved(name, tensor, config)
        _add(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), tensor, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(name, tensor, config):
    """llama.cpp turns a head's pairs (i, i + half) of q and k into neighbours (2i, 2i + 1)."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            rows = tensor.unflatten(0, (config[heads], 2, -1))
            return rows.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _add(writer, name, tensor, quantised):
    data = tensor.float().numpy()
    if quantised is None or tensor.ndim == 1:
        writer.add_tensor(name, data)
    else:
        writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)


def dequantised(tensor, quantised):
    """What is left of a matrix after `quantised`."""
    if quantised is None or tensor.ndim == 1:
        return tensor
    packed = gguf.quants.quantize(tensor.numpy(), quantised)
    return torch.from_numpy(gguf.quants.dequantize(packed, quantised))


def assert_same(folder, original, dtype=torch.float32, quantised=None):
    """`folder` holds the checkpoint in `original`, after `quantised`, as `dtype`: every tensor bit
    by bit, and all that stages read of the config."""
    made, wanted = (load_file(each / "model.safetensors") for each in (folder, original))
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].dtype == dtype
        assert torch.equal(made[name], dequantised(tensor, quantised).to(dtype)), name
    config = read_config(original)
    single = float(np.float32(config.norm_eps))  # as GGUF keeps it
    config = replace(config, norm_eps=single, dtype=str(dtype).removeprefix("torch."))
    assert read_config(folder) == config


@pytest.mark.parametrize(
    ("file_type", "quantised", "dtype"),
    [
        (gguf.LlamaFileType.ALL_F32, None, torch.float32),
        (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0, torch.bfloat16),
    ],
    ids=["f32", "q8_0"],
)
def test_a_gguf_file_is_a_model(model, tmp_path, monkeypatch, file_type, quantised, dtype):
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, "llama", file_type=file_type, quantised=quantised)
    folder = resolve(str(file))
    assert_same(folder, model, dtype, quantised)
    for number in range(2):  # of two ranks that share a stage, each reads its part
        ends = {"has_embedding": True, "has_head": True}
        part = Stage(
            read_config(folder), first_layer=0, stop_layer=4, shard=Shard(number, 2), **ends
        )
        read = []
        load_weights(part, folder, dtype, lambda num_read, _, read=read: read.append(num_read))
        assert read[-1] == part.num_parameters * dtype.itemsize
    assert Tokenizer(folder).encode("caf\u00e9 ab") == [*"caf\u00e9 ".encode(), 256]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen3"])
def test_other_architectures(tmp_path, name):
    original = make(name, tmp_path / "model")
    file = write_gguf(tmp_path / "t.gguf", original, name.partition("_")[0])
    convert(file, tmp_path / "out")
    assert_same(tmp_path / "out", original)


@pytest.mark.parametrize(
    ("architecture", "rule", "words"),
    [
        ("llama", "smollm", ["a", "\u010a\u010a", "1", "2", "3", "4"]),
        ("qwen2", "smollm", ["a", "\u010a\u010a", "1", "2", "3", "4"]),
        ("llama", "gpt-2", ["a", "\u010a", "\u010a", "1234"]),
        ("qwen2", "qwen2", ["a", "\u010a\u010a", "1", "2", "3", "4"]),
    ],
)
def test_words_are_cut_by_the_file_s_rule(tmp_path, architecture, rule, words):
    """transformers took GPT-2's for SmolLM2, which so saw other tokens than it was trained on."""
    original = make(architecture, tmp_path / "model")
    file = write_gguf(
        tmp_path / "t.gguf", original, architecture, more=lambda w: w.add_tokenizer_pre(rule)
    )
    convert(file, tmp_path / "out")
    cut = Tokenizer(tmp_path / "out")._loaded.backend_tokenizer.pre_tokenizer
    assert [word for word, _ in cut.pre_tokenize_str("a\n\n1234")] == words


def test_the_end_of_a_turn_ends_a_text(model, tmp_path):
    """As in llama.cpp; the file's eos is that of the base model, often."""
    file = write_gguf(tmp_path / "t.gguf", model, "llama", more=lambda w: w.add_eot_token_id(7))
    convert(file, tmp_path / "out")
    assert read_config(tmp_path / "out").eos_token_ids == (2, 7)


@pytest.mark.parametrize("rule", ["deepseek-llm", "default"])
def test_a_rule_of_words_that_would_be_lost_is_refused(model, tmp_path, rule):
    file = write_gguf(tmp_path / "t.gguf", model, "llama", more=lambda w: w.add_tokenizer_pre(rule))
    with pytest.raises(
        ConfigError, match=rf"its tokenizer.ggml.pre \({rule}\) would be lost; give"
    ):
        convert(file, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("architecture", ["gemma2", "falcon", "mamba"])
def test_an_architecture_that_does_not_come_through(tmp_path, architecture):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=f"its architecture {architecture} .*safetensors folder"):
        convert(tmp_path / "t.gguf", tmp_path / "out")


LOST = {
    "expert_count": 8,
    "attention.sliding_window": 4096,
    "attention.scale": 0.5,
    "attention.logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.1,
    "embedding_scale": 12.0,
    "residual_scale": 0.2,
    "rope.scale_linear": 4.0,
    "rope.scaling.factor": 4.0,
    "rope.scaling.type": "linear",
    "leading_dense_block_count": 1,
    "field_of_the_future": 1,
}


def add_field(writer, name, value):
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](f"llama.{name}", value)


@pytest.mark.parametrize("name", LOST)
def test_a_field_that_would_be_lost_is_refused(model, tmp_path, name):
    file = write_gguf(
        tmp_path / "t.gguf", model, "llama", more=lambda writer: add_field(writer, name, LOST[name])
    )
    with pytest.raises(ConfigError, match=rf"its {name} \(\S+\) would be lost; give the model's"):
        convert(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "sizes", "field"),
    [
        ("qwen3", {"head_dim": 32}, "attention.key_length"),
        ("llama", {}, "attention.key_length"),
    ],
)
def test_a_head_of_another_size(tmp_path, name, sizes, field):
    """transformers takes 128 for every Qwen3, and no head that is rotated in part."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    folder = Path(tiny(name, tmp_path / "model", **SIZES, **sizes, rope_parameters=rope))

    def more(writer):
        if name == "llama":
            writer.kv_data[0]["llama.rope.dimension_count"].value = 8  # of 16

    file = write_gguf(tmp_path / "t.gguf", folder, name, more=more)
    with pytest.raises(ConfigError, match=rf"its {field} \(\d+\) would be taken for \d+; give"):
        convert(file, tmp_path / "out")


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_model_with_its_head_written_out(tmp_path, is_same):
    """llama.cpp#6578."""
    original = make("qwen2_tied", tmp_path / "model")
    table = load_file(original / "model.safetensors")["model.embed_tokens.weight"].numpy()
    head = table if is_same else table[::-1].copy()
    file = write_gguf(
        tmp_path / "t.gguf", original, "qwen2", more=lambda w: w.add_tensor("output.weight", head)
    )
    convert(file, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made["lm_head.weight"], torch.from_numpy(head))
    assert torch.equal(made["model.embed_tokens.weight"], torch.from_numpy(table))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float16)),
            "rope_freqs.weight is F16",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
            "40 tensors, its config asks for 39",
        ),
    ],
    ids=["frequencies of another type", "bias"],
)
def test_what_would_be_lost_is_refused(model, tmp_path, more, message):
    file = write_gguf(tmp_path / "t.gguf", model, "llama", more=more)
    with pytest.raises(ConfigError, match=f"{message}.*give the model's safetensors"):
        convert(file, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_rope_that_says_it_is_not_scaled(model, tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_expert_count(0)

    convert(write_gguf(tmp_path / "t.gguf", model, "llama", more=more), tmp_path / "out")
    assert_same(tmp_path / "out", model)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama3_factors(head_dim):
    """As llama.cpp's convert_hf_to_gguf.py computes them."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * LLAMA3["rope_theta"] ** (i / head_dim)
        turns = LLAMA3["original_max_position_embeddings"] / wavelength
        if turns > LLAMA3["high_freq_factor"]:
            factors.append(1.0)
        elif turns < LLAMA3["low_freq_factor"]:
            factors.append(LLAMA3["factor"])
        else:
            blend = (turns - LLAMA3["low_freq_factor"]) / 3.0
            factors.append(1 / ((1 - blend) / LLAMA3["factor"] + blend))
    return np.array(factors, np.float32)


def test_frequencies_of_llama_3(tmp_path):
    """Llama 3.1 and later keep in a tensor what config.json says as rope type "llama3"."""
    original = Path(tiny("llama", tmp_path / "model", **SIZES, rope_parameters=LLAMA3))
    factors = llama3_factors(16)
    assert len(set(factors)) > 3

    def more(writer):
        writer.add_tensor("rope_freqs.weight", factors)

    convert(write_gguf(tmp_path / "t.gguf", original, "llama", more=more), tmp_path / "out")
    (prompt,) = random_prompts(str(original), (100,))
    expected = expected_logits(str(original), prompt)
    assert_close(Stages(str(tmp_path / "out")).logits(prompt, 33), expected)
    assert_close(expected_logits(str(tmp_path / "out"), prompt), expected)
    config = read_config(tmp_path / "out")
    assert config.max_position_embeddings == 256


@pytest.mark.parametrize("count", [7, 9])
def test_frequencies_of_another_number(model, tmp_path, count):
    def more(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(count, np.float32))

    file = write_gguf(tmp_path / "t.gguf", model, "llama", more=more)
    with pytest.raises(ConfigError, match=f"lists {count} numbers, must list one for each of 8"):
        convert(file, tmp_path / "out")


@pytest.mark.parametrize("size", [40, 3000, 20000, -1])
def test_a_file_that_breaks_off(model, tmp_path, size):
    path = write_gguf(tmp_path / "whole.gguf", model, "llama")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"it breaks off or is damaged .*; fetch it again"):
        convert(path, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_errors_of_the_converter_are_one_line(model, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", model, "llama")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"cannot convert t\.gguf: it breaks off") as caught:
        convert_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    write_gguf(file, model, "llama", more=lambda writer: writer.add_expert_count(8))
    with pytest.raises(ConfigError, match=r"cannot convert t\.gguf: its expert_count .*hub id$"):
        convert_gguf(file, tmp_path / "out")
