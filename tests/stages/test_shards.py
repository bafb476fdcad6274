"""What each rank of a shared stage has of it: heads, rows, columns, bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, edit_config, tiny

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.stage import Stage
from pipeserve.stages.tensor_parallel.shard import WHOLE, Shard, heads_of

WIDE = {"hidden_size": 96, "num_attention_heads": 12, "vocab_size": 257}


class Config:
    """The heads of a model."""

    def __init__(self, num_heads, num_kv_heads):
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("of", [1, 2, 3, 4, 6, 12])
def test_every_query_head_is_once_and_beside_its_key(num_kv_heads, of):
    config, seen = Config(12, num_kv_heads), []
    for number in range(of):
        heads = heads_of(config, Shard(number, of))
        group = len(heads.queries) // len(heads.kv)
        assert group * len(heads.kv) == len(heads.queries)
        for place, query in enumerate(heads.queries):
            assert heads.kv[place // group] == query // (12 // num_kv_heads)
        seen += heads.queries
    assert seen == list(range(12))
    if num_kv_heads % of == 0:
        assert len(heads.kv) == num_kv_heads // of
    if of % num_kv_heads == 0:
        assert len(heads.kv) == 1


@pytest.mark.parametrize(("size", "of"), [(96, 4), (80, 3), (257, 4), (5, 4)])
def test_parts_are_all_of_it(size, of):
    parts = [Shard(number, of).part_of(size) for number in range(of)]
    assert [place for part in parts for place in part] == list(range(size))
    assert min(map(len, parts)) == size // of


def stage_of(folder, shard=WHOLE):
    return Stage(
        read_config(folder),
        first_layer=0,
        stop_layer=4,
        has_embedding=True,
        has_head=True,
        shard=shard,
    )


def read_by(stage, folder):
    """Bytes."""
    told = []
    load_weights(stage, folder, torch.float32, lambda num_read, num_bytes: told.append(num_read))
    return told[-1]


def of_all(stage):
    """Bytes of what every rank has: norms, routers, positions, what is narrower than the hidden
    size."""
    names = ("norm", "router", "positions", "projection")
    leaves = [m for name, m in stage.named_modules() if hasattr(m, "source") and name]
    named = [name for name, m in stage.named_modules() if hasattr(m, "source") and name]
    return sum(
        leaf.num_parameters * 4
        for name, leaf in zip(named, leaves, strict=True)
        if any(part in name for part in names)
    )


def of_kv_heads(stage, num):
    """Bytes of what makes the keys and values of so many heads."""
    products = [layer.attention.qkv for layer in stage.layers]
    size = stage.config.head_dim
    return sum(2 * num * size * (each.shape[1] + each.has_bias) * 4 for each in products)


@pytest.mark.parametrize("of", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon_new", "opt", "opt_post_norm", "phi3"])
def test_each_rank_reads_its_part_alone(name, of, tmp_path):
    """Over all ranks: the stage, and what is on several."""
    folder = tiny(name, tmp_path, **WIDE)
    whole = stage_of(folder)
    num_bytes, config = read_by(whole, folder), read_config(folder)
    assert num_bytes == whole.num_bytes
    everywhere, kv = of_all(whole), of_kv_heads(whole, config.num_kv_heads)
    read, shares = [], []
    for number in range(of):
        shard = Shard(number, of)
        part = stage_of(folder, shard)
        read.append(read_by(part, folder))
        assert read[-1] == part.num_bytes
        own_kv = of_kv_heads(whole, len(heads_of(config, shard).kv))
        shares.append((num_bytes - everywhere - kv) / of + everywhere + own_kv)
    assert sum(read) == pytest.approx(sum(shares), abs=1)
    assert read == pytest.approx(shares, rel=0.05)


def test_kv_is_of_the_ranks_heads(tmp_path):
    folder = tiny("llama", tmp_path, **WIDE, num_key_value_heads=4)
    sizes = {"block_size": 16, "dtype": torch.float32}
    whole = stage_of(folder).kv_block_bytes(**sizes)
    for number in range(2):
        assert stage_of(folder, Shard(number, 2)).kv_block_bytes(**sizes) == whole // 2


@pytest.mark.parametrize("name", TINY)
def test_sums_of_parts_are_the_products(name, tmp_path):
    """Of a first layer's first product and of the one behind it, by their weights."""
    folder = tiny(name, tmp_path, **WIDE)
    whole = stage_of(folder)
    load_weights(whole, folder, torch.float32)
    columns, attention = [], []
    for number in range(3):
        part = stage_of(folder, Shard(number, 3))
        load_weights(part, folder, torch.float32)
        attention.append(part.layers[0].attention)
        columns.append(attention[-1].out.weight)
    assert torch.equal(torch.cat(columns, 1), whole.layers[0].attention.out.weight)
    size = len(heads_of(read_config(folder), Shard(0, 3)).queries) * attention[0].head_dim
    queries = torch.cat([each.qkv.weight[:size] for each in attention])
    assert torch.equal(queries, whole.layers[0].attention.qkv.weight[: len(queries)])


@pytest.mark.parametrize(
    "name",
    [
        "model-rank-0-part-0.safetensors",
        "pytorch_model-00001-TP-000.safetensors",
        "rank0.safetensors",
    ],
)
def test_a_checkpoint_that_was_cut_already(tmp_path, name):
    """sglang#36438: one part of each of a checkpoint that was cut for 8 ranks was read, without a
    word."""
    folder = Path(tiny("llama", tmp_path))
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigError, match="has cut for its ranks") as caught:
        load_weights(stage_of(folder), folder, torch.float32)
    assert "\n" not in str(caught.value)


def test_tensors_of_half_the_size(tmp_path):
    folder = tiny("llama", tmp_path, intermediate_size=40)
    edit_config(folder, intermediate_size=80)
    with pytest.raises(ConfigError, match="cut for 2 tensor-parallel ranks"):
        load_weights(stage_of(folder), folder, torch.float32)


def test_a_rank_imports_of_megatron_what_it_uses():
    """cosmos-predict2#125: one import of `parallel_state` takes minutes where files come over a
    network, for all that comes with it. What is asked for later is there all the same."""
    code = """
import sys
import pipeserve.stages.tensor_parallel.layers
others = ("optimizer", "distributed", "inference", "transformer.attention", "extensions")
print([name for name in sys.modules if name in {f"megatron.core.{each}" for each in others}])
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
from megatron.core import parallel_state, package_info
from megatron.core.tensor_parallel import layers
print(layers.get_tensor_model_parallel_world_size is not None, package_info.__package_name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "True megatron_core"]
    assert not done.stderr  # megatron-core warns of what it could use, and is not there


def test_a_stage_that_one_rank_has_alone_imports_no_megatron(tmp_path):
    folder = tiny("llama", tmp_path)
    code = f"""
import sys, torch
from pipeserve.configs import make_config
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from local_fleet import LocalFleet
with Driver(checkpoint_setup(make_config({{}}, {{"model": {folder!r}}})), fleet=LocalFleet): pass
print([name for name in sys.modules if name.startswith(("megatron", "torch.distributed.tensor"))])
"""
    path = os.pathsep.join([str(Path(__file__).parent.parent / "support"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
