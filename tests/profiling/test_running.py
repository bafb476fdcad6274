"""The ledger of a run that goes on: piece by piece it comes to what it is of the whole."""

import pytest
from made_up_recording import made_up_recording

from pipeserve.core.records import Arrived, Completed, Planned, Span
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.ledger.running import COMPUTING, RunningLedger

PIECE_S = 1.0


def told_s(record):
    match record:
        case Arrived():
            return record.at_s
        case Planned() | Span():
            return record.sent_s
        case Completed():
            return record.done_s


def in_order(recording):
    spans = [span for stage in recording.spans for span in stage]
    records = [*recording.arrived, *recording.planned, *recording.completed, *spans]
    return sorted(records, key=told_s)


def run(records, num_stages, *, missing=()):
    """Told piece by piece; without those told between the two times of `missing`."""
    running = RunningLedger(num_stages, records[0].at_s)
    due_s = records[0].at_s + PIECE_S
    for record in records:
        while told_s(record) > due_s:
            running.advance(due_s)
            due_s += PIECE_S
        if missing and missing[0] <= told_s(record) < missing[1]:
            running.miss()
        else:
            running.take(record)
    running.advance(told_s(records[-1]) + 0.01)
    return running


@pytest.mark.parametrize(
    "changes",
    [
        {"num_stages": 4},
        {"num_stages": 2, "rate": 3.0, "num_requests": 60},  # with nothing to serve now and then
        {"num_stages": 3, "policy": "uniform", "num_blocks": 300},
    ],
)
def test_pieces_come_to_the_whole(changes):
    recording = made_up_recording(**{"num_requests": 120, **changes})
    whole, running = explain(recording), run(in_order(recording), recording.num_stages)
    for stage, seconds in enumerate(running.seconds):
        expected = {COMPUTING: whole.busy_s[stage], **whole.idle_s(stage)}
        tail_s = expected.pop("drain")  # what follows the last end is not known yet
        assert seconds.pop("drain") == 0
        assert sum(seconds.values()) == pytest.approx(whole.seconds - tail_s, abs=0.01)
        for cause, cause_s in expected.items():
            assert seconds[cause] == pytest.approx(cause_s, abs=0.02 * whole.seconds), cause
        assert seconds["unknown"] < 1e-5


def test_time_without_requests_passes_as_it_does():
    records = in_order(made_up_recording(num_requests=5))
    running = run(records, 2)
    end_s = told_s(records[-1])
    before_s = [sum(seconds.values()) for seconds in running.seconds]
    for seconds in (10.0, 3600.0):
        running.advance(end_s + seconds)
    for stage, seconds in enumerate(running.seconds):
        assert sum(seconds.values()) == pytest.approx(end_s + 3600 - records[0].at_s)
        assert seconds["no_requests"] > 3599 - (before_s[stage] - before_s[0])


def test_before_the_first_request_there_was_none():
    running = RunningLedger(2, 0.0)
    running.advance(5.0)
    assert running.seconds[1]["no_requests"] == 5.0


def test_what_was_not_told_is_unknown():
    recording = made_up_recording(num_requests=120)
    records = in_order(recording)
    begin_s = records[0].at_s
    running = run(records, 2, missing=(begin_s + 2.5, begin_s + 3.5))
    for seconds in running.seconds:
        assert seconds["unknown"] == pytest.approx(1.5, abs=1.0)
        assert sum(seconds.values()) == pytest.approx(told_s(records[-1]) - begin_s, abs=0.3)


def test_the_past_is_forgotten():
    recording = made_up_recording(num_requests=300)
    running = run(in_order(recording), 2)
    num_records = len(recording.planned) + len(recording.completed) + sum(map(len, recording.spans))
    assert len(running._recent) < num_records / 3
