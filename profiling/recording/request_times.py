"""When each request's tokens became known, from a recording: what `summary` takes."""

from pipeserve.core.nouns import RequestId
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.summary import RequestRecord


def token_times(recording: Recording) -> dict[RequestId, list[float]]:
    """Seconds of the driver's clock at which each token of a request was known, in order.

    A chunk gives its request as many tokens as it sampled when its microbatch is completed. Those
    that came after a request had ended were dropped, and are left out.
    """
    completed = {completed.index: completed for completed in recording.completed}
    times: dict[RequestId, list[float]] = {arrived.request_id: [] for arrived in recording.arrived}
    for planned in recording.planned:
        done = completed.get(planned.index)
        if done is None:  # under way when the run ended, or lost by a fault
            continue
        for chunk, count in zip(planned.chunks, done.counts, strict=False):  # may be damaged
            if count:
                times.setdefault(chunk.request_id, []).extend([done.done_s] * count)
    num_told = {ended.request_id: ended.num_output_tokens for ended in recording.ended}
    return {request: known[: num_told.get(request)] for request, known in times.items()}


def request_records(recording: Recording) -> dict[RequestId, RequestRecord]:
    """Of every request that arrived, by order of arrival; those without a token too."""
    times = token_times(recording)
    return {
        arrived.request_id: RequestRecord(
            num_prompt_tokens=arrived.num_prompt_tokens,
            arrival_s=arrived.at_s,
            token_times_s=tuple(times[arrived.request_id]),
        )
        for arrived in recording.arrived
    }


def records_of(recording: Recording) -> list[RequestRecord]:
    """What `summary.summarize` takes: the requests that have a token at least, by arrival."""
    return [record for record in request_records(recording).values() if record.token_times_s]
