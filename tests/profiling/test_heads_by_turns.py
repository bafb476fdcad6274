"""Recordings of pipelines whose ends take turns with the head: idle time, clocks, pages."""

from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeserve.core.nouns import Chunk
from pipeserve.core.records import Arrived, Completed, Headed, Ping, Planned, Span
from pipeserve.profiling.ledger.bounds import bounds_of
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.ledger.notes import notes_of
from pipeserve.profiling.ledger.running import COMPUTING, RunningLedger
from pipeserve.profiling.pages.perfetto import events
from pipeserve.profiling.recording.clocks import align
from pipeserve.profiling.recording.recording import recording_of

NUM = 60
WINDOW = 3


def run(
    *, step_s=0.010, head_s=0.004, link_s=0.0, rows_s=0.0, message_s=0.0, pause=None, to_first=None
):
    """Two stages and three groups of decodes, each planned when its tokens are known. The head is
    at the first stage where `to_first(index)` says so, by default every other time. `pause`:
    seconds of a stage before a microbatch's layers."""
    to_first = to_first or (lambda index: index % 2 == 1)
    pause = pause or (lambda stage, index: 0.0)
    records, heads, known_s, rows_at = [Arrived(0, 0.0, 10, 99)], {}, {}, {}
    free_s = [0.0, 0.0]

    def head(index):
        start_s = max(free_s[0], rows_at[index])
        free_s[0] = end_s = start_s + head_s
        seen_s = rows_at.pop(index)
        heads[index] = Headed(0, index, seen_s, start_s, end_s, end_s, nan, nan)
        known_s[index] = end_s + message_s

    def heads_there_by(time_s):
        while rows_at and rows_at[min(rows_at)] <= max(time_s, free_s[0]):
            head(min(rows_at))

    for index in range(NUM):
        before = index - WINDOW
        while before >= 0 and before not in known_s:
            head(min(rows_at))
        sent_s = known_s.get(before, 0.0)
        request = index % WINDOW
        waited = "window" if before >= 0 else ""
        chunks = (Chunk(request, 20 + index, 21 + index, (), None, 1),)
        records.append(
            Planned(index, waited, max(before, -1), sent_s, sent_s, sent_s, chunks, 0, 3, 9, ())
        )
        plan_s = there_s = sent_s + message_s
        heads_there_by(plan_s)
        input_s = -inf
        for stage in (0, 1):
            start_s = max(there_s, free_s[stage])
            computed_s = start_s + step_s + pause(stage, index)
            is_here = stage == 1 and not to_first(index)
            free_s[stage] = end_s = computed_s + head_s * is_here
            times = plan_s, input_s, start_s, computed_s, end_s, end_s, nan, nan
            records.append(Span(stage, index, 1, *times, 0))
            there_s = input_s = end_s + link_s
        if to_first(index):
            rows_at[index] = end_s + rows_s
        else:
            known_s[index] = end_s + message_s
    for index in sorted(rows_at):
        head(index)
    records += heads.values()
    taken_up_s = 0.0
    for index in range(NUM):  # in their order, as the driver does
        taken_up_s = max(taken_up_s, known_s[index])
        records.append(Completed(index, 0.0, taken_up_s, taken_up_s, (1,)))
    return recording_of(records, 2, {})


def total(ledger):
    found = {}
    for stage in range(2):
        for cause, seconds in ledger.idle_s(stage).items():
            found[cause] = found.get(cause, 0.0) + seconds
    return found


def busy_s(recording, stage):
    computed = [*recording.spans[stage], *(recording.headed if stage == 0 else ())]
    return sum(did.end_s - did.start_s for did in computed)


lengths = st.floats(0.0, 0.02)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.builds(dict, head_s=lengths, link_s=lengths, rows_s=lengths, message_s=lengths),
    st.integers(0, 2**20 - 1),
    st.floats(0.0, 0.05),
)
def test_computing_heads_and_causes_are_wall_time(seconds, turns, pause_s):
    recording = run(
        **seconds,
        to_first=lambda index: bool(turns >> index % 20 & 1),
        pause=lambda stage, index: pause_s * (index % 7 == 3 and stage == index % 2),
    )
    ledger = explain(recording)
    assert ledger.seconds > 0
    for stage in range(2):
        assert ledger.busy_s[stage] == pytest.approx(busy_s(recording, stage))
        idle_s = ledger.idle_s(stage)
        assert min(idle_s.values()) >= 0
        assert ledger.busy_s[stage] + sum(idle_s.values()) == pytest.approx(ledger.seconds)
        assert idle_s["unknown"] == 0
    assert not [note for note in notes_of(recording, ledger) if "damaged" in note]


@pytest.mark.parametrize(
    ("planted", "cause", "least"),
    [
        ({"link_s": 0.02}, "link", 0.95),
        ({"rows_s": 0.04}, "link", 0.95),
        ({"message_s": 0.01}, "control", 0.8),
        ({"pause": lambda stage, index: 0.01 * (stage == 1)}, "stage_imbalance", 0.9),
        ({"head_s": 0.05}, "head_and_sampling", 0.95),
    ],
)
def test_what_is_planted_is_what_the_ledger_says(planted, cause, least):
    """Slower messages make the round so long that the heads are no longer hidden, either."""
    before, after = total(explain(run())), total(explain(run(**planted)))
    added = {name: after[name] - before[name] for name in after if name != "drain"}
    assert added[cause] > least * sum(added.values()) > 0, added


def test_a_damaged_recording_still_sums_up():
    whole = run(link_s=0.003)
    for lost in ({"planned": []}, {"completed": []}, {"headed": whole.headed[::2]},
                 {"spans": [[], whole.spans[1]]}, {"spans": [whole.spans[0], []]},
                 {"spans": [whole.spans[0][::3], whole.spans[1][::2]]}):  # fmt: skip
        ledger = explain(replace(whole, **lost))
        for stage in range(2):
            idle_s = sum(ledger.idle_s(stage).values())
            assert ledger.busy_s[stage] + idle_s == pytest.approx(ledger.seconds)


def test_a_run_without_results_ends_with_its_last_head():
    recording = replace(run(to_first=lambda index: True), completed=[], faults=[])
    assert bounds_of(recording)[1] == recording.headed[-1].end_s


def test_pieces_come_to_the_whole():
    recording = run(link_s=0.005)
    whole, running = explain(recording), RunningLedger(2, 0.0)
    told = [*recording.planned, *recording.completed, *recording.spans[0], *recording.spans[1]]
    told = sorted([*told, *recording.headed], key=lambda r: getattr(r, "done_s", 0) or r.sent_s)
    running.take(recording.arrived[0])
    for number, record in enumerate(told):
        running.take(record)
        if number % 40 == 39:
            running.advance(0.0)
    running.advance(0.0)
    for stage, seconds in enumerate(running.seconds):
        assert seconds[COMPUTING] == pytest.approx(whole.busy_s[stage], rel=0.02)
        assert seconds["link"] == pytest.approx(whole.idle_s(stage)["link"], rel=0.1, abs=0.005)
        assert seconds["unknown"] < 1e-6


@pytest.mark.parametrize("stage", [0, 1])
def test_clocks_of_two_machines(stage):
    """The driver hears of a token from the end that sampled it."""
    truth = run(step_s=0.1, head_s=0.04, link_s=0.002, rows_s=0.002, message_s=0.002)
    ahead_s = 3.0

    def moved(did):
        names = [name for name in ("plan_s", "input_s", "start_s", "head_s", "end_s", "sent_s")
                 if hasattr(did, name)]  # fmt: skip
        return did._replace(**{name: getattr(did, name) + ahead_s for name in names})

    spans = [list(map(moved, s)) if n == stage else s for n, s in enumerate(truth.spans)]
    headed = list(map(moved, truth.headed)) if stage == 0 else truth.headed
    pings = [Ping(stage, at, at + 0.02 + ahead_s, at + 0.04) for at in (1.0, 5.0, 9.0)]
    found = align(replace(truth, spans=spans, headed=headed, pings=pings))
    assert "do not run evenly" not in found.recording.notes[-1]
    assert found.residuals_s[stage] < 0.004
    for true, ours in ((truth.spans[stage], found.recording.spans[stage]),
                       (truth.headed, found.recording.headed)):  # fmt: skip
        errors = [abs(a.start_s - b.start_s) for a, b in zip(true, ours, strict=True)]
        assert max(errors) <= found.residuals_s[stage]


def test_a_head_is_a_slice_of_its_own():
    recording = run()
    slices = [event for event in events(recording, explain(recording)) if event["ph"] == "X"]
    names = [event["name"] for event in slices if event["tid"] == 2]
    assert [f"{head.index} head" for head in recording.headed] == [n for n in names if "head" in n]
