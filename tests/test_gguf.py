"""GGUF files, made here as llama.cpp makes them, read by the real converter."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import tiny_llama
from fake_driver import _gpt2_bytes
from safetensors.torch import load_file

from pipeserve.errors import ConfigError
from pipeserve.stages.convert import convert
from pipeserve.stages.sources import convert_gguf, resolve
from pipeserve.tokenizer import Tokenizer

HEADS, KV_HEADS = 4, 2
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(
        tmp_path_factory.mktemp("model"),
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )


def write_gguf(path, folder, file_type, quantised=None, architecture="llama", more=None):
    """The checkpoint in `folder` as one GGUF file, its matrices as `quantised` or float32; `more`
    is called with the writer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config["hidden_size"] // HEADS)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(letter for _, letter in sorted(_gpt2_bytes())), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if more is not None:
        more(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _add(writer, name, tensor.float(), quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, name, tensor, quantised):
    """llama.cpp turns a head's pairs (i, i + half) of q and k into neighbours (2i, 2i + 1)."""
    for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if part in name:
            rows = tensor.unflatten(0, (heads, 2, -1))
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
    ours = name.removesuffix(".weight")
    if ours.startswith("model.layers."):
        _, _, layer, part = ours.split(".", 3)
        theirs = f"blk.{layer}.{TENSORS[part]}.weight"
    else:
        theirs = f"{TENSORS[ours]}.weight"
    data = tensor.numpy()
    if quantised is None or tensor.ndim == 1:
        writer.add_tensor(theirs, data)
    else:
        writer.add_tensor(theirs, gguf.quants.quantize(data, quantised), raw_dtype=quantised)


def dequantised(tensor, quantised):
    """What is left of a matrix after `quantised`."""
    if quantised is None or tensor.ndim == 1:
        return tensor
    packed = gguf.quants.quantize(tensor.numpy(), quantised)
    return torch.from_numpy(gguf.quants.dequantize(packed, quantised))


@pytest.mark.parametrize(
    ("file_type", "quantised", "dtype"),
    [
        (gguf.LlamaFileType.ALL_F32, None, torch.float32),
        (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0, torch.bfloat16),
    ],
    ids=["f32", "q8_0"],
)
def test_a_gguf_file_becomes_the_checkpoint_it_was_made_of(
    model, tmp_path, monkeypatch, file_type, quantised, dtype
):
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", Path(model), file_type, quantised)
    folder = resolve(str(file))
    original = load_file(Path(model) / "model.safetensors")
    made = load_file(folder / "model.safetensors")
    assert made.keys() == original.keys()
    for name, tensor in original.items():
        assert made[name].dtype == dtype
        assert torch.equal(made[name], dequantised(tensor, quantised).to(dtype)), name
    config = json.loads((folder / "config.json").read_text())
    wanted = json.loads((Path(model) / "config.json").read_text())
    for key in (
        "architectures",
        "vocab_size",
        "num_key_value_heads",
        "rope_parameters",
        "tie_word_embeddings",
    ):
        assert config[key] == wanted[key], key
    assert config["rms_norm_eps"] == pytest.approx(wanted["rms_norm_eps"])
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    assert Tokenizer(folder).encode("caf\u00e9 ab") == [*"caf\u00e9 ".encode(), 256]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_an_architecture_that_no_stage_is_of_is_refused(model, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", Path(model), 0, architecture="mamba")
    with pytest.raises(ConfigError, match=r"Mamba.* is not supported"):
        convert(file, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    ],
    ids=["llama3", "linear"],
)
def test_scaled_rope_is_refused_and_not_lost(model, tmp_path, more):
    file = write_gguf(tmp_path / "t.gguf", Path(model), 0, more=more)
    with pytest.raises(ConfigError, match=r"its rotary embedding is scaled \(.*rope.*safetensors"):
        convert(file, tmp_path / "out")


def test_rope_that_says_it_is_not_scaled(model, tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)

    file = write_gguf(tmp_path / "t.gguf", Path(model), 0, more=more)
    convert(file, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_truncated_gguf_file(model, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", Path(model), 0)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"cannot convert t\.gguf: ") as caught:
        convert_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
