"""What comes of losses: whether a rank may be started again, and which request may be to blame.

Reads no clock.
"""

from collections import Counter, deque
from collections.abc import Sequence

from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Output, RequestId
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost

MOST_KILLS = 2
"""Losses that a request was aboard of, after which it runs alone."""
_CLEARED_BY = 4
"""Tokens that show that it was not this request."""


class Restarts:
    """How often each rank's stage was lost lately."""

    def __init__(self, topology: Topology, most: int, window_s: float) -> None:
        self._topology = topology
        self._most, self._window_s = most, window_s
        self._lost_s: dict[int, deque[float]] = {}

    def end_by(self, rank: int, lost: Lost, now: float) -> Lost | None:
        """What ends the run, if this loss does; else it is counted."""
        if lost.is_user_error or lost.is_final:
            return lost
        times = self._lost_s.setdefault(rank, deque())
        while times and now - times[0] > self._window_s:
            times.popleft()
        if len(times) < self._most:
            times.append(now)
            return None
        return Lost(
            f"{lost.why} ({self._topology.name(rank)} was started again {self._most} times within "
            f"{self._window_s:g} s, which is --max-restarts)"
        )


class Suspects:
    """Requests whose microbatch a stage was at when it was lost.

    Who was there twice, with few tokens between, may be what it dies of: it runs alone for a while.
    If a stage is lost with it then, too, it ends. Who has gone on for some tokens is cleared.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kills: Counter[RequestId] = Counter()
        self._alone: RequestId | None = None
        self._told: RequestId | None = None
        """Who the engine was told to run alone, last."""
        self._num_tokens: dict[RequestId, int] = {}
        """That each has got since the last loss that it was aboard of."""

    def lost_at(self, index: int, why: str, now: float) -> Output | None:
        """A stage was lost at that outstanding microbatch. Returns the end of the request that is
        to blame, if that is known by now."""
        aboard = self._engine.requests_of(index)
        self._kills.update(aboard)
        self._num_tokens.update(dict.fromkeys(aboard, 0))
        if self._alone is None or list(aboard) != [self._alone]:
            return None
        blamed = self._alone
        self.forget(blamed)
        output = self._engine.finish(blamed, "error", now)
        what = (
            f"a stage was lost at this request {MOST_KILLS + 1} times, the last time while it ran "
            f"alone ({why}); it is not tried again"
        )
        return None if output is None else output._replace(error=what)

    def came(self, outputs: Sequence[Output]) -> None:
        """Who has ended, or has got enough of them, is no suspect any more."""
        if not self._kills:
            return
        alone = self._alone
        for output in outputs:
            request = output.request_id
            if request in self._kills:
                self._num_tokens[request] += 1
                if self._num_tokens[request] >= _CLEARED_BY or output.finish_reason is not None:
                    self.forget(request)
        if self._alone != alone:
            self.isolate()

    def isolate(self) -> None:
        """Have one run alone, if there is one; else all may run."""
        if self._alone is None:
            worst = (request for request, kills in self._kills.items() if kills >= MOST_KILLS)
            self._alone = min(worst, default=None)
        if self._alone != self._told:
            self._engine.run_alone(self._alone)
            self._told = self._alone

    def forget(self, request: RequestId) -> None:
        """It has ended, or is cleared."""
        self._kills.pop(request, None)
        self._num_tokens.pop(request, None)
        if request == self._alone:
            self._alone = None
