"""The search of `pipeserve tune`, on evaluations that are made up."""

from random import Random

import pytest

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.errors import ConfigError
from pipeserve.profiling.search.tuning import (
    NUM_LAST,
    Candidate,
    Found,
    candidates,
    halve,
    layouts,
    merit,
    relieved,
)

FALCON, LLAMA = load_shape("falcon-180b"), load_shape("llama2-7b")
A100 = load_profile("a100-80gb-dgx")
SLO_S = 1.0
MANY = list(candidates(FALCON, [(1, 8), (2, 4)]))


def found(tokens_per_s, *, is_within=False, capacity=None, ttft_s=1.0, tbt_s=0.5):
    return Found(
        rate=1.0, output_tokens_per_s=tokens_per_s, ttft_p50_s=ttft_s, tbt_p99_s=tbt_s,
        is_within=is_within, capacity_rps=capacity,
    )  # fmt: skip


class Trials:
    """Three rounds that see each candidate's worth with less and less error."""

    def __init__(self, seed=0, cannot=()):
        worths = Random(seed)
        self.worth = {each: worths.uniform(1, 2) for each in MANY}
        self.asked = []
        self._errors = Random(seed)
        self._cannot = cannot

    def round(self, error, *, is_last=False):
        def evaluate(some):
            self.asked.append(list(some))
            results = []
            for each in some:
                worth = self.worth[each] * self._errors.uniform(1 - error, 1 + error)
                what = found(100 * worth, capacity=worth if is_last else None)
                results.append((each, None if each in self._cannot else what))
            return reversed(results)

        return evaluate

    def rounds(self):
        return [self.round(0.1), self.round(0.05), self.round(0, is_last=True)]


# ---- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_best_is_found_and_few_are_tried_long(seed):
    trials = Trials(seed)
    ranked = halve(MANY, trials.rounds(), SLO_S)
    first, second, last = trials.asked
    assert first == MANY and set(last) < set(second) < set(first)
    assert len(second) <= len(MANY) // 3 + 3 and len(last) <= NUM_LAST + 2
    best = sorted(MANY, key=trials.worth.get, reverse=True)
    assert ranked[0].candidate in best[:2]
    assert [each.candidate for each in ranked[: len(last)]] == sorted(
        last, key=trials.worth.get, reverse=True
    )


def test_all_are_ranked_once_and_those_that_came_farther_first():
    ranked = halve(MANY, Trials().rounds(), SLO_S)
    assert {each.candidate for each in ranked} == set(MANY) and len(ranked) == len(MANY)
    rounds = [each.round for each in ranked]
    assert rounds == sorted(rounds, reverse=True) and set(rounds) == {0, 1, 2}


def test_the_best_of_each_policy_comes_to_the_last_round():
    trials = Trials()
    for each in MANY:
        trials.worth[each] = 3.0 if each.policy == "uniform" else 1.0
    halve(MANY, trials.rounds(), SLO_S)
    assert {each.policy for each in trials.asked[-1]} == {each.policy for each in MANY}


def test_what_cannot_run_is_left_out():
    cannot = MANY[::2]
    trials = Trials(cannot=cannot)
    ranked = halve(MANY, trials.rounds(), SLO_S)
    assert {each.candidate for each in ranked} == set(MANY) - set(cannot)
    assert halve(MANY, Trials(cannot=MANY).rounds(), SLO_S) == []


def test_few_are_tried_once():
    trials = Trials()
    ranked = halve(MANY[:NUM_LAST], trials.rounds(), SLO_S)
    assert trials.asked == [MANY[:NUM_LAST]]
    assert {each.round for each in ranked} == {2}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (found(1, capacity=2.0, ttft_s=9), found(1, capacity=1.9)),
        (found(1, capacity=2.0, ttft_s=1), found(1, capacity=2.0, ttft_s=2)),
        (found(1, is_within=True, ttft_s=9), found(5)),
        (found(1, is_within=True, ttft_s=1), found(5, is_within=True, ttft_s=2)),
        (found(5, ttft_s=9), found(4)),
        (found(4), found(5, tbt_s=2.0)),
        (found(4, tbt_s=1.0), found(4, tbt_s=1.1)),
    ],
)
def test_what_is_better(better, worse):
    assert merit(better, SLO_S) > merit(worse, SLO_S)


# ---- candidates -------------------------------------------------------------------------------


def test_layouts_use_all_gpus_as_the_profile_allows():
    assert layouts(8, FALCON, A100) == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert layouts(7, FALCON, A100) == [(1, 7)]
    pairs = load_profile("nc96ads-a100-v4")  # all-reduces of 2, 4 and 8 are known
    assert layouts(16, FALCON, pairs) == [(1, 16), (2, 8), (4, 4), (8, 2)]


def test_no_layout_says_why():
    with pytest.raises(ConfigError, match=r"takes 97 GPUs; the last: .* has 232 attention heads"):
        layouts(97, FALCON, A100)


def test_a_relieved_head_gives_a_layer_to_the_stage_with_fewest():
    assert relieved(FALCON, 8) == [(11, 10, 10, 10, 10, 10, 10, 9)]
    assert relieved(LLAMA, 1) == []
    for num_stages in (2, 3, 5, 31, 32):
        for counts in relieved(LLAMA, num_stages):
            assert sum(counts) == 32 and min(counts) >= 1 and len(counts) == num_stages
    assert relieved(LLAMA, 32) == []


def test_candidates_are_all_combinations():
    found = list(candidates(LLAMA, [(1, 2), (2, 1)], {"uniform": (2048,), "vllm": (None,)}))
    assert len(found) == len(set(found)) == (2 * 2 + 2) * 2
    assert Candidate(1, 2, None, 3, "vllm", None) in found
    assert Candidate(1, 2, (17, 15), 2, "uniform", 2048) in found
    assert {(c.tensor_parallel_size, c.pipeline_window) for c in found} == {
        (1, 2), (1, 3), (2, 1), (2, 2),
    }  # fmt: skip
