"""When a recorded run began and ended."""

from pipeserve.profiling.recording.recording import Recording


def is_whole(recording: Recording) -> bool:
    """Whether the run's beginning was kept: its first arrival is before its first plan."""
    arrived, planned = recording.arrived, recording.planned
    return bool(arrived and planned) and arrived[0].at_s <= planned[0].sent_s


def bounds_of(recording: Recording) -> tuple[float, float]:
    """First arrival (or when every stage had begun, of a run whose beginning was not kept), and
    last result or last fault (or last end, where the driver's records are missing)."""
    stages = [spans for spans in recording.spans if spans]
    start_s = (
        recording.arrived[0].at_s
        if is_whole(recording)
        else max(spans[0].start_s for spans in stages)
    )
    stops = [completed.received_s for completed in recording.completed[-1:]]
    stops += [fault.at_s for fault in recording.faults[-1:]]
    stops = stops or [did[-1].end_s for did in (*stages, recording.headed) if did]
    return start_s, max(*stops, start_s)
