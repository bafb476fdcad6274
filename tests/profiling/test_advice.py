"""Advice against truths that it does not know: made-up times, recorded in the simulator. What is
advised is then done to the truth."""

import io
import json
from dataclasses import asdict, replace
from itertools import pairwise, product
from math import exp, inf
from random import Random
from statistics import median

import numpy as np
import pytest
from rich.console import Console

from pipeserve.configs.device_profiles import load_profile, save_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import split_explicitly, split_layers
from pipeserve.core.cost.rough import ROUGH_CPU
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Ended
from pipeserve.core.work import work_of
from pipeserve.errors import ConfigError
from pipeserve.launch import cli
from pipeserve.launch.verbs.advice import advice_report, print_advice
from pipeserve.launch.verbs.report import cost_maker
from pipeserve.profiling.advice.advice import Prediction, advise
from pipeserve.profiling.advice.changes import best_split, choices, stage_s, wishes
from pipeserve.profiling.advice.recorded_times import RecordedTimes, Tweak, fit, nearest, size_class
from pipeserve.profiling.advice.replay import load_of, recorded_figures, replay, setting_of
from pipeserve.profiling.ledger.step_parts import counts_of
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.recording.recording import recording_of
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes

LIMITS = Limits(
    num_blocks=4000,
    block_size=16,
    max_num_seqs=256,
    max_num_batched_tokens=512,
    max_model_len=2048,
    enable_prefix_caching=False,
)
EVEN = (8, 8, 8, 8)


class Truth(StageTimes):
    """Steps at every 64 tokens, attention, a head, a base that no layer has, jitter on each."""

    def __init__(
        self, layers, *, factors=None, jitter=0.03, head=4e-3, base=5e-4, sums=0.0, seed=0, **delays
    ):
        self.layers, self.factors = layers, factors or [1.0] * len(layers)
        self.jitter, self.head, self.base, self.seed = jitter, head, base, seed
        self.sums = sums
        self.control_s = delays.get("control", 1e-4)
        self.feedback_s = delays.get("feedback", 1.5e-4)
        self.planning_s = delays.get("planning", 2e-4)
        self.hop = delays.get("hop", 2e-4)

    def layer_s(self, work):
        tiles = -(-work.num_tokens // 64) * 64
        attention = sum([2e-8 * tokens * (start + tokens / 2) for start, tokens in work.prefills])
        decodes = 1.5e-5 * work.num_decodes + 2e-8 * work.context
        return 3e-4 + 2e-5 * tiles + attention + decodes

    def compute_s(self, microbatch):
        layer = self.layer_s(work_of(microbatch))
        draws = Random(f"{self.seed} {microbatch.index}")
        seconds = [
            factor * layers * layer * exp(draws.gauss(0, self.jitter))
            + self.base
            + layers * self.sums
            for layers, factor in zip(self.layers, self.factors, strict=True)
        ]
        seconds[-1] += self.head_s(microbatch)
        return seconds

    def head_s(self, microbatch):
        num_logits = work_of(microbatch).num_logits
        return self.head + 1e-4 * num_logits if num_logits else 0.0

    def all_reduce_s(self, microbatch):
        return [layers * self.sums for layers in self.layers]

    def hop_s(self, microbatch):
        return [self.hop + 1e-7 * microbatch.num_tokens] * (len(self.layers) - 1)


def requests(count, rate=None, seed=0, prompt=250, output=40):
    """By default all at once."""
    draws, now, found = Random(seed), 0.0, []
    for _ in range(count):
        lengths = (
            1 + int(draws.expovariate(1 / prompt)) % 1500,
            2 + int(draws.expovariate(1 / output)),
        )
        found.append(Arrival(now, *lengths))
        now += draws.expovariate(rate) if rate else 0.0
    return found


def recorded(layers, arrivals, policy="uniform", window=None, limits=LIMITS, **truth):
    """What a run on these true times tells of itself."""
    plan = split_explicitly(sum(layers), len(layers), layers)
    plan = replace(plan, window=window or plan.window)
    records = []
    engine = Engine(plan, get_policy(policy), limits)
    simulation = Simulation(
        SimulatedPipeline(engine, Truth(layers, **truth), records.append), arrivals
    )
    simulation.run_until()
    return recording_of(records, len(layers), meta_of(plan, policy, limits))


def meta_of(plan, policy, limits):
    """As a recording keeps it: made of what JSON has."""
    meta = {"plan": asdict(plan), "policy": policy, "limits": asdict(limits)}
    return json.loads(json.dumps({**meta, "config": {"num_gpu_blocks_override": None}}))


def tokens_per_s(recording):
    return recorded_figures(recording, load_of(recording, 10**9)).output_tokens_per_s


def done_to_truth(change, arrivals, **truth):
    """The tokens/s that a change of setting really gives."""
    setting = change.setting
    plan = setting.plan
    return tokens_per_s(
        recorded(setting.num_layers, arrivals, setting.policy, plan.window, setting.limits, **truth)
    )


@pytest.fixture(scope="module")
def uneven():
    return recorded((14, 6, 6, 6), requests(30, output=15))


@pytest.fixture(scope="module")
def advice(uneven):
    return advise(uneven)


# ---- what a recording says of times -------------------------------------------------------------


def test_times_are_found_again_in_a_recording():
    recording = recorded((12, 8, 6, 6), requests(60), jitter=0.0, factors=[1, 1, 1.5, 1])
    fitted, truth = fit(recording, (12, 8, 6, 6)), Truth((12, 8, 6, 6), jitter=0.0)
    assert fitted.factors == pytest.approx((1, 1, 1.5, 1), rel=0.03)
    assert fitted.head == pytest.approx((4e-3, 1e-4), rel=0.01)
    delays = fitted.delays
    assert all(hop == pytest.approx((2e-4, 1e-7), rel=0.01) for hop in delays.hops)
    assert delays.control_s == pytest.approx(1e-4, rel=0.01)
    assert delays.feedback_s == pytest.approx(1.5e-4, rel=0.01)
    assert delays.planning_s == pytest.approx(2e-4, rel=0.01)
    assert delays.own_s == pytest.approx((0, 0, 0, 0), abs=1e-6)
    works = [work_of(plan) for plan in recording.planned]
    mean = sum(map(truth.layer_s, works)) / len(works)
    # What a stage takes whatever its layers goes to them.
    assert fitted.layer_s(fitted.mean_counts) == pytest.approx(mean + truth.base / 8, rel=0.02)


def test_a_stage_that_never_waited_for_its_link_does_not_say_what_it_takes():
    """What came while it computed was stamped later."""
    recording = recorded((6, 6, 6, 14), requests(40), jitter=0.0)
    hops = fit(recording, (6, 6, 6, 14)).delays.hops
    assert hops[2] == pytest.approx((2e-4, 1e-7), rel=0.05)


def test_waiting_for_a_link_that_is_taken_is_not_its_time():
    recording = recorded((8, 8), requests(30), window=6, hop=0.1, jitter=0.0)
    delays = fit(recording, (8, 8)).delays
    assert delays.hops[0][0] == pytest.approx(0.1, rel=0.02)
    assert delays.own_s == pytest.approx((0, 0), abs=1e-6)


def test_feedback_is_seen_where_stage_0_waited_for_it():
    recording = recorded(EVEN, requests(3, output=60), feedback=5e-3)
    assert fit(recording, EVEN).delays.feedback_s == pytest.approx(5e-3, rel=0.01)


def test_what_a_stage_does_between_microbatches_counts_as_idle_and_takes_its_time():
    recording = recorded(EVEN, requests(40), jitter=0.0)
    pause = 2e-3  # of a compute that is recorded as shorter than it was
    recording.spans = [
        [span._replace(end_s=span.end_s - pause, head_s=span.head_s - pause) for span in of_stage]
        for of_stage in recording.spans
    ]
    fitted, setting = fit(recording, EVEN), setting_of(recording.meta)
    assert fitted.delays.own_s == pytest.approx([pause] * 4, rel=0.05)
    load = load_of(recording, 10**9)
    was, became = recorded_figures(recording, load), replay(setting, fitted, load)
    assert became.output_tokens_per_s == pytest.approx(was.output_tokens_per_s, rel=0.02)
    assert became.idle == pytest.approx(was.idle, abs=0.02)


def test_a_stage_whose_core_was_taken_is_no_slow_device():
    recording = recorded(EVEN, requests(40), jitter=0.0)
    spans = [s._replace(cpu_s=s.end_s - s.start_s) for s in recording.spans[1]]
    recording.spans[1] = [
        s._replace(head_s=s.head_s + 0.8 * s.cpu_s, end_s=s.end_s + 0.8 * s.cpu_s) for s in spans
    ]
    fitted = fit(recording, EVEN)
    assert fitted.factors == pytest.approx([1] * 4, rel=0.05)
    plan = recording.planned[0]
    seconds = RecordedTimes(fitted, EVEN).compute_s(Microbatch(plan.index, plan.chunks))
    assert seconds[1] == pytest.approx(1.8 * seconds[0], rel=0.05)


def test_a_microbatch_draws_jitter_of_its_size_and_the_same_in_every_replay():
    recording = recorded(EVEN, requests(60), jitter=0.2)
    fitted = fit(recording, EVEN)
    microbatches = recording.planned

    def seconds(seed=0, tweak=None):
        times = RecordedTimes(fitted, EVEN, tweak, seed)
        return [tuple(times.compute_s(_microbatch(plan))) for plan in microbatches]

    assert seconds() == seconds()
    assert seconds() != seconds(seed=1)
    calm = seconds(tweak=Tweak(jitter=False))
    truth = Truth(EVEN, jitter=0.0)
    ratios = [
        found[0] / truth.compute_s(_microbatch(plan))[0]
        for plan, found in zip(microbatches, calm, strict=True)
    ]
    assert median(ratios) == pytest.approx(1, abs=0.05)
    assert max(ratios) < 1.25
    for plan, found in zip(microbatches, calm, strict=True):
        work = work_of(plan)
        middle = np.median(nearest(fitted.ratios, size_class(work))[:, 0])
        expected = 8 * fitted.factors[0] * fitted.layer_s(counts_of(work)) * middle
        assert found[0] == pytest.approx(expected + fitted.delays.own_s[0])


def test_classes_stand_in_for_those_next_to_them_of_their_kind():
    def rows(value, count):
        return np.full((count, 2), float(value))

    ratios = {
        (3, False): rows(1, 20),
        (7, False): rows(2, 3),
        (8, False): rows(3, 6),
        (7, True): rows(4, 2),
    }
    assert set(nearest(ratios, (2, False))[:, 0]) == {1}
    assert set(nearest(ratios, (7, False))[:, 0]) == {2, 3}
    assert set(nearest(ratios, (3, True))[:, 0]) == {4}
    assert len(nearest({(3, False): rows(1, 2)}, (3, True))) == 2


def _microbatch(plan):
    return Microbatch(plan.index, plan.chunks)


def test_a_tweak_takes_away_what_it_names():
    recording = recorded((9, 8, 8, 7), requests(40), jitter=0.05)
    fitted = fit(recording, (9, 8, 8, 7))
    sampling = [plan for plan in recording.planned if plan.chunks[0].num_logits]
    plan = max(sampling, key=lambda plan: plan.chunks[0].stop - plan.chunks[0].start)

    def times(**tweak):
        return RecordedTimes(fitted, (9, 8, 8, 7), Tweak(**tweak))

    def compute_s(**tweak):
        return times(**tweak).compute_s(_microbatch(plan))

    plain = compute_s()
    head = times().head_s(_microbatch(plan))
    assert head > 0
    assert compute_s(head=0.0)[-1] == pytest.approx(plain[-1] - head)
    assert compute_s(speed={3: 2.0})[-1] == pytest.approx(plain[-1] / 2)
    level = compute_s(equal_stages=True)
    assert level[0] == level[1] == pytest.approx((sum(plain) - head) / 4)
    assert sum(compute_s(even=frozenset({1, 2}))) < sum(plain)
    assert times(link=0.5).hop_s(_microbatch(plan)) == pytest.approx(
        [seconds / 2 for seconds in times().hop_s(_microbatch(plan))]
    )
    assert (times(planning=0.0).planning_s, times(control=0.0).control_s) == (0, 0)
    assert times(feedback=0.0).feedback_s == 0 < times().feedback_s


# ---- a replay without a change ------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["uniform", "vllm", "token_throttle", "orca"])
def test_a_replay_comes_near_what_was_recorded(policy):
    whole = get_policy(policy).traits.whole_prompts
    limits = replace(LIMITS, max_num_batched_tokens=2048 if whole else 512)
    recording = recorded((10, 8, 8, 6), requests(60), policy, limits=limits, jitter=0.1)
    setting, load = setting_of(recording.meta), load_of(recording, 10**9)
    was = recorded_figures(recording, load)
    became = replay(setting, fit(recording, setting.num_layers), load)
    assert became.output_tokens_per_s == pytest.approx(was.output_tokens_per_s, rel=0.03)
    assert became.idle == pytest.approx(was.idle, abs=0.03)
    assert became.tbt_p99_s == pytest.approx(was.tbt_p99_s, rel=0.2)


def test_a_long_run_is_cut_and_its_beginning_compared():
    recording = recorded(EVEN, requests(80, rate=20.0))
    load = load_of(recording, 300)
    num_chunks = sum(len(p.chunks) for p in recording.planned if p.sent_s < load.stop_s)
    assert 250 < num_chunks <= 300
    assert len(load.arrivals) == sum(a.at_s <= load.stop_s for a in recording.arrived) < 80
    setting = setting_of(recording.meta)
    was = recorded_figures(recording, load)
    became = replay(setting, fit(recording, EVEN), load)
    assert became.output_tokens_per_s == pytest.approx(was.output_tokens_per_s, rel=0.1)
    assert load_of(recording, 10**9).stop_s == inf


def test_a_run_that_was_killed_is_replayed_up_to_its_end():
    recording = recorded(EVEN, requests(40))
    cut = recording.completed[len(recording.completed) // 2].done_s
    recording.completed = [c for c in recording.completed if c.done_s <= cut]
    recording.ended = [e for e in recording.ended if e.at_s <= cut]
    load = load_of(recording, 10**9)
    assert load.stop_s == cut and len(load.arrivals) == 40
    was = recorded_figures(recording, load)
    became = replay(setting_of(recording.meta), fit(recording, EVEN), load)
    assert became.output_tokens_per_s == pytest.approx(was.output_tokens_per_s, rel=0.05)


def test_requests_run_as_far_as_they_got():
    recording = recorded(EVEN, requests(20))
    first, second = recording.arrived[:2]
    recording.arrived[0] = first._replace(max_tokens=500)  # ended by a stop id
    place = [e.request_id for e in recording.ended].index(second.request_id)
    recording.ended[place] = Ended(second.request_id, 0.0, "abort", 0)
    load = load_of(recording, 10**9)
    reached = {e.request_id: e.num_output_tokens for e in recording.ended}
    assert load.arrivals[0].max_tokens == reached[first.request_id]
    assert len(load.arrivals) == 19


def test_prefixes_that_were_cached_are_cached_in_a_replay():
    recording = recorded(EVEN, [Arrival(0.0, 400, 8)] * 12, jitter=0.0)
    for place, plan in enumerate(recording.planned):
        chunks = [c for c in plan.chunks if c.request_id < 6 or c.start >= 256 or c.stop > 400]
        chunks = [
            c._replace(start=256) if c.request_id >= 6 and c.start < 256 < c.stop else c
            for c in chunks
        ]
        recording.planned[place] = plan._replace(chunks=tuple(chunks))
    load = load_of(recording, 10**9)
    assert load.num_cached[:6] == (0,) * 6
    assert min(load.num_cached[6:]) >= 256
    setting, fitted = setting_of(recording.meta), fit(recorded(EVEN, requests(40)), EVEN)
    cold = replay(setting, fitted, replace(load, num_cached=(0,) * 12))
    warm = replay(setting, fitted, load)
    assert warm.output_tokens_per_s > 1.1 * cold.output_tokens_per_s


# ---- advice -------------------------------------------------------------------------------------

MISTAKES = {
    "uneven split": ("layers", {"layers": (14, 6, 6, 6)}, {}),
    "slow device": ("layers", {"layers": EVEN}, {"factors": [1, 1.6, 1, 1]}),
    "window too small": ("window", {"layers": EVEN, "window": 1}, {}),
    "window too small to plan ahead": (
        "window",
        {"layers": EVEN, "window": 2, "policy": "sarathi_serve"},
        {},
    ),
    "prefill and decodes apart": ("policy", {"layers": EVEN, "policy": "chunked_only"}, {}),
    "one prefill at a time": ("policy", {"layers": EVEN, "policy": "sarathi"}, {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_first_suggestion_is_the_fix_and_gives_what_was_predicted(mistake):
    kind, run, truth = MISTAKES[mistake]
    arrivals = requests(40, prompt=400, output=12)
    recording = recorded(**run, arrivals=arrivals, **truth)
    first = advise(recording).suggestions[0]
    assert first.change.kind == kind
    before = tokens_per_s(recording)
    # The truth's jitter is another one in the run with the fix.
    gain = done_to_truth(first.change, arrivals, **truth, seed=1) / before - 1
    assert gain > 0.05
    assert first.tokens_gain == pytest.approx(gain, abs=0.05)
    assert first.output_tokens_per_s == pytest.approx(before * (1 + gain), rel=0.05)


@pytest.mark.parametrize(
    ("cause", "planted"),
    [
        ("link", {"hop": 4e-2}),
        ("token_feedback", {"feedback": 4e-2}),
        ("planning", {"planning": 2e-2}),
        ("head_and_sampling", {"head": 3e-2}),
        ("all_reduce", {"sums": 5e-4}),
    ],
)
def test_what_a_cause_is_worth_is_what_a_run_without_it_gives(cause, planted):
    arrivals = requests(24, prompt=60, output=60)
    recording = recorded(EVEN, arrivals, **planted)
    setting, load = setting_of(recording.meta), load_of(recording, 10**9)
    fitted = fit(recording, EVEN)
    wish = next(wish for wish in wishes(setting, fitted) if wish.kind == cause)
    before, after = (replay(setting, fitted, load, tweak) for tweak in (None, wish.tweak))
    worth = after.output_tokens_per_s / before.output_tokens_per_s - 1
    without = recorded(EVEN, arrivals, **dict.fromkeys(planted, 0.0), seed=1)
    gain = tokens_per_s(without) / tokens_per_s(recording) - 1
    assert gain > 0.1
    # The head's share for each logit goes too, and a link's for each token.
    assert worth == pytest.approx(gain, abs=0.05)


def test_requests_that_come_slowly_gain_no_tokens_from_anything():
    advice = advise(recorded(EVEN, requests(14, rate=0.4, output=12)))
    assert all(abs(p.tokens_gain) < 0.03 for p in advice.suggestions)
    worth = {p.change.kind: p for p in advice.worths}
    assert worth["no_requests"].tokens_gain > 0.5


def test_a_run_as_good_as_it_gets_is_left_alone():
    """Equal requests, equal stages, no head: no split, window or limit is better."""
    recording = recorded(EVEN, [Arrival(0.0, 120, 20)] * 32, head=0.0, jitter=0.0)
    kinds = {p.change.kind for p in advise(recording).suggestions}
    assert not kinds & {"layers", "window", "seqs", "kv"}


def test_suggestions_are_ranked_and_are_what_a_user_can_set(advice):
    for ranked in (advice.suggestions, advice.tried, advice.worths):
        assert list(ranked) == sorted(ranked, key=lambda p: p.rank)
    assert all(p.change.how for p in advice.tried)
    assert not any(p.change.how for p in advice.worths)
    kinds = [p.change.kind for p in advice.suggestions]
    assert len(kinds) == len(set(kinds))
    assert abs(advice.tokens_error) < 0.03 and advice.spread < 0.03
    assert max(map(abs, advice.idle_errors)) < 0.03


# ---- what is tried ------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "enough"), [(17, 17_000), (4000, 32_768), (50_000, 50_000)])
def test_kv_without_end_is_no_more_than_all_requests_can_fill(uneven, now, enough):
    """A pool of a thousand times a large one would take gigabytes of the user's memory."""
    setting = setting_of(uneven.meta)
    setting = replace(setting, limits=replace(LIMITS, num_blocks=now))
    [wish] = [w for w in wishes(setting, fit(uneven, setting.num_layers)) if w.kind == "kv_full"]
    assert wish.setting.limits.num_blocks == enough


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 1.7, 1), (2.0, 1, 1)])
def test_no_split_is_better_than_the_best(factors):
    recording = recorded((4, 4, 4), requests(30), factors=factors)
    fitted, setting = fit(recording, (4, 4, 4)), setting_of(recording.meta)

    def slowest(counts):
        return max(stage_s(fitted, stage, count) for stage, count in enumerate(counts))

    every = [c for c in product(range(1, 11), repeat=3) if sum(c) == 12]
    assert slowest(best_split(setting, fitted)) == pytest.approx(min(map(slowest, every)))


def test_layers_that_move_take_their_kv_with_them(uneven):
    setting = setting_of(uneven.meta)
    fitted = fit(uneven, setting.num_layers)

    def blocks(are_given):
        found = choices(setting, fitted, are_given)
        return {
            c.setting.num_layers: c.setting.limits.num_blocks for c in found if c.kind == "layers"
        }

    assert blocks(False)[13, 7, 6, 6] == 4000 * 14 // 13
    assert set(blocks(True).values()) == {4000}
    changed = next(c for c in choices(setting, fitted, True) if c.kind == "layers").setting
    bounds = [(s.first_layer, s.stop_layer) for s in changed.plan.stages]
    assert bounds[0][0] == 0 and bounds[-1][1] == 32
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert changed.plan.window == 4


def test_policies_are_tried_only_within_the_limits():
    recording = recorded(EVEN, requests(30))
    setting = setting_of(recording.meta)
    changes = choices(setting, fit(recording, EVEN), False)
    for change in changes:
        whole = get_policy(change.setting.policy).traits.whole_prompts
        assert not whole or change.setting.limits.max_num_batched_tokens >= 2048
        Engine(change.setting.plan, get_policy(change.setting.policy), change.setting.limits)
    tried = {c.setting.policy for c in changes if c.kind == "policy"}
    assert {"vllm", "orca", "sarathi_serve", "token_throttle", "request_level"} <= tried
    assert "uniform" not in tried
    assert {c.setting.plan.window for c in changes if c.kind == "window"} == {5, 8}
    assert {c.kind for c in wishes(setting, fit(recording, EVEN))} >= {"jitter", "link", "replica"}


# ---- bad input, and what is shown ---------------------------------------------------------------


def test_a_recording_that_does_not_say_how_it_was_run_is_refused():
    recording = recorded(EVEN, requests(20))
    for missing in ("plan", "limits", "policy"):
        meta = {key: value for key, value in recording.meta.items() if key != missing}
        with pytest.raises(ConfigError, match="does not say how it was run"):
            advise(replace(recording, meta=meta))


def test_a_recording_that_is_too_short_is_refused():
    recording = recorded(EVEN, requests(20))
    with pytest.raises(ConfigError, match="has 5 microbatches"):
        advise(replace(recording, planned=recording.planned[:5]))
    lost = [*recording.spans[:3], []]
    with pytest.raises(ConfigError, match="has 0 microbatches that every stage"):
        advise(replace(recording, spans=lost))
    with pytest.raises(ConfigError, match="nothing can be replayed"):
        advise(replace(recording, arrived=[]))


def test_one_stage_is_advised_too():
    advice = advise(recorded((8,), requests(10)))
    assert "layers" not in {p.change.kind for p in advice.tried}
    assert abs(advice.tokens_error) < 0.03


def test_the_terminal_shows_errors_changes_and_flags(advice):
    console = Console(record=True, width=80, file=io.StringIO())
    print_advice(advice, console)
    text = console.export_text()
    first = advice.suggestions[0]
    assert first.change.how in text and f"{first.tokens_gain:+.1%}" in text
    assert f"{advice.tokens_error:+.1%}" in text
    assert "replica, an upper bound" in text and "no flag changes these" in text


def test_the_report_is_json(advice):
    report = json.loads(json.dumps(advice_report(advice)))
    assert report["suggestions"][0]["kind"] == "layers"
    assert report["suggestions"][0]["tokens_gain"] == advice.suggestions[0].tokens_gain
    assert report["error"]["output_tokens_per_s"] == advice.tokens_error
    assert len(report["error"]["idle"]) == 4


@pytest.mark.parametrize(
    ("tokens", "tbt", "is_far", "worthwhile"),
    [
        (0.05, 0.5, False, True),
        (0.05, 1.5, False, False),  # P99 TBT more than doubles
        (0.5, -0.5, True, False),  # of microbatches that nobody measured
        (0.0, -0.2, False, True),
    ],
)
def test_what_is_advised(tokens, tbt, is_far, worthwhile):
    prediction = Prediction(None, tokens, tbt, 100.0, 0.1, is_far)
    assert prediction.is_worthwhile == worthwhile


def simulated(folder, profile, num_requests, scale, *more):
    recipe = ["--config", "falcon-180b-8xa100", "--device-profile", profile, *more]
    work = ["--scale", str(scale), "--rate", "1.5", "--num-prompts", str(num_requests)]
    assert cli.main(["simulate", *recipe, *work, "--record", str(folder)]) == 0


def test_a_replayed_policy_predicts_with_the_run_s_profile(tmp_path):
    """`uniform` keeps a limit between tokens as long as it knows the time that they take."""
    simulated(tmp_path / "run", "a100-80gb-dgx", 40, 2, "--slo-tbt", "0.4")
    recording = read_recording(tmp_path / "run")
    setting = setting_of(recording.meta, cost_maker(recording.meta))
    load = load_of(recording, 10**6)
    found = replay(setting, fit(recording, setting.num_layers), load)
    recorded = recorded_figures(recording, load)
    assert found.idle == pytest.approx(recorded.idle, abs=0.02)
    without = replay(setting_of(recording.meta), fit(recording, setting.num_layers), load)
    assert found.tbt_p99_s < 0.4 < without.tbt_p99_s


def test_a_replayed_policy_learns_what_the_run_learnt():
    """Real stages without a profile."""
    config = {"device": "cpu", "tensor_parallel_size": 1}
    shape = asdict(load_shape("smollm2-135m"))
    meta = {
        "device_profile": None,
        "shape": shape,
        "config": config,
    }
    cost = cost_maker(meta)(split_layers(30, 2))
    assert cost.profile is ROUGH_CPU


def test_a_profile_that_is_not_there_any_more_is_said(tmp_path):
    folder, profile = tmp_path / "run", tmp_path / "profile.yaml"
    save_profile(load_profile("a100-80gb-dgx"), profile)
    simulated(folder, str(profile), 3, 100)
    command = ["report", str(folder), "--advise", "--json", str(tmp_path / "report.json")]
    for there in (True, False):
        assert cli.main(command) == 0
        notes = json.loads((tmp_path / "report.json").read_text())["advice"]["notes"]
        assert any("replayed without" in note for note in notes) is not there
        profile.unlink(missing_ok=True)
