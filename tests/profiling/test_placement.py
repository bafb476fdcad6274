"""Placement: candidates and memory as published, the search by hand, and a service simulated."""

from collections.abc import Sequence

import pytest
from published.distserve_latency import published_times

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import Microbatch
from pipeserve.errors import ConfigError
from pipeserve.profiling.search.goodput import Slo
from pipeserve.profiling.search.placement import (
    A100_80GB_BYTES,
    Cluster,
    Pair,
    Parallelism,
    instances,
    kv_capacity,
    pairs,
    place_apart,
    place_together,
)
from pipeserve.profiling.search.service import Service
from pipeserve.profiling.simulation.disaggregated import KvLink
from pipeserve.profiling.simulation.stage_times import ProfiledTimes, StageTimes

TINY = ModelShape(
    name="tiny",
    num_layers=4,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=256,
    vocab_size=1000,
    max_position_embeddings=512,
)
P11, P21, P12, P22, P14 = (
    Parallelism(*tp_pp) for tp_pp in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))
)


# ---- candidates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parallelism", "published"),
    [
        ("opt-13b", P11, 66144),
        ("opt-13b", P21, 163008),
        ("opt-13b", Parallelism(8, 8), 6168896),
        ("opt-66b", P12, 11600),
        ("opt-66b", P22, 78512),
        ("opt-66b", Parallelism(4, 1), 78496),
        ("opt-66b", Parallelism(8, 8), 2085696),
        ("opt-175b", Parallelism(3, 3), 76192),
        ("opt-175b", Parallelism(8, 8), 992400),
    ],
)
def test_kv_capacity_is_as_published(model: str, parallelism: Parallelism, published: int) -> None:
    """LLMServe/DistServe, max_num_tokens.csv."""
    capacity = kv_capacity(load_shape(model), parallelism, A100_80GB_BYTES)
    assert capacity == pytest.approx(published, rel=0.03)


def test_weights_that_do_not_fit_are_no_candidate() -> None:
    node = Cluster(num_nodes=1, gpus_per_node=8)
    shape = load_shape("opt-66b")
    assert kv_capacity(shape, P11, A100_80GB_BYTES) < 0
    assert P11 not in instances(shape, node)
    assert P12 in instances(shape, node)


def test_opt_13b_on_four_gpus_has_the_nine_published_pairs() -> None:
    found = pairs(load_shape("opt-13b"), Cluster(num_nodes=1, gpus_per_node=4))
    sizes = [(*prefill, *decode) for prefill, decode in found]
    assert sorted(sizes) == [
        *[(1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 1), (1, 2, 1, 1), (1, 2, 1, 2)],
        *[(1, 2, 2, 1), (2, 1, 1, 1), (2, 1, 1, 2), (2, 1, 2, 1)],
    ]
    assert [pair.num_gpus for pair in found] == sorted(pair.num_gpus for pair in found)


def test_sizes_divide_heads_and_layers_and_tensor_parallel_stays_in_a_node() -> None:
    found = instances(TINY, Cluster(num_nodes=3, gpus_per_node=2))
    assert {P11, P21, P12, P22, P14} == set(found)  # no 3 stages, no 6 GPUs, no TP4 over nodes


def test_a_pair_over_two_nodes_cuts_both_instances_in_two() -> None:
    found = pairs(TINY, Cluster(num_nodes=2, gpus_per_node=2))
    assert found == [Pair(P11, P11), Pair(P12, P12)]
    wide = pairs(TINY, Cluster(num_nodes=2, gpus_per_node=3))
    assert Pair(P22, P12) in wide  # TP2 beside TP1 on each of the two nodes
    assert Pair(P22, P11) not in wide  # 5 GPUs, but the decode instance cannot be cut


@pytest.mark.parametrize("wrong", [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_an_empty_cluster_is_refused(wrong: tuple) -> None:
    nodes, gpus, num_bytes = wrong
    with pytest.raises(ConfigError, match="must be over 0"):
        Cluster(num_nodes=nodes, gpus_per_node=gpus, bytes_per_gpu=num_bytes)


# ---- the search, with goodputs given ------------------------------------------------------------


def table(per_gpu: dict):
    """Answers as `Service` does: 0 for what does not beat the best so far."""
    return lambda candidate, beat: per_gpu[candidate] if per_gpu[candidate] > beat else 0.0


def test_algorithm_1_takes_the_best_of_each_and_replicates_it() -> None:
    prefill = table({P11: 1.0, P21: 3.0, P12: 2.0})
    decode = table({P11: 0.0, P21: 4.0, P12: 6.0})
    placed = place_apart([P11, P21, P12], prefill, decode, rate=20.0)
    assert (placed.prefill, placed.decode) == (P21, P12)
    assert placed.num_prefill == 4  # 6 requests/s each
    assert placed.num_decode == 2  # 12 requests/s each
    assert placed.num_gpus == 12
    assert placed.rate_per_gpu == pytest.approx(2.0)  # 20 of 6.67 GPUs and of 3.33


def test_algorithm_2_takes_the_best_pair_and_the_smaller_of_equals() -> None:
    small, large, weak = Pair(P21, P11), Pair(P22, P12), Pair(P11, P11)
    placed = place_together(
        [weak, small, large], table({weak: 0.5, small: 1.5, large: 1.5}), rate=9.0
    )
    assert (placed.prefill, placed.decode, placed.rate_per_gpu) == (P21, P11, 1.5)
    assert placed.num_prefill == placed.num_decode == 2
    assert placed.num_gpus == 6


def test_who_serves_nothing_is_not_placed() -> None:
    nothing, some = table({P11: 0.0}), table({P11: 1.0})
    assert place_apart([P11], some, nothing, rate=1.0) is None
    assert place_apart([P11], nothing, some, rate=1.0) is None
    assert place_together([], some, rate=1.0) is None


# ---- a service, simulated -----------------------------------------------------------------------


class Hundredths(StageTimes):
    """A prompt takes 0.1 s / TP on each stage, a decode step 0.01 s, alone or not."""

    control_s = 0.0

    def __init__(self, parallelism: Parallelism):
        self.parallelism = parallelism

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        has_prompt = any(chunk.start == 0 for chunk in microbatch.chunks)
        seconds = 0.1 / self.parallelism.tp if has_prompt else 0.01
        return (seconds,) * self.parallelism.pp

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return (0.0,) * (self.parallelism.pp - 1)


def toy(ttft_s: float, tpot_s: float, **changes) -> Service:
    given = {
        "shape": TINY,
        "lengths": [(64, 8)],
        "slo": Slo(ttft_s=ttft_s, tpot_s=tpot_s),
        "times": Hundredths,
        "bytes_per_gpu": 1e8,
        "num_requests": 60,
        "highest_per_gpu": 16.0,
        "resolution": 2.0,
    }
    return Service(**given | changes)


def test_a_target_that_only_a_wider_prefill_instance_meets_places_one() -> None:
    """TP1 takes 0.1 s for a prompt, over the target; TP2 0.05 s. Decode has no use for TP2, and of
    two stages each step takes 0.02 s, over its target."""
    service = toy(ttft_s=0.09, tpot_s=0.015)
    found = instances(TINY, Cluster(num_nodes=1, gpus_per_node=2))
    assert service.prefill_per_gpu(P11) == 0.0
    assert service.decode_per_gpu(P12) == 0.0
    placed = place_apart(found, service.prefill_per_gpu, service.decode_per_gpu, rate=1.0)
    assert (placed.prefill, placed.decode) == (P21, P11)
    both = pairs(TINY, Cluster(num_nodes=1, gpus_per_node=3))
    placed = place_together(both, service.pair_per_gpu, rate=1.0)
    assert (placed.prefill, placed.decode) == (P21, P11)


def test_a_target_that_nothing_meets_places_nothing() -> None:
    service = toy(ttft_s=0.04, tpot_s=0.015)
    found = pairs(TINY, Cluster(num_nodes=1, gpus_per_node=3))
    assert place_together(found, service.pair_per_gpu, rate=1.0) is None


def test_kv_over_a_slow_link_costs_goodput() -> None:
    """4 layers x 2 x 64 values x 2 bytes = 1,024 bytes a token: 65,536 of 64 tokens."""
    pair = Pair(P21, P11)
    assert toy(ttft_s=0.2, tpot_s=0.1).pair_per_gpu(pair) > 0
    slow = KvLink(bytes_per_s=65_536.0)  # 1 s for 7 tokens after the first
    assert toy(ttft_s=0.2, tpot_s=0.1, link=slow).pair_per_gpu(pair) == 0


def test_an_instance_without_room_for_the_longest_request_serves_nothing() -> None:
    num_bytes = TINY.num_parameters * 2 + 48 * TINY.kv_bytes_per_token
    service = toy(ttft_s=1.0, tpot_s=1.0, bytes_per_gpu=num_bytes)
    assert 16 <= kv_capacity(TINY, P11, num_bytes) < 64
    assert service.pair_per_gpu(Pair(P11, P11)) == 0


def test_the_same_search_gives_the_same_placement() -> None:
    first, second = (toy(0.2, 0.02).pair_per_gpu(Pair(P21, P11)) for _ in range(2))
    assert first == second > 0


def opt_13b(**changes) -> Service:
    given = {
        "shape": load_shape("opt-13b"),
        "lengths": [(512, 64)],
        "slo": Slo(ttft_s=0.2, tpot_s=0.1),
        "times": lambda p: published_times("distserve", "opt-13b", p.tp, p.pp),
        "num_requests": 60,
    }
    return Service(**given | changes)


def test_opt_13b_prefers_two_gpus_for_prefill_and_one_for_decode() -> None:
    """A prompt of 1,700 tokens takes 213 ms on one GPU, 218 on two stages, 140 on TP2."""
    found = [Pair(P11, P11), Pair(P21, P11), Pair(P11, P21), Pair(P12, P11)]
    service = opt_13b(lengths=[(300, 100), (1700, 40)])
    placed = place_together(found, service.pair_per_gpu, rate=4.0)
    assert (placed.prefill, placed.decode) == (P21, P11)


def test_times_from_a_device_profile_stand_in_the_same_place() -> None:
    shape, profile = load_shape("opt-13b"), load_profile("a100-80gb-dgx")

    def times(p: Parallelism) -> ProfiledTimes:
        return ProfiledTimes(profile, shape, split_layers(shape.num_layers, p.pp), p.tp)

    assert opt_13b(times=times).pair_per_gpu(Pair(P21, P11)) > 0.5
