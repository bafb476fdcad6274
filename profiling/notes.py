"""What a reader of a recording has to know: what is missing, what was lost."""

from collections.abc import Iterator

from pipeserve.profiling.ledger import Ledger
from pipeserve.profiling.recording import Recording


def notes_of(recording: Recording, ledger: Ledger | None) -> list[str]:
    """A line each; those that came with the recording first."""
    return [*recording.notes, *_seen(recording, ledger)]


def _seen(recording: Recording, ledger: Ledger | None) -> Iterator[str]:
    """What the records themselves show to be missing or amiss."""
    if not recording.completed:
        yield "no microbatch was completed"
    for stage, spans in enumerate(recording.spans):
        if not spans and ledger is not None:
            yield f"stage {stage} has no spans: all its time counts as idle"
    start_s = ledger.start_s if ledger is not None else 0.0
    for fault in recording.faults:
        at_s = fault.at_s - start_s
        yield f"stage {fault.stage} was lost after {at_s:,.3f} s: {fault.reason}"
    under_way = len(recording.arrived) - len(recording.ended)
    if under_way > 0:
        yield f"{under_way:,} of {len(recording.arrived):,} requests had not ended"
