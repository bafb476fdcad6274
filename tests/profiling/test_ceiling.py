"""The rate that no schedule can pass, against cases worked out by hand."""

from math import ceil

import pytest
from linear_times import LinearCost, LinearTimes

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.policies import get_policy
from pipeserve.core.work import work_of
from pipeserve.profiling.search.ceiling import ceiling, mix_of
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes

MIX = [(48, 17)]  # 3 of 4 tokens are prompt, the others decodes; a decode reads 56.5 positions


class Linear(StageTimes):
    """The second stage takes `base` and `per_token` for each token and `per_position` for each
    position that decodes read; the first one half of it."""

    def __init__(self, base=0.0, per_token=0.0, per_position=0.0, tile=1):
        self.base, self.per_token, self.per_position = base, per_token, per_position
        self.tile = tile

    def compute_s(self, microbatch):
        work = work_of(microbatch)
        tokens = ceil(work.num_tokens / self.tile) * self.tile
        seconds = self.base + self.per_token * tokens + self.per_position * work.context
        return [seconds / 2, seconds]


def ceiling_of(times, **changes):
    wanted = {"num_stages": 2, "slo_tbt_s": 1e9, "kv_positions": 10**9, "most_tokens": 480}
    return ceiling(times, MIX, **wanted | changes)


def test_means_of_a_workload():
    mix = mix_of([(100, 10), (20, 30)])
    # The first token of an output comes with the prompt.
    assert (mix.prompt, mix.decodes) == (60, 19)
    # Over prompt tokens: 100 of them have 50 before them on average, 20 have 10.
    assert mix.prompt_context == pytest.approx((100 * 50 + 20 * 10) / 120)
    # Over decodes: 9 read 101 to 109, and 29 read 21 to 49.
    assert mix.decode_context == pytest.approx((9 * 105 + 29 * 35) / 38)


def test_without_a_bound_the_largest_microbatch_is_best():
    found = ceiling_of(Linear(base=0.1, per_token=0.001))
    assert (found.num_tokens, found.bound) == (480, "none")
    assert found.microbatch_s == pytest.approx(0.58)
    assert found.rate == pytest.approx(480 / 64 / 0.58)
    assert found.stage_seconds == pytest.approx(1 / found.rate)


def test_the_limit_between_tokens_bounds_a_turn_of_all_stages():
    # Two stages: 0.25 s each, of which 0.1 are the base, so 150 tokens: 9 steps of 16.
    found = ceiling_of(Linear(base=0.1, per_token=0.001), slo_tbt_s=0.5)
    assert (found.num_tokens, found.bound) == (144, "slo")
    assert found.rate == pytest.approx(144 / 64 / 0.244)
    more = ceiling_of(Linear(base=0.1, per_token=0.001), slo_tbt_s=0.5, num_stages=4)
    assert more.num_tokens == 16  # 0.125 s


def test_kv_bounds_the_decodes_of_a_turn():
    # 2 * 56.5 positions for each decode of a microbatch: 4200 are 37.2 decodes, of 149 tokens.
    found = ceiling_of(Linear(base=0.1, per_token=0.001), kv_positions=4200)
    assert (found.num_tokens, found.bound) == (144, "kv")


def test_decodes_read_their_context():
    # 144 tokens are 36 decodes that read 56 positions each.
    found = ceiling_of(Linear(base=0.1, per_position=1e-4), kv_positions=4200)
    assert found.microbatch_s == pytest.approx(0.1 + 36 * 56 * 1e-4)


def test_prompt_tokens_have_their_mean_context_before_them():
    class Pairs(Linear):
        def compute_s(self, microbatch):
            ((before, tokens),) = work_of(microbatch).prefills
            return [1e-6 * (before + tokens / 2) * tokens]

    # 3 of 4 tokens are prompt, with 300 positions before them on average.
    found = ceiling(
        Pairs(), [(600, 201)], num_stages=1, slo_tbt_s=1e9, kv_positions=10**9, most_tokens=480
    )
    assert found.stage_seconds == pytest.approx(1e-6 * 300 * 600)


def test_outputs_of_one_token_hold_no_kv():
    times = Linear(base=0.1, per_token=0.001)
    found = ceiling(times, [(50, 1)], num_stages=2, slo_tbt_s=1e9, kv_positions=1, most_tokens=480)
    assert (found.num_tokens, found.bound) == (480, "none")
    assert found.rate == pytest.approx(480 / 50 / 0.58)


@pytest.mark.parametrize("lengths", [(40, 2), (100, 30)])
def test_no_schedule_passes_it_in_a_simulation(lengths):
    """Prompts in plenty at once, on stages that take so long for a token and nothing else: what is
    served a second comes close to the ceiling, and not beyond."""
    times = LinearTimes(2, base=0.0, per_token=1e-3)
    found = ceiling(times, [lengths], num_stages=2, slo_tbt_s=1e9, kv_positions=10**6)
    limits = Limits(
        num_blocks=6000, block_size=16, max_num_seqs=64, max_num_batched_tokens=256,
        max_model_len=512, enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(split_layers(2, 2), get_policy("uniform"), limits, LinearCost(times))
    simulation = Simulation(SimulatedPipeline(engine, times), 400 * [Arrival(0.0, *lengths)])
    simulation.run_until()
    rate = 400 / max(served.token_times_s[-1] for served in simulation.served)
    assert 0.93 * found.rate < rate <= found.rate * (1 + 1e-9)


def test_a_limit_that_no_microbatch_meets_gives_nothing():
    found = ceiling_of(Linear(base=1.0), slo_tbt_s=1.0)
    assert (found.rate, found.bound) == (0.0, "slo")
    found = ceiling_of(Linear(base=1.0), kv_positions=100)
    assert (found.rate, found.bound) == (0.0, "kv")


def test_sizes_between_whole_tiles_are_mixed_of_tiles():
    """Steps of 128 tokens, 0.1 s each, from 0.1 s on: whole tiles are the corners below."""
    times = Linear(base=0.1, per_token=0.1 / 128, tile=128)
    whole = ceiling_of(times, most_tokens=256)
    assert (whole.num_tokens, whole.microbatch_s) == (256, pytest.approx(0.3))
    # 0.25 s allow 192 tokens on average: as many microbatches of 128 as of 256.
    mixed = ceiling_of(times, most_tokens=256, slo_tbt_s=0.5 + 1e-9)
    assert (mixed.num_tokens, mixed.bound) == (192, "slo")
    assert mixed.microbatch_s == pytest.approx(0.25)
    assert mixed.rate == pytest.approx(192 / 64 / 0.25)


def test_equal_microbatches_are_worth_less_between_tiles():
    times = Linear(base=0.1, per_token=0.1 / 128, tile=128)
    # 0.25 s: 128 tokens take 0.2, 144 and more 0.3.
    even = ceiling_of(times, most_tokens=256, slo_tbt_s=0.5 + 1e-9, mixed=False)
    assert (even.num_tokens, even.bound) == (128, "slo")
    assert even.rate == pytest.approx(128 / 64 / 0.2)
    # At a whole tile, nothing is to be won by mixing.
    whole = [ceiling_of(times, slo_tbt_s=0.6 + 1e-9, mixed=mixed).rate for mixed in (False, True)]
    assert whole[0] == pytest.approx(whole[1])


def test_a_size_that_is_faster_than_smaller_ones_is_found():
    class Lucky(Linear):
        def compute_s(self, microbatch):
            return [0.4 if 200 < microbatch.num_tokens < 250 else 0.3]

    even = ceiling_of(Lucky(), slo_tbt_s=0.7, mixed=False)
    assert (even.num_tokens, even.bound) == (480, "none")


def test_where_larger_ones_are_dearer_the_best_is_in_between():
    class Steep(Linear):
        def compute_s(self, microbatch):
            # 0.1 + n / 1000 up to 256 tokens, and twice the slope beyond
            tokens = microbatch.num_tokens
            return [0.1 + tokens / 1000 + max(0, tokens - 256) / 100]

    found = ceiling_of(Steep())
    assert (found.num_tokens, found.bound) == (256, "none")
    assert found.rate == pytest.approx(256 / 64 / 0.356)


def test_more_of_anything_never_lowers_it():
    times = Linear(base=0.05, per_token=0.001, per_position=1e-6)
    for name, values in (
        ("slo_tbt_s", (0.2, 0.4, 1.0, 5.0)),
        ("kv_positions", (2000, 9000, 10**6)),
    ):
        rates = [ceiling_of(times, **{name: value}).rate for value in values]
        assert rates == sorted(rates) and rates[0] < rates[-1]
