"""How layers are split into stages."""

from itertools import combinations

import pytest

from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import (
    end_parts,
    parts_by_operations,
    plan_pipeline,
    split_by_time,
    split_explicitly,
    split_layers,
    usual_work,
)
from pipeserve.core.work import Work
from pipeserve.errors import ConfigError


def counts(plan):
    return [stage.num_layers for stage in plan.stages]


def split_with_ends(num_layers, num_stages, embedding_cost, head_cost):
    """With costs in layers."""
    return split_by_time(end_parts((1.0,) * num_layers, num_stages, embedding_cost, head_cost))


def bottleneck(split, embedding_cost, head_cost):
    loads = list(split)
    loads[0] += embedding_cost
    loads[-1] += head_cost
    return max(loads)


@pytest.mark.parametrize(
    ("num_layers", "num_stages"),
    [(layers, stages) for layers in (1, 2, 5, 9, 12) for stages in range(1, min(layers, 5) + 1)],
)
@pytest.mark.parametrize(("embedding", "head"), [(0, 0), (0, 1.7), (0.4, 2.0), (3.0, 0), (0, 30)])
def test_no_split_has_a_faster_slowest_stage(num_layers, num_stages, embedding, head):
    every_cut = combinations(range(1, num_layers), num_stages - 1)
    best = min(
        bottleneck(
            [b - a for a, b in zip((0, *cut), (*cut, num_layers), strict=True)], embedding, head
        )
        for cut in every_cut
    )
    split = counts(split_with_ends(num_layers, num_stages, embedding, head))
    assert bottleneck(split, embedding, head) == pytest.approx(best)
    assert min(split) >= 1


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "head_cost", "expected"),
    [
        (30, 2, 0.0, [15, 15]),
        (30, 4, 0.0, [8, 8, 7, 7]),
        (30, 2, 4.0, [17, 13]),
        (7, 2, 0.0, [4, 3]),
        (3, 3, 9.0, [1, 1, 1]),
        (126, 8, 0.0, [16, 16, 16, 16, 16, 16, 15, 15]),
    ],
)
def test_known_splits(num_layers, num_stages, head_cost, expected):
    assert counts(split_with_ends(num_layers, num_stages, 0.0, head_cost)) == expected


def test_the_last_layer_counts_as_what_goes_on_in_it():
    """By hand, SmolLM2 of 576 over heads of 64, 512 tokens of which 85 sample: keys and values of
    3 heads for 427 tokens, all of the layer for the others, and its weights are read. Less of the
    layer leaves room for a further one beside a whole head."""
    shape = load_shape("smollm2-135m")
    keys_and_values = 2 * 3 * 64 * 576
    layer = keys_and_values + 2 * 576 * 576 + 3 * 576 * 1536
    *others, last = parts_by_operations(shape, 2, 512)[1].layer_s
    assert set(others) == {1.0} and len(others) == 29
    assert last == pytest.approx((93 * layer + 427 * keys_and_values) / (520 * layer))
    assert counts(plan_pipeline(shape, 2, None, 512)) == [15, 15]
    assert counts(split_with_ends(30, 2, 0.0, 1.44)) == [16, 14]


def test_the_window_is_one_microbatch_a_stage_unless_asked_for():
    shape = load_shape("falcon-180b")
    for counts in (None, [20, 20, 20, 20]):
        assert plan_pipeline(shape, 4, counts, 512).window == 4
        assert plan_pipeline(shape, 4, counts, 512, window=6).window == 6


def test_a_plan_is_whole():
    plan = split_layers(10, 4)
    assert plan.window == 4
    assert [stage.stage for stage in plan.stages] == [0, 1, 2, 3]
    assert [stage.ranks for stage in plan.stages] == [(0,), (1,), (2,), (3,)]
    assert [stage.has_embedding for stage in plan.stages] == [True, False, False, False]
    assert [stage.has_head for stage in plan.stages] == [False, False, False, True]
    borders = [(stage.first_layer, stage.stop_layer) for stage in plan.stages]
    assert borders == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_one_stage_has_both_ends():
    (stage,) = split_layers(3, 1).stages
    assert stage.has_embedding and stage.has_head


def test_a_listed_split_is_taken_as_it_is_even_with_empty_stages():
    plan = split_explicitly(6, 3, [0, 6, 0])
    assert counts(plan) == [0, 6, 0]
    assert plan.window == 3


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: split_layers(4, 5), "5 pipeline stages are more than the model's 4 layers"),
        (lambda: split_layers(4, 0), "0 pipeline stages: use at least 1"),
        (lambda: split_explicitly(4, 2, [2, 3]), "adds up to 5 layers, the model has 4"),
        (lambda: split_explicitly(4, 2, [4]), "is for 1 stages, not 2"),
        # One stage with fewer layers than the model runs without a word in NVIDIA/Megatron-LM#1778.
        (lambda: split_explicitly(20, 1, [1]), "adds up to 1 layers, the model has 20"),
        (lambda: split_explicitly(4, 2, [5, -1]), "has a negative number"),
        (lambda: split_explicitly(4, 0, []), "0 pipeline stages: use at least 1"),
    ],
)
def test_an_impossible_split_is_one_clear_line(split, message):
    with pytest.raises(ConfigError) as caught:
        split()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_tokens", "max_model_len", "work"),
    [
        (512, 8192, Work(512, 85, ((0, 427),), 85, 85 * 512)),
        (512, 256, Work(512, 85, ((0, 256), (0, 171)), 85, 85 * 128)),
        (1, 8192, Work(1, 1, (), 1, 512)),
        (2, 8192, Work(2, 2, (), 2, 1024)),
        (12, 2, Work(12, 2, ((0, 2),) * 5, 2, 2)),
    ],
)
def test_the_usual_microbatch_is_of_prompts_and_decodes(num_tokens, max_model_len, work):
    assert usual_work(num_tokens, max_model_len) == work
