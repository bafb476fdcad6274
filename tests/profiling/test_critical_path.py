"""Ledgers worked out by hand: one idle interval, what led to its end, and what it is put down to.

Steps are equal (1 s) unless said otherwise, so that what is left of two paths is what lies between.
"""

from math import inf, nan

import pytest

from pipeserve.core.cost.pipeline_cost import work_of
from pipeserve.core.nouns import Chunk
from pipeserve.core.records import Arrived, Completed, Fault, Planned, Span
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.ledger.step_parts import (
    BASE,
    CONTEXT,
    DECODES,
    IMBALANCE,
    PREFILL,
    StepParts,
    counts_of,
)
from pipeserve.profiling.recording.recording import recording_of


def plan(index, sent_s, after=-1, *, waited_for="", woken_s=None, requests=(0,), there=(0, 2)):
    """Decodes of some requests, planned in no time; `there`: requests that wait and that run."""
    chunks = tuple([Chunk(request, 10 + index, 11 + index, (), None, 1) for request in requests])
    woken_s = sent_s if woken_s is None else woken_s
    times = woken_s, sent_s, sent_s
    return Planned(index, waited_for, after, *times, chunks, *there, 100, ())


def span(stage, index, plan_s, input_s, start_s, end_s, *, sent_s=None, cpu=nan, head_s=None):
    """`cpu`: between the span before and this one."""
    sent_s = end_s if sent_s is None else sent_s
    head_s = end_s if head_s is None else head_s
    times = plan_s, input_s, start_s, head_s, end_s, sent_s
    return Span(stage, index, 1, *times, nan, cpu, 0)


def done(index, received_s, waiting_s=0.0):
    return Completed(index, waiting_s, received_s, received_s, (1,))


def ledger_of(num_stages, *records) -> Ledger:
    found = explain(recording_of([Arrived(0, 0.0, 10, 99), *records], num_stages, {}))
    for stage, busy_s in enumerate(found.busy_s):
        assert busy_s + sum(found.idle_s(stage).values()) == pytest.approx(found.seconds)
    return found


def causes_before(ledger: Ledger, stage: int, index: int) -> dict[str, float]:
    """Of the one idle interval there, without those that are 0."""
    [interval] = [interval for interval in ledger.idle[stage] if interval.index == index]
    pairs = zip(CAUSES, interval.seconds, strict=True)
    return {cause: seconds for cause, seconds in pairs if seconds > 1e-9}


# ---- what comes between two steps: a pipeline of one stage ---------------------------------------


def test_what_a_stage_does_itself_is_control_and_the_rest_of_a_lag_is_jitter():
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0, -inf, 0.0, 1.0), done(0, 1.0),
        plan(1, 1.0, 0), span(0, 1, 1.0, 1.0, 1.2, 2.2, cpu=0.05), done(1, 2.2),
    )  # fmt: skip
    assert causes_before(ledger, 0, 1) == pytest.approx({"control": 0.05, "jitter": 0.15})


def test_a_stage_that_worked_longer_than_the_lag_has_no_jitter():
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0, -inf, 0.0, 1.0), done(0, 1.0),
        plan(1, 1.0, 0), span(0, 1, 1.0, 1.0, 1.2, 2.2, cpu=0.3), done(1, 2.2),
    )  # fmt: skip
    assert causes_before(ledger, 0, 1) == pytest.approx({"control": 0.2})


def test_tokens_that_left_before_the_end_were_on_their_way_since_then():
    """0.4 s on the way, 0.1 s of lag; what was scored behind the tokens, 0.1 s, is off both."""
    ledger = ledger_of(
        1, plan(0, 0.0), plan(1, 0.0), span(0, 0, 0, -inf, 0.0, 1.0, sent_s=0.9), done(0, 1.0),
        span(0, 1, 0.5, 1.3, 1.4, 2.4, cpu=1.0), done(1, 2.4),
    )  # fmt: skip
    expected = {"token_feedback": 0.4 * 0.8, "control": 0.1 * 0.8}
    assert causes_before(ledger, 0, 1) == pytest.approx(expected)


def test_tokens_come_from_the_latest_microbatch_of_their_requests():
    """Requests 1 and 2 sampled in microbatch 0 and 1; what waits for both waits for the later."""
    ledger = ledger_of(
        1, plan(0, 0.0, requests=(1,)), plan(1, 0.0, requests=(2,)),
        span(0, 0, 0, -inf, 0.0, 1.0), span(0, 1, 0, -inf, 1.0, 2.0), done(0, 1.0), done(1, 2.0),
        plan(2, 0.5, requests=(1, 2)), span(0, 2, 0.5, 2.5, 2.5, 3.5), done(2, 3.5),
    )  # fmt: skip
    assert causes_before(ledger, 0, 2) == pytest.approx({"token_feedback": 0.5})


def test_a_result_that_waited_for_the_driver_was_planning_and_then_control():
    """The driver was at something else until 1.2, when the result of 1.0 had been there for 0.2 s,
    and planned from 1.3 to 1.5; messages of 0.1 s twice."""
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.3, waiting_s=1.2),
        plan(1, 1.5, 0), span(0, 1, 1.6, 1.0, 1.6, 2.6), done(1, 2.6),
    )  # fmt: skip
    assert causes_before(ledger, 0, 1) == pytest.approx({"planning": 0.4, "control": 0.2})


def test_waiting_for_an_arrival():
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.0),
        plan(1, 5.0, waited_for="no_requests"), span(0, 1, 5.0, -inf, 5.0, 6.0), done(1, 6.0),
    )  # fmt: skip
    assert causes_before(ledger, 0, 1) == pytest.approx({"no_requests": 4.0})


# ---- microbatches that are missing: a pipeline of two --------------------------------------------


@pytest.mark.parametrize(
    ("there", "waited_for", "cause"),
    [
        ((0, 1), "token", "no_requests"),
        ((0, 2), "token", "too_few_microbatches"),
        ((1, 1), "token", "too_few_microbatches"),
        ((1, 1), "kv", "kv_full"),
    ],
)
def test_one_microbatch_at_a_time_leaves_a_step_free(there, waited_for, cause):
    records = []
    for k in range(4):
        start = 2.0 * k
        first = span(0, k, start, -inf if k == 0 else start, start, start + 1)
        second = span(1, k, start, start + 1, start + 1, start + 2)
        planned = plan(k, start, k - 1, waited_for=waited_for, there=there)
        records += [planned, first, second, done(k, start + 2)]
    ledger = ledger_of(2, *records)
    for stage in (0, 1):
        for index in (1, 2, 3):
            assert causes_before(ledger, stage, index) == pytest.approx({cause: 1.0})
    assert causes_before(ledger, 1, 0) == pytest.approx({"fill": 1.0})
    assert causes_before(ledger, 0, -1) == pytest.approx({"drain": 1.0})


def test_microbatches_of_four_decodes_and_of_one():
    """1 s for each decode; each stage waits 3 s for the large one, with two always outstanding."""
    large, small = (0, 1, 2, 3), (4,)
    records = [plan(0, 0.0, requests=large), plan(1, 0.0, requests=small)]
    for k in range(0, 6, 2):
        at = 4.0 * k
        records += [span(0, k, at, at if k else -inf, at, at + 4)]
        records += [span(0, k + 1, at + 4, at + 1 if k else -inf, at + 4, at + 5)]
        records += [span(1, k, at, at + 4, at + 4, at + 8)]
        records += [span(1, k + 1, at + 8, at + 8, at + 8, at + 9)]
        records += [done(k, at + 8), done(k + 1, at + 9)]
        records += [plan(k + 2, at + 8, k, waited_for="window", requests=large)]
        records += [plan(k + 3, at + 9, k + 1, waited_for="window", requests=small)]
    ledger = ledger_of(2, *records[:-2])
    for stage in (0, 1):
        for index in (2, 4):
            assert causes_before(ledger, stage, index) == pytest.approx({"decode_count": 3.0})


# ---- edges of the run ----------------------------------------------------------------------------


def test_behind_the_last_fault_nothing_came():
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.0),
        plan(1, 1.0, 0), span(0, 1, 1.0, 1.0, 1.0, 2.0), Fault(0, 5.0, "killed"),
    )  # fmt: skip
    assert ledger.stop_s == 5.0
    assert causes_before(ledger, 0, -1) == pytest.approx({"fault": 3.0})


def test_a_plan_behind_a_fault_waited_for_the_stage():
    """From the end of what it computed last, whose result never came."""
    ledger = ledger_of(
        1, plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.0),
        plan(1, 1.0, 0), span(0, 1, 1.0, 1.0, 1.0, 2.0), Fault(0, 3.0, "killed"),
        plan(2, 5.0), span(0, 2, 5.1, -inf, 5.1, 6.1), done(2, 6.1),
    )  # fmt: skip
    assert causes_before(ledger, 0, 2) == pytest.approx({"fault": 3.1})


def test_a_run_without_its_beginning_starts_when_every_stage_had_begun():
    spans = [span(0, k, k, k, k, k + 1.0) for k in range(4)]
    spans += [span(1, k, k, k + 1, k + 1, k + 2.0) for k in range(4)]
    ledger = explain(recording_of(spans, 2, {}))
    assert (ledger.start_s, ledger.stop_s) == (1.0, 5.0)
    assert ledger.busy_s == pytest.approx([3.0, 4.0])


# ---- what is asked of a ledger -------------------------------------------------------------------


def pauses() -> tuple[list, Ledger]:
    """Steps of 1 s behind waits of 1, 2 and 3 s for requests 1, 2 and both; 9 s in all."""
    records, at = [plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.0)], 1.0
    for k, requests in ((1, (1,)), (2, (2,)), (3, (1, 2))):
        at += k
        records += [plan(k, at, waited_for="no_requests", requests=requests)]
        records += [span(0, k, at, -inf, at, at + 1), done(k, at + 1)]
        at += 1
    return records, ledger_of(1, *records)


def test_idle_time_by_microbatch_and_by_request():
    """All requests of a microbatch waited for it. What follows the last one is of none."""
    records, ledger = pauses()
    by_microbatch = {k: sum(seconds) for k, seconds in ledger.by_microbatch().items()}
    assert by_microbatch == pytest.approx({1: 1.0, 2: 2.0, 3: 3.0})
    recording = recording_of(records, 1, {})
    by_request = {k: sum(seconds) for k, seconds in ledger.by_request(recording).items()}
    assert by_request == pytest.approx({0: 0.0, 1: 1.0 + 3.0, 2: 2.0 + 3.0})


def test_nothing_is_put_down_to_a_microbatch_behind_the_last():
    records = [plan(0, 0.0), span(0, 0, 0.0, -inf, 0.0, 1.0), done(0, 1.5)]
    ledger = ledger_of(1, *records)
    assert sum(ledger.idle_s(0).values()) == pytest.approx(0.5)
    assert ledger.by_microbatch() == {}


def test_idle_time_over_time_lies_where_it_was():
    """Idle from 1 to 2, 3 to 5 and 6 to 9, of 10 s in all: by bins of 2 s."""
    _, ledger = pauses()
    assert ledger.seconds == pytest.approx(10.0)
    waits = ledger.over_time(5)[0][:, list(CAUSES).index("no_requests")]
    assert waits == pytest.approx([1.0, 1.0, 1.0, 2.0, 1.0])


# ---- parts of a step -----------------------------------------------------------------------------


def test_a_step_whose_core_was_taken_in_its_head_does_not_spoil_the_fit():
    """0.9 s of layers and 0.1 s of head; once, others had the core for 5 s of the head."""
    records = [plan(k, float(k)) for k in range(50)]
    for k in range(50):
        robbed_s = 5.0 if k == 20 else 0.0
        at = 10.0 * k
        own = span(0, k, at, at, at, at + 1 + robbed_s, head_s=at + 0.9)
        records.append(own._replace(cpu_s=1.0))
    parts = StepParts.fit(recording_of(records, 1, {}))
    [of_stage] = parts.parts(work_of(records[0]))
    assert sum(of_stage) == pytest.approx(0.9)


def prefill(index, start, tokens):
    planned = plan(index, 2.0 * index)
    return planned._replace(chunks=(Chunk(0, start, start + tokens, (), None, 1),))


def test_what_a_step_counts():
    """Position 10 to 13 see 10 to 13 before them and half of themselves: 4 x (10 + 2) pairs."""
    assert counts_of(work_of(prefill(0, 10, 4))) == (1.0, 4, 48.0, 0, 0)
    assert counts_of(work_of(plan(5, 0.0, requests=(1, 2)))) == (1.0, 0, 0, 2, 32)


def test_what_the_form_misses_at_a_size_is_prefill_and_no_imbalance():
    """10 ms a token; at 33 to 48 tokens, one and a half times that, on both stages. The second one
    is twice as slow: each is half a stage off the mean, of the measured time."""
    records, of_size = [], []
    for k in range(60):
        tokens = (20, 40, 100, 200)[k % 4]
        seconds = 0.01 * tokens * (1.5 if tokens == 40 else 1.0)
        planned, at = prefill(k, 0, tokens), 100.0 * k
        records += [planned, span(0, k, at, at, at, at + seconds)]
        records += [span(1, k, at, at + seconds, at + 10, at + 10 + 2 * seconds)]
        of_size += [planned] if tokens == 40 else []
    parts = StepParts.fit(recording_of(records, 2, {})).parts(work_of(of_size[0]))
    assert [sum(of_stage) for of_stage in parts] == pytest.approx([0.6, 1.2], rel=0.02)
    for of_stage, imbalance in zip(parts, (-0.3, 0.3), strict=True):
        assert of_stage[PREFILL] + of_stage[BASE] == pytest.approx(0.9, rel=0.02)
        assert of_stage[IMBALANCE] == pytest.approx(imbalance, rel=0.04)
        assert of_stage[DECODES] == of_stage[CONTEXT] == 0.0
