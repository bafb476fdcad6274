"""What is planted is what the ledger says: simulated runs with one cause of idle time, or two.

A plant's added idle is that of all stages of the planted run, less that of the same run without it.
Plants are a few times what they have to outdo: where stages stand idle anyway, what jitter there is
costs nothing more, so that a plant takes the place of some of it.
"""

from collections.abc import Mapping
from functools import cache
from math import isfinite
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import STEP_S, PlantedTimes, Scene, all_at_once, record

from pipeserve.core.policies import POLICIES
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.simulation.simulator import Arrival

LEAST, MOST_OTHER = 0.95, 0.02
SHARE = 0.03
"""By how much of the added idle the split of two plants may be off."""


def times(noise: float, num_stages: int = 4, **planted) -> PlantedTimes:
    return PlantedTimes(num_stages, noise=noise, **planted)


def in_groups(second_prompt: int = 16) -> list[Arrival]:
    """Four groups of four that stay as they came; the second may have longer prompts."""
    return [Arrival(0.001 * (i // 4), second_prompt if i // 4 == 1 else 16, 200) for i in range(16)]


def burnt(stage: int, index: int) -> float:
    return STEP_S if stage == 1 and Random(index).random() < 0.3 else 0.0


def always_late(stage: int, index: int) -> float:
    return 0.009 if stage == 2 else 0.0


def pauses_s(plan: int) -> float:
    return 0.5 if plan % 97 == 50 else 0.0


BIG = {"max_num_batched_tokens": 4200}
WHOLE = {"policy": "hybrid_only", "limits": {"max_num_batched_tokens": 16_000}}
QUEUE = tuple([Arrival(0.0, 16, 20)] * 160)
ONE_PROMPT = {"max_num_batched_tokens": 2001}
CONTEXT = {"per_prefill_s": 0.0, "per_context_s": 2e-6}
WITH_4K = (*in_groups(), Arrival(1.0, 4096, 1))
WAVES = tuple(Arrival(5.0 * (i // 16), 16, 100) for i in range(64))


def baseline(noise: float) -> Scene:
    return Scene(times=times(noise))


def plain(noise: float, **changed) -> tuple[Scene, Scene]:
    """The closed loop, without and with what is planted in the times."""
    return baseline(noise), Scene(times=times(noise, **changed))


def scenes(noise: float, planted: Mapping, **both) -> tuple[Scene, Scene]:
    times_of = planted.get("times", {})
    rest = {key: value for key, value in planted.items() if key != "times"}
    changed = {**both, **rest}
    base = {"times": times(noise), **both}
    return Scene(**base), Scene(times=times(noise, **times_of), **changed)


PLANTS = {
    "a stage in the middle is slower": ("stage_imbalance", lambda n: plain(n, slow={2: 2.0})),
    "the first stage is slower": ("stage_imbalance", lambda n: plain(n, slow={0: 2.0})),
    "the last stage is slower": ("stage_imbalance", lambda n: plain(n, slow={3: 2.0})),
    "a link is late": ("link", lambda n: plain(n, slow_hops={1: 0.009})),
    "a link is slower than the stages": ("link", lambda n: plain(n, slow_hops={2: 0.02})),
    "feedback is late": ("token_feedback", lambda n: plain(n, feedback_s=0.02)),
    "feedback is late, nothing planned ahead": (
        "token_feedback",
        lambda n: scenes(n, {"times": {"feedback_s": 0.02}}, policy="sarathi_serve"),
    ),
    "the planner is slower than the stages": ("planning", lambda n: plain(n, planning_s=0.015)),
    "the planner is slow, nothing planned ahead": (
        "planning",
        lambda n: scenes(n, {"times": {"planning_s": 0.009}}, policy="sarathi_serve"),
    ),
    "the planner pauses": ("planning", lambda n: plain(n, pauses_s=pauses_s)),
    "messages are slow, nothing planned ahead": (
        "control",
        lambda n: scenes(n, {"times": {"control_s": 0.009}}, policy="sarathi_serve"),
    ),
    "the head is slow": ("head_and_sampling", lambda n: plain(n, head_s=0.01)),
    "the ranks of a stage are far apart": (
        "all_reduce",
        lambda n: plain(n, all_reduces={1: 0.009}),
    ),
    # Its all-reduces take long, too, on the ranks that wait for it: pytorch/pytorch#59433.
    "a rank of a stage is slow": ("rank_wait", lambda n: plain(n, waits=always_late)),
    "a rank of a stage is slow now and then": ("rank_wait", lambda n: plain(n, waits=burnt)),
    "a core is burnt": ("jitter", lambda n: plain(n, burnt=burnt)),
    "a stage is killed": ("fault", lambda n: scenes(n, {"faults": [(2, 1.0, 2.0)]})),
    "the window is two": ("too_few_microbatches", lambda n: scenes(n, {"window": 2})),
    "the window is one": ("too_few_microbatches", lambda n: scenes(n, {"window": 1})),
    "one request at a time": (
        "no_requests",
        lambda n: scenes(n, {"arrivals": [Arrival(1.0 * i, 16, 50) for i in range(16)]}),
    ),
    "two requests at a time": (
        "no_requests",
        lambda n: scenes(n, {"arrivals": [Arrival(3.0 * (i // 2), 16, 50) for i in range(16)]}),
    ),
    "requests come in waves": (
        "no_requests",
        lambda n: scenes(n, {"arrivals": WAVES}, arrivals=all_at_once(16)),
    ),
    "a 4k prompt among decodes": (
        "prefill_vs_decode",
        lambda n: scenes(
            n, {"arrivals": WITH_4K}, arrivals=in_groups(), policy="hybrid_only", limits=BIG
        ),
    ),
    "a 4k prompt in chunks of 512 among decodes": (
        "prefill_vs_decode",
        lambda n: scenes(
            n,
            {"arrivals": WITH_4K},
            arrivals=in_groups(),
            policy="sarathi_serve",
            limits={"max_num_batched_tokens": 512},
        ),
    ),
    "prompts of two lengths": (
        "prefill_length",
        lambda n: (
            Scene(times=times(n), arrivals=prompts(1032, 1032), policy="orca", limits=ONE_PROMPT),
            Scene(times=times(n), arrivals=prompts(64, 2000), policy="orca", limits=ONE_PROMPT),
        ),
    ),
    "a group has long contexts": (
        "context_length",
        lambda n: (
            Scene(times=times(n, **CONTEXT), arrivals=in_groups(), **WHOLE),
            Scene(times=times(n, **CONTEXT), arrivals=in_groups(2000), **WHOLE),
        ),
    ),
    "two groups have two long contexts each": (
        "context_length",
        lambda n: (
            Scene(
                times=times(n, **CONTEXT), arrivals=in_groups(), policy="sarathi_serve", limits=BIG
            ),
            Scene(
                times=times(n, **CONTEXT),
                arrivals=in_groups(4000),
                policy="sarathi_serve",
                limits=BIG,
            ),
        ),
    ),
    "KV for two requests of sixteen, no preemption": (
        "kv_full",
        lambda n: scenes(
            n,
            {"limits": {"max_num_seqs": 16, "num_blocks": 8}},
            arrivals=QUEUE,
            policy="orca",
            limits={"max_num_seqs": 16},
        ),
    ),
    "KV for one request of sixteen": (
        "kv_full",
        lambda n: scenes(
            n,
            {"limits": {"max_num_seqs": 16, "num_blocks": 4}},
            arrivals=QUEUE,
            limits={"max_num_seqs": 16},
        ),
    ),
}


# What the ledger does not get right yet; a mark comes off with what it stands for.
def prompts(*lengths: int) -> list[Arrival]:
    """Beginning and end of the run are the same for all lengths."""
    same = (1032,) * 8
    return [Arrival(0.0, length, 1) for length in (*same, *lengths * 150, *same)]


def idle_of(ledger: Ledger) -> dict[str, float]:
    """Of all stages together, by cause; what must hold of any ledger is checked."""
    total = dict.fromkeys(CAUSES, 0.0)
    for stage, busy_s in enumerate(ledger.busy_s):
        idle_s = ledger.idle_s(stage)
        assert busy_s + sum(idle_s.values()) == pytest.approx(ledger.seconds, abs=1e-6)
        for cause, seconds in idle_s.items():
            total[cause] += seconds
    assert total["unknown"] <= 0.02 * ledger.seconds * len(ledger.busy_s)
    return total


def added(before: Scene, planted: Scene) -> tuple[dict[str, float], float]:
    """Idle seconds that the plant added, by cause and in all."""
    idle, more = idle_of(explain(record(before))), idle_of(explain(record(planted)))
    difference = {cause: more[cause] - idle[cause] for cause in CAUSES}
    return difference, sum(difference.values())


def assert_is(cause: str, difference: Mapping[str, float], total: float) -> None:
    shares = {name: seconds / total for name, seconds in difference.items()}
    assert shares[cause] >= LEAST, {k: round(v, 4) for k, v in shares.items() if abs(v) > 0.002}
    others = {name: share for name, share in shares.items() if name != cause}
    assert all(abs(share) < MOST_OTHER for share in others.values()), others


@cache
def idle_share_of_baseline(noise: float) -> float:
    ledger = explain(record(baseline(noise)))
    return sum(idle_of(ledger).values()) / ledger.seconds / len(ledger.busy_s)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.01), (0.01, 0.015)])
def test_the_baseline_has_next_to_no_idle(noise, most):
    assert 0 < idle_share_of_baseline(noise) < most


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_cause_is_found(name, noise):
    cause, make = PLANTS[name]
    difference, total = added(*make(noise))
    assert total > 0.5
    assert_is(cause, difference, total)


@pytest.mark.parametrize("num_stages", [2, 8])
@pytest.mark.parametrize(
    ("cause", "changed"),
    [
        ("stage_imbalance", {"slow": {1: 2.0}}),
        ("link", {"slow_hops": {0: 0.025}}),
        ("token_feedback", {"feedback_s": 0.04}),
        ("head_and_sampling", {"head_s": 0.01}),
        ("jitter", {"burnt": burnt}),
        ("planning", {"planning_s": 0.02}),
    ],
)
def test_with_two_stages_and_with_eight(num_stages, cause, changed):
    arrivals = all_at_once(4 * num_stages)
    base = Scene(times=times(0.0, num_stages), arrivals=arrivals)
    planted = Scene(times=times(0.0, num_stages, **changed), arrivals=arrivals)
    assert_is(cause, *added(base, planted))


# ---- two at once --------------------------------------------------------------------------------

LATE_LINK = {"slow_hops": {1: 0.009}}
AHEAD, NOT_AHEAD = {}, {"policy": "sarathi_serve"}
PAIRS = {
    "link and feedback": (
        ({"times": LATE_LINK}, "link"),
        ({"times": {"feedback_s": 0.018}}, "token_feedback"),
        AHEAD,
    ),
    "link and feedback, nothing planned ahead": (
        ({"times": LATE_LINK}, "link"),
        ({"times": {"feedback_s": 0.018}}, "token_feedback"),
        NOT_AHEAD,
    ),
    "link and planning": (
        ({"times": LATE_LINK}, "link"),
        ({"times": {"planning_s": 0.006}}, "planning"),
        NOT_AHEAD,
    ),
    "link and messages": (
        ({"times": LATE_LINK}, "link"),
        ({"times": {"control_s": 0.004}}, "control"),
        NOT_AHEAD,
    ),
    "link and pauses of the planner": (
        ({"times": LATE_LINK}, "link"),
        ({"times": {"pauses_s": pauses_s}}, "planning"),
        AHEAD,
    ),
    "link and a fault": (
        ({"times": LATE_LINK}, "link"),
        ({"faults": [(1, 1.0, 2.0)]}, "fault"),
        AHEAD,
    ),
    "pauses of the planner and a slow stage": (
        ({"times": {"pauses_s": pauses_s}}, "planning"),
        ({"times": {"slow": {2: 1.5}}}, "stage_imbalance"),
        AHEAD,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_that_add_up_are_split_as_each_alone(name):
    """In proportion to what each adds alone; they cost a bit less together where they overlap."""
    noise = 0.01
    (one, one_cause), (other, other_cause), both = PAIRS[name]
    together = {**one, **other, "times": {**one.get("times", {}), **other.get("times", {})}}
    _, one_s = added(*scenes(noise, one, **both))
    _, other_s = added(*scenes(noise, other, **both))
    difference, total = added(*scenes(noise, together, **both))
    assert total == pytest.approx(one_s + other_s, rel=0.1)
    assert difference[one_cause] / total == pytest.approx(one_s / (one_s + other_s), abs=SHARE)
    assert difference[other_cause] / total == pytest.approx(other_s / (one_s + other_s), abs=SHARE)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_waves_of_requests_and_a_slow_stage(noise):
    """The waves come when they come: the slow stage has its own share, the rest is their gaps."""
    slow = times(noise, slow={2: 1.2})
    loop = {"arrivals": [Arrival(0.0, 16, 100)] * 64, "limits": {"max_num_seqs": 16}}
    _, alone_s = added(Scene(times=times(noise), **loop), Scene(times=slow, **loop))
    difference, total = added(Scene(times=times(noise), **loop), Scene(times=slow, arrivals=WAVES))
    assert difference["stage_imbalance"] == pytest.approx(alone_s, rel=0.06)
    assert difference["no_requests"] == pytest.approx(total - alone_s, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_window_of_two_and_a_late_link(noise):
    """Of 30 ms that a microbatch takes of the loop (60 ms for two), 10 are a stage's own, 10 are
    the link's and 10 those of the microbatch that is not there."""
    planted = {"times": {"slow_hops": {1: 0.02}}, "window": 2}
    difference, total = added(*scenes(noise, planted))
    assert difference["link"] / total == pytest.approx(0.5, abs=SHARE)
    assert difference["too_few_microbatches"] / total == pytest.approx(0.5, abs=SHARE)


def test_a_late_link_that_a_slow_stage_hides_is_not_blamed():
    slow = times(0.0, slow={2: 2.0})
    hidden = times(0.0, slow={2: 2.0}, slow_hops={1: 0.005})
    _, slow_s = added(baseline(0.0), Scene(times=slow))
    difference, total = added(baseline(0.0), Scene(times=hidden))
    assert total == pytest.approx(slow_s, rel=0.01)
    assert_is("stage_imbalance", difference, total)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_short_prompt_long_ago_does_not_make_a_long_one_its_like(noise):
    """The first group's prompts are on the path to an end and not on that to the next start, which
    an arrival led to. What that leaves owing is milliseconds, not a step with prompts."""
    groups = [Arrival(0.015 * (i // 4), 16, 200) for i in range(8)]
    long = [Arrival(0.5 * (1 + i), 4096, 1) for i in range(4)]
    base, planted = [
        Scene(times=times(noise, 2), arrivals=arrivals, policy="hybrid_only", limits=BIG)
        for arrivals in (groups, [*groups, *long])
    ]
    assert_is("prefill_vs_decode", *added(base, planted))


def test_a_driver_that_looked_up_for_a_moment_had_not_been_planning_all_the_while():
    """It took up a message just before each result, and was not back at once."""
    scene = Scene(times=times(0.0, slow_hops={1: 0.03}), policy="sarathi_serve")
    recording = record(scene)
    idle = idle_of(explain(recording))
    recording.completed[:] = [c._replace(waiting_s=c.received_s) for c in recording.completed]
    found = idle_of(explain(recording))
    moved_s = found["planning"] - idle["planning"]
    assert 0 < moved_s < 0.01 * sum(idle.values())
    assert idle["control"] - found["control"] == pytest.approx(moved_s, rel=0.1)


# ---- what must hold of any run ------------------------------------------------------------------


@st.composite
def any_scene(draw) -> Scene:
    num_stages = draw(st.integers(1, 6))
    ms = st.floats(0.0, 20.0).map(lambda value: value / 1e3)
    stages = st.dictionaries(st.integers(0, num_stages - 1), st.floats(0.5, 4.0), max_size=2)
    rng = draw(st.randoms(use_true_random=False))
    burns = draw(ms)
    given_times = PlantedTimes(
        num_stages,
        base_s=draw(ms),
        per_prefill_s=draw(ms) / 100,
        per_decode_s=draw(ms) / 10,
        per_context_s=draw(ms) / 1000,
        hop_s=draw(ms),
        control_s=draw(ms),
        feedback_s=draw(ms),
        planning_s=draw(st.sampled_from([0.0, 0.001, 0.03])),
        slow=draw(stages),
        head_s=draw(ms),
        burnt=lambda stage, index: burns if (stage + index) % 5 == 0 else 0.0,
        noise=draw(st.sampled_from([0.0, 0.1])),
    )
    spread_s = draw(st.sampled_from([0.0, 0.5, 5.0]))
    arrivals = sorted(
        Arrival(rng.uniform(0, spread_s), rng.randint(1, 200), rng.randint(1, 25))
        for _ in range(draw(st.integers(1, 25)))
    )
    return Scene(
        times=given_times,
        arrivals=arrivals,
        policy=draw(st.sampled_from(sorted(POLICIES))),
        window=draw(st.sampled_from([None, 1, num_stages + 1])),
        limits={
            "num_blocks": draw(st.sampled_from([20, 60, 1000])),
            "max_num_seqs": draw(st.sampled_from([1, 3, 64])),
            "max_num_batched_tokens": 256,
            "max_model_len": 256,
        },
        faults=draw(st.sampled_from([(), ((0, 0.05, 0.1),), ((0, 0.01, 0.0), (0, 0.3, 1.0))])),
    )


@settings(max_examples=50, deadline=None)
@given(any_scene())
def test_compute_and_causes_are_wall_time_in_any_run(scene):
    recording = record(scene)
    with np.errstate(all="raise", under="ignore"):
        ledger = explain(recording)
    idle_of(ledger)
    for stage, intervals in enumerate(ledger.idle):
        now = ledger.start_s
        for interval in intervals:
            assert min(interval.seconds) >= 0.0
            assert sum(interval.seconds) == pytest.approx(
                interval.end_s - interval.start_s, abs=1e-9
            )
            assert interval.start_s >= now - 1e-9
            now = interval.end_s
        assert now <= ledger.stop_s + 1e-9
        spans = recording.spans[stage]
        assert ledger.busy_s[stage] <= sum(s.end_s - s.start_s for s in spans) + 1e-9


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tick_s", [0.0, 5e-324, 1e-310, 1e-300, 1e-150, 1e-16, 1e-9, 0.01])
def test_the_smallest_runs_are_explained(policy, tick_s):
    """One request of one token or two, times down to the smallest number above 0: nothing is
    divided by 0, becomes infinite or no number on the way."""
    for num_stages, num_prompt, num_output, burnt_s in (
        (1, 1, 1, 0.0), (1, 1, 1, 1e-3), (1, 7, 1, 0.0), (2, 1, 2, tick_s), (3, 7, 2, 0.0),
    ):  # fmt: skip
        given_times = PlantedTimes(
            num_stages,
            base_s=tick_s,
            per_prefill_s=tick_s,
            per_decode_s=tick_s,
            hop_s=tick_s,
            control_s=tick_s,
            feedback_s=tick_s,
            planning_s=tick_s,
            burnt=lambda stage, index, burnt_s=burnt_s: burnt_s,
        )
        limits = {"num_blocks": 20, "max_num_seqs": 1, "max_num_batched_tokens": 256,
                  "max_model_len": 256}  # fmt: skip
        recording = record(
            Scene(
                times=given_times,
                arrivals=[Arrival(0.0, num_prompt, num_output)],
                policy=policy,
                limits=limits,
            )
        )
        with np.errstate(all="raise", under="ignore"):
            ledger = explain(recording)
        idle_of(ledger)
        assert all(isfinite(busy_s) for busy_s in ledger.busy_s)
