"""Makes the records of a run (records.py) from what the host of an engine does, step by step.

The driver calls it for real stages, the simulator for its own. Where a run is not recorded, the
recorder is `records.ignore`. Nothing here decides anything.
"""

from collections.abc import Iterable

from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch, Output, Request, RequestId
from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Fault,
    Headed,
    Ping,
    Planned,
    Recorder,
    Span,
)


class Journal:
    """Its methods are called as the host does what they are named for. Between a wait and the plan
    that follows, it remembers what ended the wait.
    """

    def __init__(self, engine: Engine, record: Recorder) -> None:
        self._engine = engine
        self._record = record
        self._num_outputs: dict[RequestId, int] = {}
        self._waited_for = "no_requests"
        self._woken: tuple[int, float] | None = None
        """The completion that ended the wait, or -1, and when it came; None while it lasts."""
        self._handed_s = 0.0
        """When the microbatch before was handed to the stages."""

    def arrived(self, request: Request, now: float) -> None:
        self._num_outputs[request.id] = 0
        num_prompt = len(request.prompt)
        self._record(Arrived(request.id, now, num_prompt, request.max_tokens, request.priority))
        if self._waited_for != "window":  # which only a completion opens
            self._wake(-1, now)

    def finished(self, output: Output, now: float) -> None:
        """The caller ended a request."""
        self._end(output, now)
        if self._waited_for not in ("window", "no_requests"):
            self._wake(-1, now)  # its blocks and its place came free

    def waits(self, reason: str) -> None:
        """The engine had no plan."""
        self._waited_for, self._woken = reason, None

    def resumed(self, now: float) -> None:
        """After a fault: stages are there again."""
        self._waited_for, self._woken, self._handed_s = "", None, now

    def planned(self, microbatch: Microbatch, start_s: float, sent_s: float) -> None:
        engine, last = self._engine, self._engine.last
        cost = last.cost if last is not None else None
        after, woken_s = self._woken or (-1, self._handed_s)
        self._record(
            Planned(
                index=microbatch.index,
                waited_for=self._waited_for,
                after=after,
                woken_s=woken_s,
                start_s=start_s,
                sent_s=sent_s,
                chunks=microbatch.chunks,
                num_waiting=engine.num_waiting,
                num_running=engine.num_running,
                num_free_blocks=engine.num_free_blocks,
                predicted_s=cost.seconds if cost is not None else (),
                window=engine.window,
            )
        )
        self._waited_for, self._woken, self._handed_s = "", None, sent_s

    def completed(self, completed: Completed, outputs: Iterable[Output]) -> None:
        self._record(completed)
        if self._waited_for != "no_requests":  # which only an arrival ends
            self._wake(completed.index, completed.received_s)
        for output in outputs:
            if output.token is not None:
                self._num_outputs[output.request_id] += 1
            if output.finish_reason is not None:
                self._end(output, completed.done_s)

    def computed(self, did: Span | Headed) -> None:
        self._record(did)

    def pinged(self, ping: Ping) -> None:
        self._record(ping)

    def lost(self, stage: int, now: float, reason: str) -> None:
        self._record(Fault(stage, now, reason))

    def _end(self, output: Output, now: float) -> None:
        assert output.finish_reason is not None
        num_outputs = self._num_outputs.pop(output.request_id)
        self._record(Ended(output.request_id, now, output.finish_reason, num_outputs))

    def _wake(self, after: int, at_s: float) -> None:
        """The first that opens the window, or brings a request, ends the wait; for KV or tokens,
        which one it was shows only when all are taken up: the last."""
        if self._waited_for and (self._woken is None or self._waited_for in ("kv", "token")):
            self._woken = after, at_s
