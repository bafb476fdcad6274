"""Two pools with KV between them, goodput: worked by hand, and conservation at random."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.profiling.search.capacity import poisson_arrivals
from pipeserve.profiling.search.goodput import (
    Slo,
    attainment,
    find_goodput,
    meets,
    meets_separately,
)
from pipeserve.profiling.simulation.disaggregated import DisaggregatedSimulation, KvLink
from pipeserve.profiling.simulation.simulator import Arrival, Served, SimulatedPipeline
from pipeserve.profiling.simulation.stage_times import StageTimes

BLOCK = 4


class Fixed(StageTimes):
    """A stage takes 1 s for a microbatch with a prompt, 0.1 s for one of decodes only."""

    control_s = 0.0

    def __init__(self, num_stages: int = 1, prefill_s: float = 1.0, decode_s: float = 0.1):
        self.num_stages, self.prefill_s, self.decode_s = num_stages, prefill_s, decode_s

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        has_prompt = any(c.start == 0 for c in microbatch.chunks)
        return (self.prefill_s if has_prompt else self.decode_s,) * self.num_stages

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return (0.0,) * (self.num_stages - 1)


def pipeline(
    policy: str,
    *,
    num_tokens: int = 4096,
    batch_tokens: int = 256,
    max_model_len: int = 256,
    times: Fixed | None = None,
    order: str = "fcfs",
) -> SimulatedPipeline:
    """`num_tokens` is what its KV cache holds."""
    times = times or Fixed()
    limits = Limits(
        num_blocks=num_tokens // BLOCK,
        block_size=BLOCK,
        max_num_seqs=64,
        max_num_batched_tokens=batch_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        order=order,
    )
    engine = Engine(split_layers(8, times.num_stages), get_policy(policy), limits)
    return SimulatedPipeline(engine, times)


def prefill(**limits) -> SimulatedPipeline:
    return pipeline("vllm", **limits)


def decode(**limits) -> SimulatedPipeline:
    return pipeline("token_throttle", **limits)


def run(pools, arrivals, **link) -> list[Served]:
    simulation = DisaggregatedSimulation(*pools, arrivals, **link)
    simulation.run_until()
    return simulation.served


def times_of(served: list[Served]) -> list[list[float]]:
    return [pytest.approx(list(request.token_times_s)) for request in served]


# ---- the way of a request -----------------------------------------------------------------------


def test_without_a_link_decoding_goes_on_at_once() -> None:
    served = run(([prefill()], [decode()]), [Arrival(0.0, 32, 4)])
    assert times_of(served) == [[1.0, 1.1, 1.2, 1.3]]


def test_kv_takes_a_delay_and_its_bytes_over_the_bandwidth() -> None:
    link = KvLink(alpha_s=0.25, bytes_per_s=64.0)
    served = run(([prefill()], [decode()]), [Arrival(0.0, 32, 3)], link=link, kv_bytes_per_token=3)
    assert times_of(served) == [[1.0, 1.0 + 0.25 + 1.5 + 0.1, 2.95]]


def test_requests_cross_one_link_in_turn_and_two_links_together() -> None:
    link = KvLink(alpha_s=2.0)
    two = [Arrival(0.0, 8, 2), Arrival(0.0, 8, 2)]
    assert times_of(run(([prefill()], [decode()]), two, link=link)) == [[1, 3.1], [1, 5.1]]
    assert times_of(run(([prefill()], [decode(), decode()]), two, link=link)) == [[1, 3.1]] * 2


def test_prefill_batches_what_waits_up_to_its_tokens() -> None:
    three = [Arrival(0.0, 128, 1)] * 3
    assert times_of(run(([prefill()], []), three)) == [[1], [1], [2]]


def test_a_new_request_goes_to_the_shortest_queue() -> None:
    alone = {"batch_tokens": 128, "max_model_len": 128}
    three = [Arrival(0.0, 100, 1), Arrival(0.1, 100, 1), Arrival(0.2, 100, 1)]
    served = run(([prefill(**alone), prefill(**alone)], []), three)
    assert times_of(served) == [[1.0], [1.1], [2.0]]


def test_prefill_and_decode_do_not_disturb_each_other() -> None:
    arrivals = [Arrival(0.0, 8, 12), Arrival(1.05, 200, 2)]
    served = run(([prefill()], [decode()]), arrivals)
    assert times_of(served)[0] == [1 + 0.1 * n for n in range(12)]


def test_decodes_of_two_stages_cross_both() -> None:
    served = run(([prefill()], [decode(times=Fixed(2))]), [Arrival(0.0, 8, 3)])
    assert times_of(served) == [[1.0, 1.2, 1.4]]


# ---- room ---------------------------------------------------------------------------------------


def test_kv_stays_with_the_prefill_instance_until_it_is_pulled() -> None:
    """Room for one prompt: the second one runs when the first one's KV is across."""
    pools = [prefill(num_tokens=32)], [decode()]
    two = [Arrival(0.0, 32, 2), Arrival(0.0, 32, 2)]
    assert times_of(run(pools, two, link=KvLink(alpha_s=10.0))) == [[1, 11.1], [12, 22.1]]


def test_kv_is_pulled_only_when_the_decode_instance_has_room() -> None:
    """The decode instance holds one request, the prefill instance one prompt."""
    pools = [prefill(num_tokens=32)], [decode(num_tokens=40)]
    three = [Arrival(0.0, 32, 6)] * 3
    assert times_of(run(pools, three)) == [
        [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],  # ends at 1.5; the second was prefilled from 1 to 2
        [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
        [3.0, 3.1, 3.2, 3.3, 3.4, 3.5],
    ]
    slow = [prefill(num_tokens=32)], [decode(num_tokens=40, times=Fixed(decode_s=1.0))]
    assert times_of(run(slow, three)) == [
        [1, 2, 3, 4, 5, 6],  # its KV is pulled at 1, so the second prompt runs from 1 to 2,
        [2, 7, 8, 9, 10, 11],  # waits for room until 6, and keeps the third one out till then
        [7, 12, 13, 14, 15, 16],
    ]


@pytest.mark.parametrize(("order", "first"), [("fcfs", 1), ("priority", 2)])
def test_what_waits_for_room_in_either_pool_goes_in_order(order: str, first: int) -> None:
    arrivals = [Arrival(0.0, 100, 3, 0), Arrival(0.1, 100, 3, 9), Arrival(0.2, 100, 3, 5)]
    roomy, narrow = {"order": order}, {"order": order, "num_tokens": 160}
    last = {1: 2, 2: 1}[first]
    prefills = run(([prefill(**narrow)], [decode(**roomy)]), arrivals)
    assert prefills[first].token_times_s[0] < prefills[last].token_times_s[0]
    decodes = run(([prefill(**roomy)], [decode(**narrow)]), arrivals)
    assert decodes[first].token_times_s[1] < decodes[last].token_times_s[1]


def test_room_in_a_decode_instance_is_promised_once() -> None:
    """It has room for one, the prefill instance for two: the fourth prompt starts at 3, when the
    second one's KV is pulled, and not at 1, when both could have been."""
    pools = [prefill(num_tokens=64)], [decode(num_tokens=40, times=Fixed(decode_s=1.0))]
    assert times_of(run(pools, [Arrival(0.0, 32, 3)] * 4)) == [
        [1, 2, 3],
        [1, 4, 5],
        [2, 6, 7],
        [4, 8, 9],
    ]


def test_a_request_that_ended_is_no_load() -> None:
    """Each decode instance has room for one, and the second one is busy for 9 s from 1.5 on."""
    slow = Fixed(decode_s=1.0)
    decoders = [decode(num_tokens=40, times=slow), decode(num_tokens=40, times=slow)]
    arrivals = [Arrival(0, 30, 2), Arrival(0.5, 30, 10), Arrival(3, 30, 2), Arrival(6, 30, 2)]
    served = run(([prefill(), prefill()], decoders), arrivals)
    assert times_of(served)[::2] == [[1, 2], [4, 5]]
    assert times_of(served)[3] == [7, 8]


def test_a_request_of_one_token_gives_its_room_back() -> None:
    served = run(([prefill(num_tokens=32)], []), [Arrival(0.0, 32, 1)] * 3)
    assert times_of(served) == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("pools", "arrival"),
    [
        (([prefill(num_tokens=32)], [decode()]), Arrival(0.0, 33, 2)),
        (([prefill()], [decode(num_tokens=40)]), Arrival(0.0, 32, 10)),
        (([prefill()], [decode()]), Arrival(0.0, 250, 10)),
    ],
)
def test_what_can_never_fit_is_refused(pools, arrival: Arrival) -> None:
    with pytest.raises(CapacityError, match=r"the KV cache holds|the context of a decode"):
        run(pools, [arrival])


@pytest.mark.parametrize("link", [{"alpha_s": -1.0}, {"bytes_per_s": 0.0}])
def test_an_impossible_link_is_refused(link: dict) -> None:
    with pytest.raises(ConfigError, match="bandwidth over 0"):
        KvLink(**link)


# ---- nothing is lost ----------------------------------------------------------------------------


def random_pools(rng: Random) -> tuple[list[SimulatedPipeline], list[SimulatedPipeline]]:
    def times() -> Fixed:
        return Fixed(rng.choice([1, 2]), rng.uniform(0.1, 1), rng.uniform(0.01, 0.3))

    return (
        [
            prefill(num_tokens=rng.choice([64, 200]), times=times())
            for _ in range(rng.choice([1, 2]))
        ],
        [
            decode(num_tokens=rng.choice([104, 160]), times=times())
            for _ in range(rng.choice([1, 3]))
        ],
    )


def random_run(seed: int) -> tuple[list[Served], list[SimulatedPipeline], list[Arrival]]:
    rng = Random(seed)
    arrivals, now = [], 0.0
    for _ in range(60):
        now += rng.expovariate(4.0)
        arrivals.append(Arrival(now, rng.randint(1, 64), rng.randint(1, 40)))
    pools = random_pools(rng)
    link = KvLink(alpha_s=rng.choice([0.0, 0.2]), bytes_per_s=rng.choice([100.0, 1e9]))
    served = run(pools, arrivals, link=link, kv_bytes_per_token=2)
    return served, [*pools[0], *pools[1]], arrivals


@pytest.mark.parametrize("seed", range(12))
def test_every_request_ends_once_with_all_its_tokens(seed: int) -> None:
    served, pipelines, arrivals = random_run(seed)
    assert [request.arrival_s for request in served] == [a.arrival_s for a in arrivals]
    for request, arrival in zip(served, arrivals, strict=True):
        times = request.token_times_s
        assert len(times) == arrival.max_tokens
        assert arrival.arrival_s <= request.started_s < times[0]
        assert all(earlier < later for earlier, later in pairwise(times))
    for pipeline_ in pipelines:
        engine = pipeline_.engine
        assert not engine.has_work
        assert engine.num_free_blocks == engine.limits.num_blocks


def test_decode_instances_preempt_in_some_of_these_runs() -> None:
    assert any(p.engine.stats.preemptions for seed in range(12) for p in random_run(seed)[1])


def test_the_same_requests_give_the_same_times() -> None:
    first, second = (random_run(5)[0] for _ in range(2))
    assert [r.token_times_s for r in first] == [r.token_times_s for r in second]


def test_a_run_in_pieces_is_the_same_run() -> None:
    def simulation() -> DisaggregatedSimulation:
        arrivals = poisson_arrivals([(40, 6), (90, 12)], rate=2.0, seed=3)
        return DisaggregatedSimulation([prefill()], [decode()], arrivals)

    whole, pieces = simulation(), simulation()
    whole.run_until(30.0)
    for step in range(1, 31):
        pieces.run_until(float(step))
    assert [r.token_times_s for r in whole.served] == [r.token_times_s for r in pieces.served]


def test_waiting_for_prefill_follows_queueing_theory() -> None:
    """M/D/1: D + R D^2 / (2 (1 - R D)), DistServe's section 3.1."""
    alone = prefill(batch_tokens=101, max_model_len=101)
    rate, arrivals = 0.6, poisson_arrivals([(100, 1)], rate=0.6, seed=1)
    simulation = DisaggregatedSimulation([alone], [], arrivals)
    simulation.run_until(8_000.0)
    waits = [r.token_times_s[0] - r.arrival_s for r in simulation.served[:-20]]
    assert sum(waits) / len(waits) == pytest.approx(1 + rate / (2 * (1 - rate)), rel=0.05)


# ---- attainment and goodput ---------------------------------------------------------------------


def request(arrival_s: float, *token_times_s: float, max_tokens: int | None = None) -> Served:
    made = Served(8, max_tokens or len(token_times_s), arrival_s)
    made.token_times_s.extend(token_times_s)
    return made


def test_attainment_counts_each_target_and_both() -> None:
    requests = [
        request(0, 1, 2, 3),  # 1 s, 1 s a token: both
        request(0, 2.5, 3, 4),  # 2.5 s, 0.75 s
        request(5, 6, 7, 8.5),  # 1 s, 1.25 s
        request(5, 6),  # one token has no time between tokens
        request(0, 1, 2, max_tokens=3),  # not ended
        request(0, max_tokens=3),  # not begun
    ]
    slo = Slo(ttft_s=1.0, tpot_s=1.0)
    assert attainment(requests, slo) == (4 / 6, 3 / 6, 2 / 6)


def test_the_published_rule_passes_what_the_joint_one_does_not() -> None:
    """One request in ten is late at first, another one later: 80 % meet both."""
    slo = Slo(ttft_s=1.0, tpot_s=1.0, share=0.85)
    good = [request(0, 0.5, 1)] * 16
    late_first, late_later = [request(0, 5, 5.5)] * 2, [request(0, 0.5, 9)] * 2
    requests = good + late_first + late_later
    assert meets_separately(requests, slo)
    assert attainment(requests, slo).both == 0.8
    assert not meets_separately([*requests, *late_first], slo)


@pytest.mark.parametrize(
    "wrong", [{"ttft_s": 0.0}, {"tpot_s": -1.0}, {"share": 0.0}, {"share": 1.1}]
)
def test_an_slo_that_means_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Slo(**{"ttft_s": 1.0, "tpot_s": 1.0} | wrong)


class Asked:
    """Is met up to `limit`; remembers what it was asked."""

    def __init__(self, limit: float):
        self.limit = limit
        self.rates: list[float] = []

    def __call__(self, rate: float) -> bool:
        self.rates.append(rate)
        return rate <= self.limit


def test_goodput_is_the_highest_step_that_is_met() -> None:
    asked = Asked(1.6)
    assert find_goodput(asked, highest=5, resolution=0.25) == 1.5625
    assert asked.rates == [2.5, 1.25, 1.875, 1.5625, 1.71875]


def test_goodput_of_a_hopeless_slo_is_0_after_as_many_trials() -> None:
    asked = Asked(0.0)
    assert find_goodput(asked, highest=5, resolution=0.25) == 0.0
    assert len(asked.rates) == 5


def test_who_cannot_beat_the_best_is_asked_once() -> None:
    asked = Asked(1.6)
    assert find_goodput(asked, highest=5, resolution=0.25, beat=1.5625) == 0.0
    assert asked.rates == [1.71875]
    assert find_goodput(Asked(1.6), highest=5, resolution=0.25, beat=0.625) == 1.5625
    assert find_goodput(Asked(9), highest=5, resolution=0.25, beat=4.84375) == 0.0


@pytest.mark.parametrize(
    ("highest", "resolution"), [(0, 0.1), (5, 0), (5, 5), (float("inf"), 1), (5, float("nan"))]
)
def test_a_bracket_that_cannot_be_halved_is_refused(highest: float, resolution: float) -> None:
    with pytest.raises(ConfigError, match="searching up to"):
        find_goodput(Asked(1), highest, resolution)


def loaded(rate: float) -> DisaggregatedSimulation:
    arrivals = poisson_arrivals([(100, 11)], rate, seed=0)
    alone = prefill(batch_tokens=128, max_model_len=128)
    return DisaggregatedSimulation([alone], [decode(num_tokens=1024)], arrivals)


def test_goodput_of_a_simulation_lies_below_what_the_prefill_instance_can_do() -> None:
    def is_met(rate: float) -> bool:
        return meets(loaded(rate), Slo(ttft_s=4.0, tpot_s=0.2), 20, 200, rate)

    assert 0.3 < find_goodput(is_met, highest=2.0, resolution=0.1) < 1.0


@pytest.mark.parametrize("slo", [Slo(ttft_s=0.9, tpot_s=1.0), Slo(ttft_s=9.0, tpot_s=0.09)])
@pytest.mark.parametrize("rate", [0.01, 50.0])
def test_a_hopeless_slo_and_an_endless_load_end(slo: Slo, rate: float) -> None:
    assert not meets(loaded(rate), slo, 5, 50, rate)


def test_a_verdict_does_not_wait_for_requests_that_are_bad_already() -> None:
    """Serving all 55 prompts takes 55 s, in which 2,750 arrive; 0.9 s decide."""
    late = loaded(50.0)
    assert not meets(late, Slo(ttft_s=0.9, tpot_s=1.0), 5, 50, 50.0)
    assert len(late.served) < 400
    arrivals = poisson_arrivals([(100, 11)], rate=0.5, seed=0)
    stuck = DisaggregatedSimulation([prefill()], [decode(times=Fixed(decode_s=1e4))], arrivals)
    assert not meets(stuck, Slo(ttft_s=9.0, tpot_s=0.09), 0, 10, 0.5)
    assert len(stuck.served) < 50


def test_the_ramp_is_not_counted() -> None:
    """Five prompts come together and are run one by one, ten more in good time."""
    arrivals = [Arrival(0.0, 100, 1)] * 5 + [Arrival(10.0 + 2 * n, 100, 1) for n in range(10)]

    def simulation() -> DisaggregatedSimulation:
        return DisaggregatedSimulation([prefill(batch_tokens=101, max_model_len=101)], [], arrivals)

    slo = Slo(ttft_s=1.5, tpot_s=1.0)
    assert meets(simulation(), slo, 5, 10, rate=0.5)
    assert not meets(simulation(), slo, 0, 15, rate=0.5)


def test_a_run_with_too_few_requests_is_an_error() -> None:
    few = DisaggregatedSimulation([prefill()], [decode()], [Arrival(0.0, 8, 2)])
    with pytest.raises(ValueError, match="1 of 10 requests came"):
        meets(few, Slo(ttft_s=2.0, tpot_s=1.0), 0, 10, rate=1.0)
