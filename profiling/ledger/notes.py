"""What a reader of a recording has to know: what is missing, what was lost."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median_low

from pipeserve.core.records import Headed, Span
from pipeserve.profiling.ledger.faults import FaultCost
from pipeserve.profiling.ledger.ledger import Ledger
from pipeserve.profiling.recording.recording import Recording

_TOLERANCE_S = 1e-6


def notes_of(recording: Recording, ledger: Ledger | None) -> list[str]:
    """A line each; those that came with the recording first."""
    return [*recording.notes, *window_notes(recording), *_seen(recording, ledger)]


def window_notes(recording: Recording) -> list[str]:
    """Where there were more microbatches in flight than stages, because links are slow."""
    windows = [plan.window for plan in recording.planned if plan.window]
    if not windows or min(windows) == max(windows):
        return []
    return [
        f"{min(windows)} to {max(windows)} microbatches in flight, by the delay of links and "
        f"messages (mostly {median_low(windows)}); --pipeline-window fixes their number"
    ]


def _seen(recording: Recording, ledger: Ledger | None) -> Iterator[str]:
    """What the records themselves show to be missing or amiss."""
    if not recording.completed:
        yield "no microbatch was completed"
    for stage, spans in enumerate(recording.spans):
        if not spans and ledger is not None:
            yield f"stage {stage} has no spans: all its time counts as idle"
        heads = recording.headed if stage == 0 else ()
        if num_odd := _num_out_of_order(spans, heads):
            yield (
                f"stage {stage}: {num_odd:,} microbatches end before they start, or start before "
                "the one before has ended: times in its file are damaged"
            )
    start_s = ledger.start_s if ledger is not None else 0.0
    costs = {cost.fault: _cost(cost) for cost in ledger.faults} if ledger is not None else {}
    for fault in recording.faults:
        at_s = fault.at_s - start_s
        lost = f"stage {fault.stage} was lost after {at_s:,.3f} s: {fault.reason}"
        yield lost + costs.get(fault, "")
    under_way = len(recording.arrived) - len(recording.ended)
    if under_way > 0:
        yield (
            f"{under_way:,} of {len(recording.arrived):,} requests had not ended: the run was "
            "killed, or its records were lost"
        )


def _cost(cost: FaultCost) -> str:
    if not cost.idle_s:
        return "; the one before was not over"
    again_s = sum(cost.again_s) / len(cost.again_s)
    return (
        f"; nothing was computed for {cost.idle_s:,.3f} s, and then {cost.num_tokens:,} tokens "
        f"again, in {again_s:,.3f} s of each stage"
    )


def _num_out_of_order(spans: Sequence[Span], heads: Sequence[Headed]) -> int:
    """A stage runs one microbatch at a time, in the order of indices, and heads in between."""
    by_index = sorted(spans, key=lambda span: span.index)
    num_overlapping = sum(
        later.start_s < span.end_s - _TOLERANCE_S for span, later in pairwise(by_index)
    )
    starts_s = [span.start_s for span in by_index]
    num_within = sum(
        place > 0 and head.start_s < by_index[place - 1].end_s - _TOLERANCE_S
        for head in heads
        for place in (bisect_left(starts_s, head.start_s),)
    )
    return num_overlapping + num_within + sum(d.end_s < d.start_s for d in (*by_index, *heads))
