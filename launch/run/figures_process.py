"""The process that makes the figures of the stages. A server's driver starts it and hands it its
records through a socket (`figures.py`). It ends when the driver does, and gives way to whatever
else wants a core.
"""

import contextlib
import os
import socket
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable

import msgspec

from pipeserve.core.records import Planned, Record, Span
from pipeserve.profiling.ledger.running import RunningLedger
from pipeserve.profiling.recording.packed import unpack
from pipeserve.wire.client import STEP_S, STEP_TOKENS, Distribution, StageFigures

MODULE = "pipeserve.launch.run.figures_process"
WHOLE, BROKEN = 0, 1
"""The first byte of what comes: whether records are missing before it. Packed records follow."""
MOST_BYTES = 1 << 20
"""Of a message, either way."""
_FIRST_S, _EVERY_S = 1.0, 5.0
"""Until the first figures, and from one set of them to the next."""
_NICE = 10
_MOST_PREDICTIONS = 1024
"""Kept until they are measured: more than are ever outstanding."""

_encode = msgspec.msgpack.Encoder().encode


class Spread:
    """How many values came to lie in each bucket."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def told(self) -> Distribution:
        return Distribution(self._counts, self._sum)


class Steps:
    """The microbatches of one stage."""

    def __init__(self) -> None:
        self.seconds, self.tokens = Spread(STEP_S), Spread(STEP_TOKENS)
        self.predicted_s = self.measured_s = self.off_s = 0.0


class Counted:
    """All that is made of the records."""

    def __init__(self, num_stages: int, now: float) -> None:
        self._ledger = RunningLedger(num_stages, now)
        self._steps = [Steps() for _ in range(num_stages)]
        self._predicted: dict[int, tuple[float, ...]] = {}
        """Of each microbatch that a stage may still tell of."""

    def take(self, records: Iterable[Record], *, is_broken: bool) -> None:
        """`is_broken`: some are missing before them."""
        if is_broken:
            self._ledger.miss()
        for record in records:
            self._ledger.take(record)
            if type(record) is Planned and record.predicted_s:
                self._predict(record)
            elif type(record) is Span:
                self._count(record)

    def _predict(self, planned: Planned) -> None:
        self._predicted[planned.index] = planned.predicted_s
        if len(self._predicted) > _MOST_PREDICTIONS:
            del self._predicted[next(iter(self._predicted))]

    def _count(self, span: Span) -> None:
        steps, seconds = self._steps[span.stage], span.end_s - span.start_s
        steps.seconds.add(seconds)
        steps.tokens.add(span.num_tokens)
        predicted_s = self._predicted.get(span.index)
        if predicted_s is not None:
            steps.predicted_s += predicted_s[span.stage]
            steps.measured_s += seconds
            steps.off_s += abs(seconds - predicted_s[span.stage])

    def told(self, now: float) -> list[StageFigures]:
        self._ledger.advance(now)
        return [
            StageFigures(
                seconds=seconds,
                steps=steps.seconds.told(),
                tokens=steps.tokens.told(),
                predicted_s=steps.predicted_s,
                measured_s=steps.measured_s,
                off_s=steps.off_s,
            )
            for seconds, steps in zip(self._ledger.seconds, self._steps, strict=True)
        ]


def serve(driver: socket.socket, num_stages: int) -> None:
    """From the first page on, which comes when the stages are up, until the driver hangs up."""
    page = driver.recv(MOST_BYTES)
    now = time.monotonic()
    counted, next_s = Counted(num_stages, now), now + _FIRST_S
    while page:
        counted.take(unpack(page[1:]), is_broken=page[0] == BROKEN)
        while (page := _next_page(driver, next_s)) is None:
            now = time.monotonic()
            next_s = now + _EVERY_S
            driver.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # it has not read the last ones yet
                driver.send(_encode(counted.told(now)))


def _next_page(driver: socket.socket, until_s: float) -> bytes | None:
    """None: it is time to tell; nothing: the driver has hung up."""
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        return None
    driver.settimeout(left_s)
    try:
        return driver.recv(MOST_BYTES)
    except TimeoutError:
        return None


def main() -> None:
    os.nice(_NICE)
    driver = socket.socket(fileno=int(sys.argv[1]))
    with driver, contextlib.suppress(ConnectionError):  # the driver has gone
        serve(driver, int(sys.argv[2]))


if __name__ == "__main__":
    main()
