"""The cost model: its formulae at points computed by hand, and its parts."""

import random
from dataclasses import replace
from math import exp, sqrt

import pytest
from microbatches import microbatch

from pipeserve.core.cost.device import AllReduce, DeviceProfile, Link, Residuals, check_profile
from pipeserve.core.cost.kernels import AttentionCost, Elementwise, Gemm, Kernels, Tables, products
from pipeserve.core.cost.partition import split_explicitly, split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.work import Work, work_of
from pipeserve.errors import ConfigError
from pipeserve.profiling.simulation.stage_times import ProfiledTimes

SHAPE = ModelShape(
    name="small",
    num_layers=4,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=1000,
    max_position_embeddings=2048,
)
GEMM = Gemm(
    flops_per_s=1e12,
    bytes_per_s=1e11,
    overhead_s=1e-6,
    norm=2.0,
    wave_share=0.25,
    ramp=0.0,
    num_processors=8,
)
ATTENTION = AttentionCost(
    prefill_overhead_s=1e-5,
    prefill_values_per_s=1e9,
    prefix_flops_per_s=4e12,
    causal_flops_per_s=2e12,
    query_tile=128,
    decode_overhead_s=2e-5,
    decode_sequence_s=1e-7,
    decode_bytes_per_s=1e9,
)
MOVE = Elementwise(overhead_s=1e-6, bytes_per_s=1e10)
PROFILE = DeviceProfile(
    name="toy",
    provenance={},
    memory_bytes=10**9,
    devices_per_node=4,
    attention=ATTENTION,
    intra_node=Link(alpha_s=1e-6, bytes_per_s=1e9),
    inter_node=Link(alpha_s=1e-5, bytes_per_s=1e8),
    kernels=Kernels(gemm=GEMM, norm=MOVE, rope=MOVE, activation=MOVE, add=MOVE, embedding=MOVE),
    all_reduce=(
        AllReduce(group=2, nodes=1, points=((1024, 1e-5), (4096, 4e-5))),
        AllReduce(group=8, nodes=2, points=((1024, 1e-3), (4096, 4e-3))),
    ),
)
TABLES = replace(
    PROFILE,
    kernels=None,
    tables=Tables(
        model="small",
        dtype="float32",
        threads=1,
        layer=((1, 1e-3), (11, 2e-3), (21, 4e-3)),
        head=((1, 5e-3), (5, 9e-3)),
        embedding=((1, 1e-4),),
    ),
)


# ---- formulae -----------------------------------------------------------------------------------


MIXTRAL = replace(SHAPE, num_experts=8, experts_per_token=2)


def test_experts_touched_by_hand_and_by_throwing_dice():
    assert MIXTRAL.experts_touched(0) == 0
    assert MIXTRAL.experts_touched(1) == 2
    assert MIXTRAL.experts_touched(2) == 2 + 2 * 6 / 8
    assert SHAPE.experts_touched(7) == 1
    dice = random.Random(0)
    for tokens in (4, 10, 30):
        thrown = [
            len({expert for _ in range(tokens) for expert in dice.sample(range(8), 2)})
            for _ in range(4000)
        ]
        assert sum(thrown) / len(thrown) == pytest.approx(MIXTRAL.experts_touched(tokens), rel=0.01)


def test_a_product_in_groups_by_hand():
    """Three experts take 100 rows each: a tile each of 128 rows, and the weights of three."""
    gemm = replace(GEMM, wave_share=0.0, overhead_s=0.0, norm=1.0)
    flops = 3 * 2 * 128 * 256 * 64
    moved = 2 * (300 * 64 + 3 * 64 * 256 + 300 * 256)
    seconds = gemm.seconds(300, 256, 64, groups=3)
    assert seconds == pytest.approx(flops / 1e12 + moved / 1e11, rel=1e-12)
    assert gemm.seconds(300, 256, 64, groups=1) == gemm.seconds(300, 256, 64)


@pytest.mark.parametrize("num_tokens", [1, 3, 200])
def test_a_layer_of_experts_by_hand(num_tokens):
    """Operations of the two that each token takes, weights of those that all tokens touch."""
    kernels, size = PROFILE.kernels, 2
    ops = dict(kernels.layer_ops(MIXTRAL, num_tokens))
    dense = dict(kernels.layer_ops(SHAPE, num_tokens))
    touched = 8 * (1 - 0.75**num_tokens)
    assert ops["mlp_up"] == GEMM.seconds(2 * num_tokens, 1024, 256, size, touched)
    assert ops["mlp_down"] == GEMM.seconds(2 * num_tokens, 256, 512, size, touched)
    assert ops["router"] == GEMM.seconds(num_tokens, 8, 256)
    assert ops["activation"] == MOVE.seconds(2 * num_tokens * size * 3 * 512)
    same = ("qkv", "attention_out", "norm", "rope", "add")
    assert [ops[name] for name in same] == [dense[name] for name in same]


def test_what_reading_experts_costs():
    """Bound by memory, a token reads two experts of eight, and a hundred all of them."""
    slow = replace(GEMM, bytes_per_s=1e6, overhead_s=0.0, norm=100.0)
    kernels = replace(PROFILE.kernels, gemm=slow)
    one, many = (dict(kernels.layer_ops(MIXTRAL, n))["mlp_down"] for n in (1, 100))
    read = 2 * 512 * 256 / 1e6
    assert one == pytest.approx(2 * read, rel=0.02)
    assert many == pytest.approx(8 * read, rel=0.16)


def test_more_experts_taken_than_there_are():
    with pytest.raises(ConfigError, match="experts_per_token is 9, and small has num_experts 8"):
        replace(MIXTRAL, experts_per_token=9)


def test_a_product_by_hand():
    """100 rows are one tile of 128; 256 columns two tiles, of 8 processors: a quarter of the time
    waits for all 8. 0.75 * 2 + 0.25 * 8 = 3.5 tiles of 2 * 128 * 128 * 64 flops."""
    arithmetic = 3.5 * 2 * 128 * 128 * 64 / 1e12
    memory = 2 * (100 * 64 + 64 * 256 + 100 * 256) / 1e11
    expected = sqrt(arithmetic**2 + memory**2) + 1e-6
    assert GEMM.seconds(100, 256, 64) == pytest.approx(expected, rel=1e-12)


def test_a_small_product_has_tiles_of_64_rows():
    small = replace(GEMM, bytes_per_s=1e30, wave_share=0.0, overhead_s=0.0, ramp=36.0)
    assert small.seconds(64, 128, 64) == pytest.approx(2 * 64 * 128 * 100 / 1e12)
    assert small.seconds(65, 128, 64) == pytest.approx(2 * 128 * 128 * 100 / 1e12)


def test_the_tile_step():
    """One row over a tile costs a tile; more rows within it cost only their bytes."""
    arithmetic = replace(GEMM, bytes_per_s=1e30)
    at = {rows: arithmetic.seconds(rows, 4096, 1024) for rows in (255, 256, 257, 384)}
    assert at[255] == at[256] < at[257] == at[384]
    assert (at[257] - 1e-6) / (at[256] - 1e-6) == pytest.approx(3 / 2)


@pytest.mark.parametrize(("size", "heads", "kv_heads", "ffn"), [(1, 4, 2, 512), (4, 1, 1, 128)])
def test_products_of_a_layer(size, heads, kv_heads, ffn):
    """KV heads are repeated when they run out."""
    assert products(SHAPE.shard(size)) == (
        ("qkv", (heads + 2 * kv_heads) * 64, 256),
        ("attention_out", 256, heads * 64),
        ("mlp_up", 2 * ffn, 256),
        ("mlp_down", 256, ffn),
    )


def test_attention_by_hand():
    """Width 256. A chunk of 100 after 50: 128 rows."""
    prefix, causal = 4 * 256 * 128 * 50 / 4e12, 2 * 256 * 128 * 128 / 2e12
    expected = 1e-5 + 256 * 100 / 1e9 + prefix + causal
    assert ATTENTION.prefill_s(SHAPE, 50, 100) == pytest.approx(expected)
    # 3 decodes, 600 positions of 2 * 2 heads * 64 values of 2 bytes.
    expected = 2e-5 + 3e-7 + 600 * 512 / 1e9
    assert ATTENTION.decode_s(SHAPE, 3, 600) == pytest.approx(expected)
    assert ATTENTION.decode_s(SHAPE, 0, 0) == 0


def test_all_reduce_between_below_and_beyond_its_points():
    table = PROFILE.all_reduce_of(2)
    assert table.seconds(10) == 1e-5
    assert table.seconds(1024) == 1e-5
    assert table.seconds(2048) == pytest.approx(2e-5)  # log-log: halfway in both
    assert table.seconds(4096) == pytest.approx(4e-5)
    assert table.seconds(8192) == pytest.approx(4e-5 + 4096 * 3e-5 / 3072)


def test_tables_between_below_and_beyond_their_points():
    tables = TABLES.tables
    seconds = [tables.layer_s(SHAPE, tokens) for tokens in (1, 6, 11, 16, 21, 31)]
    assert seconds == pytest.approx([1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3])
    assert tables.head_s(SHAPE, 0) == 0
    assert tables.head_s(SHAPE, 3) == pytest.approx(7e-3)
    assert tables.embedding_s(SHAPE, 500) == 1e-4
    falling = replace(tables, layer=((1, 3e-3), (2, 2e-3)))
    assert falling.layer_s(SHAPE, 1000) == 2e-3


# ---- a microbatch on its stages -----------------------------------------------------------------


def test_work_of():
    work = work_of(microbatch(prefills=[(0, 100), (64, 28)], decodes=[9, 19, 0]))
    assert work == Work(131, 5, ((0, 100), (64, 28)), 3, 10 + 20 + 1)
    assert work_of(microbatch(decodes=[4, 5])) == Work(2, 2, (), 2, 11)


def test_a_whole_prediction_by_hand():
    """Tables: a decode after 9 positions and a prefill of 5 after 20, 2 rows of logits."""
    cost = PipelineCost(replace(TABLES, host_s=1e-2), SHAPE, split_explicitly(4, 2, [1, 3]))
    prefill = 1e-5 + 256 * 5 / 1e9 + 4 * 256 * 128 * 20 / 4e12 + 2 * 256 * 128**2 / 2e12
    decode = 2e-5 + 1e-7 + 10 * 512 / 1e9
    layer = 1.5e-3 + prefill + decode
    predicted = cost.predict(microbatch(prefills=[(20, 5)], decodes=[9])).seconds
    assert predicted == pytest.approx([layer + 1e-4 + 1e-2, 3 * layer + 6e-3 + 1e-2])


@pytest.mark.parametrize("profile", [PROFILE, TABLES], ids=["kernels", "tables"])
def test_terms_add_up(profile):
    cost = PipelineCost(profile, SHAPE, split_layers(4, 2))
    mixed = microbatch(3, prefills=[(0, 200)], decodes=[100, 300])
    for seconds in (None, 1.0, 2.0):
        predicted = cost.predict(mixed).seconds
        terms = cost.breakdown(work_of(mixed))
        assert [sum(stage) for stage in terms] == pytest.approx(predicted)
        assert cost.seconds(work_of(mixed)) == predicted
        if seconds is not None:
            cost.observe(3, 1, seconds)
    assert terms[0].embedding > 0 == terms[0].head
    assert terms[1].head > 0 == terms[1].embedding


def test_more_work_takes_longer():
    cost = PipelineCost(PROFILE, SHAPE, split_layers(4, 2))

    def slowest(**work):
        return max(cost.predict(microbatch(**work)).seconds)

    assert slowest(decodes=[10]) < slowest(decodes=[10, 10]) < slowest(decodes=[10, 500])
    assert slowest(prefills=[(0, 64)]) < slowest(prefills=[(0, 200)]) < slowest(prefills=[(0, 600)])
    assert slowest(prefills=[(0, 128)]) < slowest(prefills=[(512, 128)])


def test_a_group_wider_than_a_node_takes_the_all_reduce_of_two():
    """8 devices, 4 a node. Two all-reduces a layer, one where attention and MLP are parallel."""
    work = Work(4, 1, ((0, 4),), 0, 0)  # 4 tokens * 256 * 2 bytes = 2048
    two = PipelineCost(PROFILE, SHAPE, split_layers(4, 1), 8).breakdown(work)[0]
    assert two.all_reduce == pytest.approx(4 * 2 * 2e-3)
    parallel = replace(SHAPE, parallel_attention=True)
    one = PipelineCost(PROFILE, parallel, split_layers(4, 1), 8).breakdown(work)[0]
    assert one.all_reduce == pytest.approx(4 * 2e-3)
    with pytest.raises(
        ConfigError, match="no all-reduce of 3 devices over 1 nodes; measured are 2"
    ):
        PipelineCost(PROFILE, SHAPE, split_layers(4, 1), 3)


def test_an_all_reduce_that_was_not_measured_goes_round_a_ring():
    """3 devices: each sends 2 * 2/3 of the message. Over several nodes nothing stands for it."""
    profile = replace(PROFILE, group_link=Link(alpha_s=1e-5, bytes_per_s=1e9))
    assert profile.all_reduce_of(2) is PROFILE.all_reduce[0]
    assert profile.all_reduce_of(3).seconds(3000) == pytest.approx(1e-5 + 4000 / 1e9)
    with pytest.raises(ConfigError, match="no all-reduce of 5 devices over 2 nodes"):
        profile.all_reduce_of(5)


def test_hops_know_where_a_node_ends():
    """1,000 tokens * 512 bytes. TP2 on nodes of 4: every second seam leads to another node."""
    inside, between = 1e-6 + 512e3 / 1e9, 1e-5 + 512e3 / 1e8
    cost = PipelineCost(PROFILE, SHAPE, split_layers(4, 4), 2)
    assert cost.hop_seconds(1000) == pytest.approx([inside, between, inside])
    assert PipelineCost(PROFILE, SHAPE, split_layers(4, 1)).hop_seconds(1000) == ()


def test_our_own_stages_hand_on_float32_whatever_the_weights_are():
    """1,000 tokens * 1,024 bytes: tables were measured on such stages, formulae elsewhere."""
    assert SHAPE.bytes_per_value == 2
    cost = PipelineCost(TABLES, SHAPE, split_layers(4, 2))
    assert cost.hop_seconds(1000) == pytest.approx([1e-6 + 1024e3 / 1e9])


# ---- profiles for something else ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "other"}, "is for device toy, not other"),
        ({"model": "other"}, "is for model small, not other"),
        ({"dtype": "bfloat16"}, "is for dtype float32, not bfloat16"),
        ({"threads": 2}, "is for threads 1, not 2"),
        ({"tensor_parallel_size": 2}, "is for tensor_parallel_size 1, not 2"),
    ],
)
def test_a_profile_for_something_else(asked, message):
    with pytest.raises(ConfigError, match=message):
        check_profile(TABLES, **asked)
    made_for = {"device": "toy", "model": "small", "dtype": "float32", "threads": 1}
    check_profile(TABLES, **made_for, tensor_parallel_size=1)


def test_a_table_of_another_model_is_refused_where_it_is_used():
    for use in (PipelineCost, ProfiledTimes):
        with pytest.raises(ConfigError, match="for model small, not other"):
            use(TABLES, replace(SHAPE, name="other"), split_layers(4, 2))
    PipelineCost(PROFILE, replace(SHAPE, name="other"), split_layers(4, 2))  # formulae: any model


def test_a_profile_has_kernels_or_tables():
    with pytest.raises(ConfigError, match="both kernels and tables, or neither"):
        replace(PROFILE, tables=TABLES.tables)
    with pytest.raises(ConfigError, match="sizes of its points must increase"):
        AllReduce(group=2, nodes=1, points=((5, 1.0), (5, 1.0)))


# ---- the simulator's ground truth ---------------------------------------------------------------

OFF = Residuals(
    linear=0.08, attention_prefill=0.07, attention_decode=0.1, all_reduce=0.05, jitter=0.01
)


def times(seed=0, residuals=OFF, profile=PROFILE) -> ProfiledTimes:
    return ProfiledTimes(replace(profile, residuals=residuals), SHAPE, split_layers(4, 2), 2, seed)


MIXED = [
    microbatch(index, prefills=[(64 * (index % 7), 40 + 90 * (index % 11))], decodes=[index, 900])
    for index in range(200)
]


def test_ground_truth_follows_from_the_seed_in_any_order():
    forward, backward = times(), times()
    first = [forward.compute_s(mixed) for mixed in MIXED]
    assert first == [backward.compute_s(mixed) for mixed in reversed(MIXED)][::-1]
    assert first != [times(seed=1).compute_s(mixed) for mixed in MIXED]


def test_without_residuals_it_is_the_prediction():
    exact, cost = times(residuals=Residuals()), PipelineCost(PROFILE, SHAPE, split_layers(4, 2), 2)
    for mixed in MIXED:
        assert exact.compute_s(mixed) == pytest.approx(cost.predict(mixed).seconds)
        assert exact.hop_s(mixed) == pytest.approx(cost.hop_seconds(mixed.num_tokens))


def test_it_is_off_by_about_the_residuals():
    """Over seeds: the spread of a microbatch of matrix products is below that of one product, and
    well above the jitter's."""
    cost = PipelineCost(PROFILE, SHAPE, split_layers(4, 2), 2)
    expected = cost.predict(MIXED[5]).seconds[0]
    ratios = [times(seed).compute_s(MIXED[5])[0] / expected for seed in range(300)]
    mean = sum(ratios) / len(ratios)
    spread = sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / len(ratios))
    assert mean == pytest.approx(1, abs=0.02)
    assert 0.015 < spread < 0.08


def test_jitter_alone():
    jittered = times(residuals=Residuals(jitter=0.05))
    same = microbatch(0, decodes=[100])
    logs = [jittered.compute_s(replace(same, index=index))[0] for index in range(2000)]
    mean = sum(logs) / len(logs)
    spread = sqrt(sum((seconds / mean - 1) ** 2 for seconds in logs) / len(logs))
    assert spread == pytest.approx(0.05, rel=0.1)
    assert max(logs) < mean * exp(6 * 0.05)
