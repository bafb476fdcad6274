"""The heads that the first stage of a simulated pipeline is to apply (`core/head_share.py`).

All else is served in the order of plans, so its times are settled when it is planned. A head is
not: the first stage applies it between two microbatches of its own, when the rows have come back,
before a microbatch that could begin no earlier and behind one that could. So it is settled once the
next microbatch is planned, or time has passed its beginning. Until then its times are those that
come true if no microbatch begins before it.
"""

from collections import deque
from collections.abc import Callable

from pipeserve.profiling.simulation.simulated_records import Flight, Head


class FirstStageHeads:
    """Of one pipeline: those that are not settled yet, in the order of microbatches, which is that
    of their rows."""

    def __init__(self, control_s: float, begins: Callable[[Flight], None]) -> None:
        """`begins` is told of each head whose times are settled, in order."""
        self._control_s, self._begins = control_s, begins
        self._waiting: deque[Flight] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, flight: Flight, input_s: float, seconds: float) -> None:
        """`input_s`: its rows are there. `come_after` says the rest."""
        flight.head = Head(input_s, seconds, input_s)
        self._waiting.append(flight)

    def before(self, there_s: float, free_s: float) -> float:
        """Settles those that begin before a microbatch that is there at `there_s`, or later, and
        returns when the stage is free for it. `free_s`: of all that was settled before."""
        while self._waiting:
            head = self._waiting[0].head
            assert head is not None
            if head.start_s > max(there_s, free_s):
                break
            free_s = head.end_s
            self._begins(self._waiting.popleft())
        return free_s

    def come_after(self, free_s: float) -> None:
        """All that wait begin when the stage is free, at `free_s`, or later."""
        for flight in self._waiting:
            assert flight.head is not None
            head = flight.head = flight.head.begun(free_s)
            free_s = head.end_s
            flight.known_s = free_s + self._control_s

    def forget(self) -> None:
        """They are void."""
        self._waiting.clear()
