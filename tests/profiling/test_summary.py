"""The numbers of a run, from records and spans made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.core.records import Span
from pipeserve.profiling.recording.summary import (
    RequestRecord,
    busy_shares,
    cpu_shares,
    percentiles,
    summarize,
)


def _span(stage, start_s, end_s, cpu_s=0.0):
    return Span(
        stage=stage, index=0, num_tokens=1, plan_s=start_s, input_s=start_s, start_s=start_s,
        head_s=end_s, end_s=end_s, sent_s=end_s, cpu_s=cpu_s, between_cpu_s=0.0, num_bytes=0,
    )  # fmt: skip


def _record(num_prompt_tokens, arrival_s, *token_times_s):
    return RequestRecord(
        num_prompt_tokens=num_prompt_tokens, arrival_s=arrival_s, token_times_s=token_times_s
    )


def test_summary():
    summary = summarize([_record(10, 100.0, 101.0, 101.5, 103.0), _record(5, 101.0, 104.0)])
    assert (summary.requests, summary.prompt_tokens, summary.output_tokens) == (2, 15, 4)
    assert summary.seconds == 4.0
    assert summary.total_tokens_per_s == 19 / 4
    assert summary.output_tokens_per_s == 1.0
    assert summary.ttft_s.p50 == 2.0  # of 1 and 3
    assert summary.tbt_s.p50 == 1.0  # of 0.5 and 1.5


def test_no_gap_no_time_between_tokens():
    assert summarize([_record(1, 0.0, 1.0)]).tbt_s is None


def test_percentiles_interpolate():
    result = percentiles([40, 10, 20, 30])
    assert (result.p50, result.p90, result.p99) == pytest.approx((25, 37, 39.7))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_percentiles_are_numpys(values):
    numpy = pytest.importorskip("numpy")
    result = percentiles(values)
    expected = numpy.percentile(values, [50, 90, 99])
    assert (result.p50, result.p90, result.p99) == pytest.approx(tuple(expected), abs=1e-6)


def test_overlap_counts_once_and_outside_not_at_all():
    spans = [_span(0, 1, 3), _span(0, 2, 4), _span(0, 9, 20), _span(1, -5, 0), _span(0, -1, 0.5)]
    assert busy_shares(spans, 3, 0.0, 10.0) == pytest.approx([0.45, 0.0, 0.0])


def test_a_span_within_another():
    assert busy_shares([_span(0, 0, 8), _span(0, 1, 2), _span(0, 7, 9)], 1, 0.0, 10.0) == [0.9]


@given(
    spans=st.lists(st.tuples(st.integers(-5, 25), st.integers(0, 10)), max_size=12),
    window=st.tuples(st.integers(0, 10), st.integers(1, 10)),
)
def test_busy_against_counting_seconds(spans, window):
    start, stop = window[0], window[0] + window[1]
    made = [_span(0, first, first + length) for first, length in spans]
    covered = {s for first, length in spans for s in range(first, first + length)}
    expected = len(covered & set(range(start, stop))) / (stop - start)
    assert busy_shares(made, 1, start, stop) == pytest.approx([expected])


def test_cpu_share_of_a_stage_robbed_of_its_core():
    spans = [_span(0, 0, 4, cpu_s=2.0), _span(0, 8, 12, cpu_s=4.0)]
    assert cpu_shares(spans, 1, 0.0, 10.0) == pytest.approx([0.4])
