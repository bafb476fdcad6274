"""What a lost stage cost, worked out by hand, and on a run whose stage is killed."""

import os
import signal
import time
from itertools import count, pairwise
from math import nan

import pytest

from pipeserve.configs import make_config
from pipeserve.core.nouns import Chunk, Request, RequestId
from pipeserve.core.records import Arrived, Completed, Fault, Planned, Span
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.ledger.notes import notes_of
from pipeserve.profiling.recording.recording import recording_of
from pipeserve.sampling_params import SamplingParams


def plan(index, sent_s, *chunks, after=-1):
    """Chunks are (request, start, stop)."""
    chunks = tuple([Chunk(request, start, stop, (), None, 1) for request, start, stop in chunks])
    return Planned(index, "", after, sent_s, sent_s, sent_s, chunks, 0, 2, 100, ())


def span(stage, index, start_s, end_s, num_tokens=1):
    return Span(stage, index, num_tokens, *[start_s] * 3, *[end_s] * 3, nan, nan, 0)


def done(index, at_s):
    return Completed(index, at_s - 0.01, at_s, at_s, (1,))


def arrived(*requests):
    return [Arrived(request, 0.0, 8, 99) for request in requests]


def idle_of(ledger, stage, index):
    """Seconds by cause before that microbatch."""
    found = {}
    for interval in ledger.idle[stage]:
        if interval.index == index:
            for cause, seconds in zip(ledger.idle_s(stage), interval.seconds, strict=True):
                found[cause] = found.get(cause, 0.0) + seconds
    return {cause: seconds for cause, seconds in found.items() if seconds > 1e-9}


def two_stages(*more, told=()):
    """A prompt of 8 of each of two requests, and a decode; stage 1 was given that at 4 s, and did
    not do it. It is lost at 6 s; at 10 s both prompts run again."""
    return recording_of(
        [
            *arrived(0, 1),
            plan(0, 0.0, (0, 0, 8)), plan(1, 0.0, (1, 0, 8)),
            span(0, 0, 0.0, 1.0, 8), span(1, 0, 1.0, 2.0, 8), done(0, 2.0),
            span(0, 1, 1.0, 2.0, 8), span(1, 1, 2.0, 3.0, 8), done(1, 3.0),
            plan(2, 3.0, (0, 8, 9), (1, 8, 9), after=1),
            span(0, 2, 3.0, 4.0, 2), *told,
            Fault(1, 6.0, "killed"),
            plan(3, 10.0, (0, 0, 8)), plan(4, 10.0, (1, 0, 8)),
            span(0, 3, 10.0, 12.0, 8), span(1, 3, 12.0, 14.0, 8), done(3, 14.0),
            span(0, 4, 12.0, 14.0, 8), span(1, 4, 14.0, 16.0, 8), done(4, 16.0),
            *more,
        ],
        2,
        {},
    )  # fmt: skip


def test_a_fault_lasts_from_the_last_sign_of_life_to_the_first_new_compute():
    ledger = explain(two_stages())
    assert idle_of(ledger, 0, 3) == pytest.approx({"fault": 6.0})  # 4 s to 10 s
    before_it = {cause: s for cause, s in idle_of(ledger, 1, 3).items() if cause != "fault"}
    assert sum(before_it.values()) == pytest.approx(1.0)  # for the decode, from 3 s to 4 s
    assert idle_of(ledger, 1, 3)["fault"] == pytest.approx(8.0)
    [cost] = ledger.faults
    assert cost.idle_s == pytest.approx(6.0)
    for stage in (0, 1):
        total_s = ledger.busy_s[stage] + sum(ledger.idle_s(stage).values())
        assert total_s == pytest.approx(ledger.seconds)


def test_a_span_that_outlived_its_stage_tells_when_that_was():
    """It had done the decode by 5 s, and did not come to send its tokens."""
    ledger = explain(two_stages(told=[span(1, 2, 4.0, 5.0, 2)]))
    assert ledger.faults[0].idle_s == pytest.approx(5.0)
    assert idle_of(ledger, 1, 3) == pytest.approx({"fault": 7.0})
    assert ledger.busy_s[1] == pytest.approx(7.0)


def test_what_had_been_computed_and_told_is_computed_again():
    """The prompts, 8 tokens of each, but not the decode that was lost with the stage."""
    ledger = explain(two_stages())
    [cost] = ledger.faults
    assert cost.num_tokens == 16
    assert cost.again_s == pytest.approx((4.0, 4.0))
    assert [ledger.again_s(stage) for stage in (0, 1)] == pytest.approx([4.0, 4.0])


def test_what_is_computed_for_the_first_time_is_not_again():
    later = [
        plan(5, 16.0, (0, 8, 9), (1, 8, 9), after=4),
        span(0, 5, 16.0, 17.0), span(1, 5, 17.0, 18.0), done(5, 18.0),
        plan(6, 18.0, (2, 0, 30), after=5),
        span(0, 6, 18.0, 19.0, 30), span(1, 6, 19.0, 20.0, 30), done(6, 20.0),
    ]  # fmt: skip
    assert explain(two_stages(*later)).faults == explain(two_stages()).faults


def test_two_losses_before_anything_is_computed_are_one_outage():
    recording = two_stages()
    recording.faults.append(Fault(0, 8.0, "killed, too"))
    ledger = explain(recording)
    first, second = ledger.faults
    assert first == explain(two_stages()).faults[0]
    assert (second.idle_s, second.num_tokens) == (0.0, 0)
    first, second = notes_of(recording, ledger)[:2]
    assert "nothing was computed for 6.000 s, and then 16 tokens again, in " in first
    assert second.endswith("killed, too; the one before was not over")


def test_an_idle_stage_costs_nothing_until_there_is_work():
    records = [
        *arrived(0), plan(0, 0.0, (0, 0, 8)), span(0, 0, 0.0, 1.0, 8), span(1, 0, 1.0, 2.0, 8),
        done(0, 2.0), Fault(1, 60.0, "killed"),
        plan(1, 90.0, (1, 0, 8)), span(0, 1, 90.0, 91.0, 8), span(1, 1, 91.0, 92.0, 8),
        done(1, 92.0),
    ]  # fmt: skip
    [cost] = explain(recording_of(records, 2, {})).faults
    assert cost.idle_s == pytest.approx(30.0) and cost.num_tokens == 0


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_real_run_says_what_its_fault_cost():
    """The spans of the dead stage outlive it, and all idle time of the outage is put down to it."""
    told = []
    config = make_config(
        {},
        {
            "model": "llama2-7b",
            "device_profile": "a100-80gb-dgx",
            "max_model_len": 1024,
            "pipeline_parallel_size": 2,
            "device": "emulated",
        },
    )
    with Driver(emulated_setup(config), record=told.append) as driver:
        numbers = count()
        for _ in range(4):
            params = SamplingParams(max_tokens=100, seed=1, ignore_eos=True)
            driver.submit([Request(id=RequestId(next(numbers)), prompt=(7,) * 100, params=params)])
        num_tokens = 0
        while driver.engine.num_unfinished:
            num_tokens += len(driver.outputs(0.1))
            if num_tokens > 100 and not sum(driver.losses.counts):
                os.kill(driver.stages[1].pid, signal.SIGKILL)
                killed_s = time.monotonic()
                while not driver.losses.trouble:
                    num_tokens += len(driver.outputs(0.1))
        driver.settle()
    recording = recording_of(told, 2, {})
    ledger = explain(recording)
    [fault], [cost] = recording.faults, ledger.faults
    assert fault.stage == 1 and "SIGKILL" in fault.reason
    before = [each for each in recording.spans[1] if each.end_s < fault.at_s]
    assert killed_s - 0.1 < before[-1].end_s < killed_s + 0.05
    assert all(later.index == each.index + 1 for each, later in pairwise(before))
    again = min(s.start_s for spans in recording.spans for s in spans if s.start_s > fault.at_s)
    assert cost.idle_s == pytest.approx(again - before[-1].end_s, abs=0.05)
    assert 4 * 100 < cost.num_tokens < 4 * 200
    for stage in (0, 1):
        idle_s = ledger.idle_s(stage)
        assert idle_s["fault"] == pytest.approx(cost.idle_s, abs=0.1)
        assert 0 < ledger.again_s(stage) < 0.5 * ledger.busy_s[stage]
