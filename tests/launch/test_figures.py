"""The figures of the stages while a server runs: made beside the driver, which never waits."""

import time

import pytest
from made_up_recording import made_up_recording

from pipeserve.launch.run.figures import RunningFigures
from pipeserve.launch.run.figures_process import Counted


def records_of(recording):
    for planned, completed, *spans in zip(
        recording.planned, recording.completed, *recording.spans, strict=True
    ):
        yield planned._replace(predicted_s=(0.01, 0.02))
        yield from spans
        yield completed


@pytest.fixture(scope="module")
def recording():
    return made_up_recording(num_requests=40)


def test_what_is_counted_of_each_stage(recording):
    counted = Counted(2, recording.arrived[0].at_s)
    counted.take(records_of(recording), is_broken=False)
    figures = counted.told(recording.completed[-1].done_s)
    for each, spans, predicted_s in zip(figures, recording.spans, (0.01, 0.02), strict=True):
        took = [span.end_s - span.start_s for span in spans]
        assert sum(each.steps.counts) == sum(each.tokens.counts) == len(spans)
        assert each.steps.sum == pytest.approx(sum(took))
        assert each.tokens.sum == sum(span.num_tokens for span in spans)
        assert each.predicted_s == pytest.approx(predicted_s * len(spans))
        assert each.measured_s == pytest.approx(sum(took))
        assert each.off_s == pytest.approx(sum(abs(s - predicted_s) for s in took))
        assert each.seconds["computing"] == pytest.approx(sum(took), rel=0.05)


def test_a_process_makes_them(recording):
    with RunningFigures(2) as figures:
        for record in records_of(recording):
            figures.record(record)
        deadline = time.monotonic() + 60
        while not (latest := figures.latest()) or not sum(latest[0].steps.counts):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert sum(latest[1].steps.counts) == len(recording.spans[1])
        process = figures._process
    assert process.poll() == 0


def test_what_is_not_taken_is_dropped(recording):
    """Its process stands still, and then has gone: the driver goes on, and keeps little."""
    with RunningFigures(2) as figures:
        figures._process.kill()
        figures._process.wait()
        record, num_bytes = recording.planned[5], 0
        for _ in range(100_000):
            figures.record(record)
        num_bytes = sum(map(len, figures._pages)) + len(figures._page)
        assert num_bytes < 3 << 20
        assert figures.latest() == []
