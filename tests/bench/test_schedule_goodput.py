"""Goodput as `bench/schedules.py` judges it: each request by limits of its own."""

import json
from array import array
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import schedule_search
from schedule_cases import PUBLISHED, Case, cases
from schedule_goodput import (
    RULES,
    TTFT_PER_TOKEN_S,
    Met,
    Tried,
    good_shares,
    is_good,
    met_in,
    ttft_by_length,
    ttft_limit_s,
)

from pipeserve.core.order import ORDERS
from pipeserve.profiling.search.capacity import Trial, Window
from pipeserve.profiling.simulation.simulator import Served

SLO_S = 1.0


def met(num_prompt_tokens: int, late: float = 0.5, age_s: float = 1e9, tbt_s: float = 0.1) -> Met:
    """`late`: its time to first token as a share of what it may take."""
    return Met(num_prompt_tokens, age_s, late * ttft_limit_s(num_prompt_tokens, SLO_S), tbt_s)


def served(came_s: float, *tokens_s: float, num_tokens: int | None = None) -> Served:
    return Served(10, num_tokens or len(tokens_s), came_s, token_times_s=array("d", tokens_s))


def window(*requests: Served, start_s: float = 0.0, stop_s: float = 100.0) -> Window:
    return Window(SimpleNamespace(served=list(requests)), 1.0, 1.0, start_s, stop_s)


def test_a_first_token_may_take_as_long_as_its_prompt_is():
    assert ttft_limit_s(4000, SLO_S) == SLO_S + 4000 * TTFT_PER_TOKEN_S
    longest = [met(length, late=0.99) for length in (10, 100, 1000, 8000)]
    assert good_shares(longest, SLO_S) == (1.0, [1.0] * 4)
    too_late = [met(length, late=1.01) for length in (10, 100, 1000, 8000)]
    assert good_shares(too_late, SLO_S) == (0.0, [0.0] * 4)


def test_time_between_tokens_counts_as_well():
    slow = [met(10, tbt_s=1.01)] * 4 + [met(10, tbt_s=0.99)] * 12
    assert good_shares(slow, SLO_S)[0] == 0.75


@pytest.mark.parametrize(("num_bad", "good"), [(5, True), (6, False)])
def test_no_quarter_of_the_prompts_may_be_left_behind(num_bad, good):
    """25 long prompts of 100, of which 5 or 6 are late: of all, 94 % are good."""
    longest = [met(5000, late=2.0)] * num_bad + [met(5000)] * (25 - num_bad)
    assert is_good([met(100)] * 75 + longest, SLO_S) is good


@pytest.mark.parametrize(("num_bad", "good"), [(10, True), (11, False)])
def test_one_in_ten_may_be_late(num_bad, good):
    lates = [2.0 if number % 10 == 0 else 0.5 for number in range(100)]
    lates[5] = 2.0 if num_bad == 11 else 0.5
    assert is_good([met(100 + n, late) for n, late in enumerate(lates)], SLO_S) is good


def test_equal_prompts_are_cut_into_quarters_as_they_came():
    """Else the bad ones among equals would all be in one quarter."""
    alike = [met(100, late=2.0 if number % 12 == 0 else 0.5) for number in range(96)]
    assert is_good(alike, SLO_S)


def test_those_that_came_too_late_to_be_judged_say_nothing():
    """Neither for the rate, where they were quick, nor against it."""
    limit_s = ttft_limit_s(100, SLO_S)
    young = [met(100, late, age_s=0.9 * limit_s) for late in (0.1, 0.9)] * 50
    assert good_shares([*young, *[met(100, 2.0)] * 4], SLO_S)[0] == 0.0


def test_what_a_request_met_goes_as_far_as_the_window():
    waits, stalls, ends, early = met_in(
        window(
            served(90.0, num_tokens=5),
            served(10.0, 12.0, 13.0, num_tokens=5),
            served(10.0, 12.0, 13.0),
            served(0.5, 1.0, 5.0),
            served(-1.0, 0.5),  # came before the window
        )
    )
    assert waits == Met(10, 10.0, 10.0, 0.0)  # still without a token
    assert (stalls.ttft_s, round(stalls.tbt_p99_s)) == (2.0, 86)  # of 1 s, and 87 that it waits
    assert ends == Met(10, 90.0, 2.0, 1.0)
    assert early.ttft_s == 0.5


def test_tenths_by_length_say_who_waits():
    groups = ttft_by_length([Met(n, 1e9, 5.0 if n > 90 else 1.0, 0.0) for n in range(100, 0, -1)])
    assert [length for length, _, _ in groups] == list(range(6, 100, 10))
    assert [p50 for _, p50, _ in groups] == [1.0] * 9 + [5.0]


# ---- the search ---------------------------------------------------------------------------------


def tried(rate: float, queueing_s: float = 0.0, late: float = 0.5) -> Tried:
    trial = Trial(
        rate=rate, window_s=1.0, lifetime_s=1.0, requests=8, tbt_p99_s=0.5,
        queueing_p50_s=queueing_s, ttft_p50_s=1.0, ttft_p99_s=1.0, output_tokens_per_s=1.0,
        busy=(0.5,),
    )  # fmt: skip
    return Tried(trial, [0.1, 0.2, 0.3], [met(100, late)] * 8)


def test_one_simulation_for_each_rate_gives_capacity_and_goodput(monkeypatch):
    rates = []

    def at_rate(case, traces, rate, quick, seed):
        rates.append(round(rate, 2))
        return tried(rate, 9.0 if rate > 15.1 else 0.0, 2.0 if rate > 7.1 else 0.5)

    monkeypatch.setattr(schedule_search, "at_rate", at_rate)
    monkeypatch.setattr(schedule_search, "setup_of", lambda case: None)
    monkeypatch.setattr(schedule_search, "lengths_of", lambda *_: [])
    monkeypatch.setattr(schedule_search, "ceiling_of", lambda *_: SimpleNamespace(rate=20.0))
    monkeypatch.setattr(schedule_search.os, "nice", lambda _: None)
    case = Case("TP1xPP8", "sharegpt", "uniform", (), 1.0)
    found = schedule_search.search(case, None, quick=True)
    assert (found["capacity"], found["goodput"]) == ({"1.0": 15.0}, {"1.0": 7.0})
    assert len(rates) == len(set(rates)) <= 9


def test_what_was_tried_is_read_again_as_it_was():
    once = tried(3.0)
    assert Tried.read(json.loads(json.dumps(asdict(once)))) == Tried(
        Trial(**{**asdict(once.trial), "busy": [0.5]}), once.normalised_s, once.met
    )
    assert all(once.within(rule, SLO_S) for rule in RULES)


def test_every_policy_is_tried_under_every_order():
    found = {(case.policy, case.order) for case in cases(["TP1xPP8"], ["arxiv"], list(ORDERS))}
    assert found == {(policy, order) for policy in ["uniform", *PUBLISHED] for order in ORDERS}
