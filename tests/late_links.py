"""What real stages say to each other and hear from the driver, each as late as one likes: a process
that carries the messages.

A process, not a thread of the driver's: it would wait for the driver, and the driver for it.
"""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec
import zmq

from pipeserve import control, links
from pipeserve.control import StageReady, StartStage

_NEVER = float("inf")


class LateLinks:
    """Around the stages of one pipeline; on time until `late_s` says otherwise."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._num_stages = 0

    def before_start(self, jobs: Sequence[StartStage]) -> list[StartStage]:
        """The same jobs, for stages that reach the driver by way of here."""
        self._num_stages = len(jobs)
        there = self._ask(*[job.control for job in jobs])
        return [msgspec.structs.replace(j, control=at) for j, at in zip(jobs, there, strict=True)]

    def between(self, ready: Sequence[StageReady]) -> list[StageReady]:
        """The same stages, which reach each other by way of here."""
        there = iter(self._ask(*[s.activations_at for s in ready[1:]], ready[0].tokens_at))
        others = [msgspec.structs.replace(s, activations_at=next(there)) for s in ready[1:]]
        return [msgspec.structs.replace(ready[0], tokens_at=next(there)), *others]

    def late_s(self, by_seam: Mapping[int, float], feedback_s: float, plans_s: float) -> None:
        """From now on; what is under way comes at once."""
        seams = [by_seam.get(seam, 0.0) for seam in range(self._num_stages - 1)]
        self._ask(*map(str, [*[plans_s, 0.0] * self._num_stages, *seams, feedback_s]))

    def close(self) -> None:
        self._process.stdin.close()  # by which it ends
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, *words: str) -> list[str]:
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().split()


class _Way:
    """One direction."""

    def __init__(self, source: zmq.Socket, target: zmq.Socket) -> None:
        self.source, self.target = source, target
        self.late_s = 0.0
        self.waiting: deque[tuple[float, list[zmq.Frame]]] = deque()

    def take(self) -> None:
        """All that has come."""
        while self.source.poll(0):
            frames = self.source.recv_multipart(copy=False)
            self.waiting.append((time.monotonic() + self.late_s, frames))

    def change(self, late_s: float) -> None:
        """The tokens of a run that has ended keep those of the next one waiting no longer."""
        self.take()
        self.late_s = late_s
        self.waiting = deque((0.0, frames) for _, frames in self.waiting)

    def give(self) -> float:
        """What is due; returns when the next will be."""
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            self.target.send_multipart(self.waiting.popleft()[1], copy=False)
        return self.waiting[0][0] if self.waiting else _NEVER


def _to_driver(context: zmq.Context, endpoint: str, stage: int) -> tuple[str, list[_Way]]:
    """Where the stage finds its driver, and the ways from and to it."""
    driver, here = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    driver.identity = control.stage_identity(stage)
    driver.connect(endpoint)
    port = here.bind_to_random_port("tcp://127.0.0.1")
    return f"tcp://127.0.0.1:{port}", [_Way(driver, here), _Way(here, driver)]


def _to_stage(context: zmq.Context, endpoint: str) -> tuple[str, list[_Way]]:
    source, address = links.listen(context, "127.0.0.1")
    return address, [_Way(source, links.connect(context, endpoint))]


def main() -> None:
    """Lines from standard input: endpoints of the driver, then of the stages, then, any number of
    times, the delays of all ways."""
    context = zmq.Context()
    poller = zmq.Poller()
    poller.register(sys.stdin, zmq.POLLIN)
    ways: list[_Way] = []
    num_lines, due_s = 0, _NEVER
    while True:
        # `poll` rounds up to milliseconds: the last one is spent looking.
        timeout = None if due_s == _NEVER else max(int((due_s - time.monotonic()) * 1000), 0)
        if sys.stdin.fileno() in dict(poller.poll(timeout)):
            words = sys.stdin.readline().split()
            if not words:
                break
            num_lines += 1
            if num_lines <= 2:
                made = [
                    _to_driver(context, word, place) if num_lines == 1 else _to_stage(context, word)
                    for place, word in enumerate(words)
                ]
                ways += [way for _, new in made for way in new]
                for way in ways:
                    poller.register(way.source, zmq.POLLIN)
                print(*[address for address, _ in made], flush=True)
            else:
                for way, late_s in zip(ways, words, strict=True):
                    way.change(float(late_s))
                print(flush=True)
        for way in ways:
            way.take()
        due_s = min([way.give() for way in ways], default=_NEVER)
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
