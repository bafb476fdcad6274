"""What comes of losses: whether a rank may be started again, and which request may be to blame.

Plain counting; reads no clock.
"""

from collections import Counter, deque
from collections.abc import Iterable

from pipeserve.core.nouns import RequestId
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost

MOST_KILLS = 2
"""Losses that a request may have been aboard of; after that it runs alone."""
_CLEARED_BY = 16
"""Tokens of a request alone that show that it was not it."""


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

    Who was there twice may be what it dies of: it runs alone for a while. If a stage is lost with it
    then, too, it ends; else it is cleared.
    """

    def __init__(self) -> None:
        self._kills: Counter[RequestId] = Counter()
        self.alone: RequestId | None = None
        self._num_tokens = 0
        """Of that one, since it is alone."""

    def aboard(self, requests: Iterable[RequestId]) -> RequestId | None:
        """A stage was lost at a microbatch of these. Returns the one that was alone in it."""
        requests = list(requests)
        self._kills.update(requests)
        return self.alone if self.alone is not None and requests == [self.alone] else None

    @property
    def are_there(self) -> bool:
        """Any."""
        return bool(self._kills)

    def next(self) -> RequestId | None:
        """Who is to run alone now."""
        if self.alone is None:
            worst = (request for request, kills in self._kills.items() if kills >= MOST_KILLS)
            self.alone, self._num_tokens = min(worst, default=None), 0
        return self.alone

    def is_cleared(self, request: RequestId) -> bool:
        """It has given one more token; whether that is enough, of the one that is alone."""
        if request != self.alone:
            return False
        self._num_tokens += 1
        return self._num_tokens >= _CLEARED_BY

    def forget(self, request: RequestId) -> None:
        """It has ended, or is cleared."""
        self._kills.pop(request, None)
        if request == self.alone:
            self.alone = None
