"""KV blocks beside the weights, against numbers that papers print."""

from dataclasses import replace

import pytest

from pipeserve.configs import make_config
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.memory import kv_blocks_beside_weights, weight_bytes
from pipeserve.core.cost.partition import split_explicitly, split_layers
from pipeserve.errors import ConfigError
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.stages.tensor_parallel.shard import Shard, heads_of

A100 = 80e9


def requests_that_fit(name, num_stages, tensor_parallel_size, context):
    """Requests of `context` tokens at 90 % of an A100-80GB, each a block."""
    shape = load_shape(name)
    return kv_blocks_beside_weights(
        shape,
        split_layers(shape.num_layers, num_stages),
        tensor_parallel_size=tensor_parallel_size,
        device_bytes=0.9 * A100,
        block_size=context,
    )


def test_gpt3_holds_the_batches_that_sarathi_reports():
    """2308.16369, section 5.3: 11 with TP8; 27 in each of 8 microbatches with TP8 x PP8."""
    assert requests_that_fit("gpt3-175b", 1, 8, 4096) == 11
    assert requests_that_fit("gpt3-175b", 8, 8, 4096) // 8 == 27


def test_the_scarcest_stage_decides():
    shape = load_shape("llama2-7b")
    kwargs = {"tensor_parallel_size": 1, "device_bytes": 20e9, "block_size": 16}
    even = kv_blocks_beside_weights(shape, split_layers(32, 2), **kwargs)
    uneven = kv_blocks_beside_weights(shape, split_explicitly(32, 2, [24, 8]), **kwargs)
    weights = 24 * shape.num_layer_parameters * 2 + shape.num_head_parameters * 2
    assert uneven == (20e9 - weights) // (24 * 16 * shape.kv_bytes_per_token_per_layer)
    assert uneven < even


def test_a_stage_without_layers_limits_nothing():
    shape = load_shape("llama2-7b")
    kwargs = {"tensor_parallel_size": 1, "device_bytes": 40e9, "block_size": 16}
    with_empty = kv_blocks_beside_weights(shape, split_explicitly(32, 3, [16, 0, 16]), **kwargs)
    assert with_empty == kv_blocks_beside_weights(shape, split_layers(32, 2), **kwargs)


def test_tied_tables_count_once_where_they_meet():
    shape = load_shape("opt-13b")
    assert shape.tie_word_embeddings
    (alone,) = split_layers(40, 1).stages
    first, last = split_layers(40, 2).stages
    head = shape.num_head_parameters * 2
    assert (
        weight_bytes(shape, first) + weight_bytes(shape, last) == weight_bytes(shape, alone) + head
    )


def made_up(num_heads=12, num_kv_heads=4):
    """Numbers that most sizes do not divide."""
    return replace(
        load_shape("falcon-180b"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=80,
        vocab_size=1001,
    )


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "most"),
    [(12, 3, 4), (4, 2, 2), (1, 4, 1), (2, 4, 1), (4, 3, 4), (6, 4, 3), (2, 3, 2), (4, 6, 2)],
)
def test_a_rank_keeps_the_kv_heads_that_its_query_heads_read(num_kv_heads, size, most):
    """12 query heads over 4: 0-2 read the first, 3-5 the second; at TP 3 rank 0 has 0-3, and for
    each of them a KV head, for three read one and one another. Never none, as where KV heads are
    divided alone (PaddlePaddle/FastDeploy#3717)."""
    shard = made_up(num_kv_heads=num_kv_heads).shard(size)
    assert (shard.num_heads, shard.num_kv_heads) == (12 // size, most)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 6, 12])
def test_a_shard_is_the_most_that_any_real_rank_holds(num_kv_heads, size):
    """As stages are cut."""
    shape = made_up(num_kv_heads=num_kv_heads)
    ranks, shard = [Shard(number, size) for number in range(size)], shape.shard(size)
    heads = [heads_of(shape, rank) for rank in ranks]
    assert max(len(each.queries) for each in heads) == shard.num_heads
    assert max(len(each.kv) for each in heads) == shard.num_kv_heads
    assert max(len(rank.part_of(80)) for rank in ranks) == shard.intermediate_size
    assert max(len(rank.part_of_vocabulary(1001)) for rank in ranks) == shard.vocab_size


def test_kv_heads_are_kept_twice_when_there_are_fewer_than_devices():
    shape = replace(load_shape("falcon-180b"), num_heads=240)  # 8 KV heads
    whole = shape.kv_bytes_per_token_per_layer
    assert shape.shard(8).kv_bytes_per_token_per_layer == whole / 8
    assert shape.shard(16).kv_bytes_per_token_per_layer == whole / 8


def test_what_does_not_divide_is_rounded_up():
    """Only query heads have to divide, and no vocabulary (vllm-project/vllm#31474)."""
    shard = made_up().shard(3)
    assert (shard.intermediate_size, shard.vocab_size) == (27, 334)
    assert made_up().shard(1) == made_up()


def test_the_pool_is_sized_by_a_rank_s_heads():
    """By those of the whole model it would hold as many tokens however many ranks share them
    (huggingface/transformers#48566)."""
    flags = {
        "model": "llama2-7b",
        "device_profile": "a100-80gb-dgx",
        "kv_cache_memory_bytes": 1 << 30,
    }
    blocks = [
        simulated_run(make_config({}, {**flags, "tensor_parallel_size": size})).limits.num_blocks
        for size in (1, 2, 4)
    ]
    assert blocks == [128, 256, 512]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_their_share_of_a_model_that_divides(size):
    shape = load_shape("falcon-180b")
    for stage in split_layers(80, 2).stages:
        assert weight_bytes(shape.shard(size), stage) * size == weight_bytes(shape, stage)


def test_experts_are_cut_and_what_chooses_them_is_not():
    shape = load_shape("mixtral-8x7b")
    router = 8 * shape.hidden_size
    quarter = shape.shard(4)
    assert quarter.num_experts == 8
    assert (quarter.num_layer_parameters - router) * 4 == shape.num_layer_parameters - router


def test_all_experts_take_memory():
    """46.7 B parameters, not the 12.9 B that a token takes: not on one 80 GB GPU, but on two."""
    assert load_shape("mixtral-8x7b").num_parameters / 1e9 == pytest.approx(46.7, abs=0.05)
    with pytest.raises(ConfigError, match=r"stage 0 of mixtral-8x7b has 93.4 GB of weights"):
        requests_that_fit("mixtral-8x7b", 1, 1, 16)
    halves = weight_bytes(load_shape("mixtral-8x7b"), split_layers(32, 2).stages[0])
    assert requests_that_fit("mixtral-8x7b", 2, 1, 16) == (72e9 - halves) // (16 * 16 * 4096)


def test_weights_that_do_not_fit_are_one_clear_line():
    with pytest.raises(ConfigError, match=r"stage 0 of falcon-180b .* no room for KV; use more"):
        requests_that_fit("falcon-180b", 2, 1, 16)
