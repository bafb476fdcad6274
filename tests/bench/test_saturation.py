"""What a run would have stood idle for without others on its cores, and without its ends."""

import pytest
from made_up_recording import made_up_recording
from saturation import PARTS, LeftAlone, idle_of

from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.recording.recording import Recording


def with_cpu(recording: Recording, share: float) -> Recording:
    """As if each stage had had its core so much of the time."""
    recording.spans = [
        [
            span._replace(cpu_s=share * (span.end_s - span.start_s), between_cpu_s=0.0)
            for span in spans
        ]
        for spans in recording.spans
    ]
    return recording


def busy_s(recording: Recording) -> list[float]:
    return [sum(span.end_s - span.start_s for span in spans) for spans in recording.spans]


def test_undisturbed_it_goes_as_it_went():
    recorded = with_cpu(made_up_recording(num_requests=30, rate=1e6), 1.0)
    alone = LeftAlone(recorded).run()
    assert busy_s(alone) == pytest.approx(busy_s(recorded))
    assert explain(alone).seconds == pytest.approx(explain(recorded).seconds, rel=0.02)


def test_disturbed_it_would_have_taken_what_the_stages_computed():
    recorded = with_cpu(made_up_recording(num_requests=30, rate=1e6), 0.5)
    alone = LeftAlone(recorded).run()
    assert busy_s(alone) == pytest.approx([each / 2 for each in busy_s(recorded)])
    assert explain(alone).seconds < 0.6 * explain(recorded).seconds
    for spans in alone.spans:  # one after the other, each behind what it needs
        assert all(span.start_s >= max(span.plan_s, span.input_s) for span in spans)
        ends_s = [span.end_s for span in spans]
        assert ends_s == sorted(ends_s)


def test_ends_are_cut_off_and_the_parts_are_the_whole():
    recorded = made_up_recording(num_requests=30, rate=1e6)
    ledger = explain(recorded)
    seconds, found = idle_of(recorded, ledger)
    whole, prompts, decodes = (seconds[part] for part in PARTS)
    assert prompts > 0 and decodes > 0
    assert whole == pytest.approx(prompts + decodes)
    assert whole == pytest.approx(recorded.spans[0][-1].end_s - recorded.spans[-1][0].start_s)
    for stage, (all_causes, *parts) in enumerate(found):
        assert all_causes["fill"] == all_causes["drain"] == 0
        for cause, idle_s in all_causes.items():
            assert idle_s == pytest.approx(sum(part[cause] for part in parts), abs=1e-9)
        inside_s = sum(
            min(interval.end_s, recorded.spans[0][-1].end_s)
            - max(interval.start_s, recorded.spans[-1][0].start_s)
            for interval in ledger.idle[stage]
            if interval.end_s > recorded.spans[-1][0].start_s
            and interval.start_s < recorded.spans[0][-1].end_s
        )
        assert sum(all_causes.values()) == pytest.approx(inside_s)
