"""Weights: the right bytes and no others, and one clear line for every bad checkpoint."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, edit_config, expected_logits, tiny, tiny_llama
from cut_model import Stages, assert_close
from safetensors.torch import load_file, save_file

from pipeserve.errors import ConfigError
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.checkpoint.weights import check_checkpoint, load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

CUT = [(0, 1), (1, 1), (1, 4)]
"""Three stages of a model of four layers; the second holds none."""


def load(folder, first=0, stop=4, *, dtype=torch.float32, config=None, **options):
    config = config or read_config(folder)
    stage = Stage(
        config,
        first_layer=first,
        stop_layer=stop,
        has_embedding=first == 0,
        has_head=stop == config.num_layers,
    )
    load_weights(stage, folder, dtype, **options)
    return stage


def tensors_of(folder):
    """Every tensor of the checkpoint, read by safetensors itself."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def is_of_stage(name, first, stop, tied):
    """By the name alone: whether a stage of layers [first, stop) needs the tensor."""
    if name.startswith("model.layers."):
        return first <= int(name.split(".")[2]) < stop
    if name == "model.embed_tokens.weight":
        return first == 0 or (tied and stop == 4)
    assert name in ("model.norm.weight", "lm_head.weight")
    return stop == 4


def header_bytes(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


class Reads:
    """What is opened and read of safetensors files while it is installed."""

    def __init__(self, monkeypatch):
        self.names, self.data_bytes, self.other_bytes = {}, 0, 0
        self._open, self._preadv, self._pread = os.open, os.preadv, os.pread
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "preadv", self.preadv)
        monkeypatch.setattr(os, "pread", self.pread)

    def open(self, path, *args, **options):
        descriptor = self._open(path, *args, **options)
        self.names[descriptor] = Path(path).name
        return descriptor

    def preadv(self, descriptor, *args):
        got = self._preadv(descriptor, *args)
        self.data_bytes += got
        return got

    def pread(self, descriptor, *args):
        data = self._pread(descriptor, *args)
        self.other_bytes += len(data)
        return data


@pytest.mark.parametrize("shard_bytes", ["1GB", 40_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_reads_its_own_bytes_and_opens_its_own_shards(
    tmp_path, monkeypatch, shard_bytes, tied
):
    folder = tiny_llama(tmp_path, shard_bytes=shard_bytes, tie_word_embeddings=tied)
    tensors = tensors_of(folder)
    for first, stop in CUT:
        own = [name for name in tensors if is_of_stage(name, first, stop, tied)]
        expected = sum(tensors[name].nbytes for name in own)
        reported = []
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            load(folder, first, stop, progress=lambda *n, to=reported: to.append(n))
        assert reads.data_bytes == expected
        assert reported[0] == (0, expected) and reported[-1] == (expected, expected)
        assert [read for read, _ in reported] == sorted({read for read, _ in reported})
        headers = sum(header_bytes(Path(folder, name)) for name in set(reads.names.values()))
        assert reads.other_bytes <= 2 * headers
        if shard_bytes != "1GB":
            index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
            shards = {index["weight_map"][name] for name in own}
            assert set(reads.names.values()) == shards
            assert shards < set(index["weight_map"].values()) or not own


@pytest.mark.parametrize("name", TINY)
def test_every_byte_is_read_once_by_the_stage_that_needs_it(tmp_path, name):
    """A tied table twice: by the first stage and, as the head, by the last."""
    folder = tiny(name, tmp_path)
    config = read_config(folder)
    tensors = tensors_of(folder)
    expected = sum(tensor.nbytes for tensor in tensors.values())
    if config.tie_word_embeddings:
        (table,) = (t for n, t in tensors.items() if "embed_tokens" in n or "word_embed" in n)
        expected += table.nbytes
    reported = []
    for first, stop in CUT:
        said = []
        load(folder, first, stop, progress=lambda *n, to=said: to.append(n))
        reported.append(said[-1])
    assert [sum(numbers) for numbers in zip(*reported, strict=True)] == [expected, expected]


def test_it_leaves_no_file_open(tmp_path):
    folder = tiny_llama(tmp_path / "model", shard_bytes=40_000)
    before = os.listdir("/proc/self/fd")
    load(folder)
    with pytest.raises(ConfigError):
        load(folder, config=read_config(tiny_llama(tmp_path / "b", mlp_bias=True)))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_as_torch_converts_them(tmp_path, monkeypatch, stored, dtype):
    """But for what stays in float32 whatever the run's dtype is: norms and the head."""
    monkeypatch.setattr(
        "pipeserve.stages.checkpoint.weights._PIECE_BYTES", 1000
    )  # many pieces a tensor
    folder = tiny_llama(tmp_path, attention_bias=True, mlp_bias=True)
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(folder).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stage = load(folder, dtype=dtype)
    norms = [norm for layer in stage.layers for norm in (layer.attention_norm, layer.mlp_norm)]
    kept = {*norms, stage.head.norm, stage.head.vocabulary}
    for leaf in stage.leaves():
        weight = torch.cat([tensors[f"{rows.name}.weight"] for rows in leaf.source])
        own = torch.float32 if leaf in kept else dtype
        assert leaf.weight.dtype == own
        assert torch.equal(leaf.weight, weight.to(own))
        if leaf.has_bias:
            bias = torch.cat([tensors[f"{rows.name}.bias"] for rows in leaf.source])
            assert torch.equal(leaf.bias, bias.to(own))
    assert stage.layers[3].mlp.down.bias is not None
    bytes_held = sum(
        w.nbytes for leaf in stage.leaves() for w in (leaf.weight, leaf.bias) if w is not None
    )
    assert stage.num_bytes == bytes_held


@pytest.mark.parametrize("name", ["falcon_new", "falcon_multi_query", "falcon_rw"])
def test_rows_of_a_fused_tensor_are_read_in_small_pieces(tmp_path, monkeypatch, name):
    """Pieces that end inside a row, and begin anywhere in the file."""
    folder = tiny(name, tmp_path)
    whole = load(folder).layers[0].attention.qkv.weight
    monkeypatch.setattr("pipeserve.stages.checkpoint.weights._PIECE_BYTES", 100)
    assert torch.equal(load(folder).layers[0].attention.qkv.weight, whole)
    fused = tensors_of(folder)["transformer.h.0.self_attention.query_key_value.weight"]
    assert sorted(whole.tolist()) == sorted(fused.tolist())


def test_a_checkpoint_of_the_model_without_its_head(tmp_path):
    """As some are saved: no tensor's name has the first part that the family's have."""
    folder = tiny("opt", tmp_path)
    expected = load(folder).head.vocabulary.weight
    tensors = {n.removeprefix("model."): t for n, t in tensors_of(folder).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    check_checkpoint(folder, read_config(folder))
    assert torch.equal(load(folder).head.vocabulary.weight, expected)


@pytest.mark.parametrize("rows", [0, 1, 16, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-5)])
def test_a_packed_linear_layer_is_the_plain_one(rows, with_bias, dtype, limit):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    backend = CpuBackend()
    packed = backend.place_matrix(weight.clone())
    if not packed.is_mkldnn:
        pytest.skip(f"oneDNN has no {dtype} on this CPU")
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with torch.inference_mode():
        got = backend.linear(x, packed, bias)
        torch.testing.assert_close(got.double(), exact, rtol=limit, atol=limit)
        for row in range(0, rows, 7):
            alone = backend.linear(x[row : row + 1], packed, bias)
            assert torch.equal(alone[0], got[row]), "depends on the rows beside it"


# ---- bad checkpoints ----------------------------------------------------------------------------


def refused(folder, *parts, **options):
    """Loading fails with one line that names each of `parts`; the part behind ';' is the remedy."""
    with pytest.raises(ConfigError) as caught:
        load(str(folder), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert "; " in message, f"no remedy: {message}"


def refused_by_name(folder, *parts):
    """As `refused`, by what can be known before anything starts."""
    with pytest.raises(ConfigError) as caught:
        check_checkpoint(folder, read_config(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, f"no remedy: {message}"
    for part in parts:
        assert part in message


def rewrite(folder, change):
    """Saves the checkpoint's tensors again after `change(tensors)`."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def single(tmp_path):
    tiny_llama(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tiny_llama(tmp_path, shard_bytes=40_000)
    return tmp_path


def test_a_missing_shard(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, victim.name, "No such file", "fetch")


def test_a_truncated_shard(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - 1)
    refused(sharded, victim.name, "truncated", "fetch")


def test_a_pointer_in_place_of_the_weights(single):
    """What a clone without Git LFS has."""
    (single / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refused(single, "model.safetensors", "Git LFS", "git lfs pull")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_truncated_header(single, size):
    os.truncate(single / "model.safetensors", size)
    refused(single, "model.safetensors", "truncated", "fetch")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "ours", "shape": [], "data_offsets": [8, 0]}}',
        b"[" * 10_000,
    ],
)
def test_a_header_that_makes_no_sense(single, header):
    """mlx#3363 and imp#1603 read what lies beside the tensors, or outside the file."""
    file = single / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(single, "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize("more", range(1, 8))
def test_tensors_may_lie_at_any_byte(single, more):
    """Behind a header of any length (safetensors#231, llama.cpp#18282, ComfyUI#12236, and
    vllm.cpp#2558: read as if they lay at multiples of their size)."""
    before = load(single)
    file = single / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * more
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    after = load(single)
    assert all(
        torch.equal(leaf.weight, other.weight)
        for leaf, other in zip(before.leaves(), after.leaves(), strict=True)
    )


def test_a_missing_tensor(single):
    rewrite(single, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(single, str(single), "model.layers.2.mlp.up_proj.weight")


def test_a_missing_bias(single):
    edit_config(single, mlp_bias=True)
    refused(single, "model.layers.0.mlp.gate_proj.bias")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (16, 40)),
        ("model.layers.1.self_attn.k_proj.weight", (17, 48)),
        ("model.layers.1.mlp.down_proj.weight", (48, 81)),
        ("model.norm.weight", (49,)),
        ("model.norm.weight", ()),
        ("model.norm.weight", (48, 1)),
        ("lm_head.weight", (255, 48)),
    ],
)
def test_a_wrong_shape(single, name, shape):
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(single, name, str(shape))


def test_a_wrong_bias_shape(tmp_path):
    tiny_llama(tmp_path, mlp_bias=True)
    name = "model.layers.0.mlp.down_proj.bias"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(47)}))
    refused(tmp_path, name, "(47,)", "(48,)")


def test_an_index_that_names_the_wrong_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj.weight"
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    index.write_text(json.dumps({"weight_map": {**weight_map, name: other}}))
    refused(sharded, other, name)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_a_corrupt_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json", "fetch")


@pytest.mark.parametrize("has_shards", [True, False])
def test_one_file_beside_an_index(sharded, has_shards, tmp_path_factory):
    """That of another model: transformers reads the one file."""
    other = Path(tiny_llama(tmp_path_factory.mktemp("other"), seed=1))
    if not has_shards:
        for shard in sharded.glob("model-*.safetensors"):
            shard.unlink()
    (other / "model.safetensors").rename(sharded / "model.safetensors")
    prompt = [5, 6, 7]
    assert_close(Stages(str(sharded)).logits(prompt, 3), expected_logits(str(sharded), prompt))


def test_a_dtype_that_is_not_ours(single):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(single, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(single, name, "F8_E4M3", "F32, F16, BF16")


def test_a_tensor_that_no_stage_needs_may_have_any_dtype(single):
    extra = torch.zeros(4, dtype=torch.int64)
    rewrite(single, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": extra}))
    load(str(single))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_reason(single, name):
    (single / "model.safetensors").rename(single / name)
    refused(single, "pickled", "can run code", "convert")


def test_a_folder_without_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, str(single), "no model.safetensors")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "config.json is missing", "give a Hugging Face model folder")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
def test_a_config_without_a_key(single, key):
    edit_config(single, **{key: None})
    refused(single, "config.json", repr(key))


@pytest.mark.parametrize("text", ["{", "", "[1]", "\xff"])
def test_a_corrupt_config(single, text):
    (single / "config.json").write_bytes(text.encode("latin-1"))
    refused(single, "config.json")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            ["BloomForCausalLM", "LlamaForCausalLM", "FalconForCausalLM", "OPTForCausalLM"],
        ),
        ({"num_attention_heads": 5, "head_dim": None}, ["hidden_size 48", "5 attention heads"]),
        ({"num_key_value_heads": 4}, ["6 attention heads", "4 kv heads"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'", "'short_factor'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"num_hidden_layers": "thirty"}, ["num_hidden_layers is 'thirty'", "whole number"]),
        ({"vocab_size": 0}, ["vocab_size is 0", "whole number"]),
        ({"architectures": None, "model_type": "gpt2"}, ["gpt2", "LlamaForCausalLM"]),
        ({"rope_parameters": {"rope_type": "axial"}}, ["'axial'", "default, dynamic, linear"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'factor'"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["'low_freq_factor'"]),
        ({"hidden_act": "quick_gelu"}, ["'quick_gelu'", "silu"]),
        ({"dtype": "int8"}, ["'int8'", "float32, bfloat16, float16"]),
        ({"quantization_config": {"bits": 4}}, ["quantised"]),
    ],
)
def test_what_is_not_supported(single, changes, parts):
    edit_config(single, **changes)
    refused(single, *parts)


def test_ids_that_end_a_text(single):
    assert read_config(single).eos_token_ids == (2,)
    (single / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(single).eos_token_ids == (2, 7)
    (single / "generation_config.json").unlink()
    edit_config(single, eos_token_id=None)
    assert read_config(single).eos_token_ids == ()


# ---- config.json and checkpoint contradict each other --------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_hidden_layers": 3}, ["model.layers.3."]),
        ({"num_hidden_layers": 5}, ["no tensor model.layers.4."]),
        ({"attention_bias": True}, ["no tensor model.layers.0.self_attn.q_proj.bias"]),
        ({"num_key_value_heads": 3}, ["k_proj.weight", "(16, 48)", "(24, 48)"]),
        ({"intermediate_size": 96}, ["gate_proj.weight", "(80, 48)", "(96, 48)"]),
        ({"head_dim": 16}, ["q_proj.weight", "(48, 48)", "(96, 48)"]),
        ({"vocab_size": 512}, ["embed_tokens.weight", "(256, 48)", "(512, 48)"]),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            ["no tensor model.layers.0.self_attn.q_proj.bias"],
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
            ["no tensor model.layers.0.self_attn.qkv_proj"],
        ),
    ],
)
def test_a_config_that_contradicts_its_tensors(single, changes, parts):
    edit_config(single, **changes)
    refused_by_name(single, *parts)


def test_a_bias_that_the_config_does_not_ask_for(tmp_path):
    tiny_llama(tmp_path, attention_bias=True)
    edit_config(tmp_path, attention_bias=False)
    refused_by_name(tmp_path, "has a tensor model.layers.", "_proj.bias", "does not ask for")


def test_queries_and_keys_of_each_other_s_size(single):
    """Together they are as long as they should be."""
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk"]
    rewrite(single, lambda t: t.update({names[0]: t[names[1]], names[1]: t[names[0]]}))
    refused(single, names[0], "(16, 48)", "(48, 48)")


def test_a_tensor_that_one_stage_alone_misses(sharded):
    """Named before anything starts, and by the stage itself."""
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.3.mlp.down_proj.weight"
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    refused_by_name(sharded, f"no tensor {name}")
    load(str(sharded), 0, 3)
    refused(sharded, f"no tensor {name}", first=3)


# ---- weights that are no numbers -----------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite(single, monkeypatch, name, stored, value):
    monkeypatch.setattr("pipeserve.stages.checkpoint.weights._PIECE_BYTES", 1000)

    def spoil(tensors):
        tensors.update({n: t.to(stored) for n, t in tensors.items()})
        tensors[name].view(-1)[-1] = value

    rewrite(single, spoil)
    refused(single, name, "NaN or infinity")
    load(str(single), 0, 3)


def test_both_infinities_are_found(single):
    """Their sum is no number, and neither is a way past the check."""
    name = "model.layers.0.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[name][0, :2] = torch.tensor([torch.inf, -torch.inf])

    rewrite(single, spoil)
    refused(single, name, "NaN or infinity")


def test_large_weights_are_not_taken_for_infinite(single):
    """Their sum overflows, none of them does."""
    rewrite(single, lambda t: t["lm_head.weight"].fill_(3e38))
    assert load(str(single)).head.vocabulary.weight.to_dense().max() > 1e38


def test_weights_too_large_for_the_dtype_are_named(single):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(single, lambda t: t[name].fill_(7e4))
    refused(single, name, "70000", "65504", "--dtype", dtype=torch.float16)


def test_a_head_may_be_larger_than_the_dtype(single):
    """It is held in float32, whatever the dtype."""
    rewrite(single, lambda t: t["lm_head.weight"].fill_(7e4))
    head = load(str(single), dtype=torch.float16).head
    assert head.vocabulary.weight.to_dense().max() == 7e4


# ---- adapters ------------------------------------------------------------------------------------


def test_an_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "adapter for org/base", "not a model", "merge")


def test_an_adapter_beside_a_config(single):
    """As some trainers leave it: config.json of the base model, weights of the adapter alone."""
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    (single / "adapter_config.json").write_text("{}")
    refused(single, "adapter alone", "merge")


def test_an_adapter_beside_a_whole_model(single):
    """Who leaves it there means it to be used."""
    (single / "adapter_config.json").write_text("{}")
    assert load(str(single))  # a left-over of training, without weights
    save_file({"x": torch.zeros(1)}, single / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"an adapter .* beside its model; merge"):
        check_checkpoint(single, read_config(single))


def test_a_folder_in_place_of_a_file(single):
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    refused(single, "model.safetensors is a folder, not a file")
