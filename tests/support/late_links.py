"""What real stages say to each other and hear from the driver, each as late as one likes: a process
that carries the messages.

A process, not a thread of the driver's: it would wait for the driver, and the driver for it.
"""

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pipeserve.driver.fleet import Fleet
from pipeserve.wire.connecting import connect
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import StageReady
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Source, Sources
from pipeserve.wire.stage_job import StartStage

_NEVER = float("inf")
_LINKS = {"activations_at": "activations", "tokens_at": "tokens", "rows_at": "rows"}
"""Where a stage says that it listens, and for what."""


class LateLinks:
    """Around the stages of one pipeline; on time until `late_s` says otherwise."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._num_stages = 0
        self._links: list[tuple[int, str]] = []
        """Between stages: who listens, and where it says so."""

    def before_start(self, jobs: Sequence[StartStage], fleet: Fleet) -> list[StartStage]:
        """The same jobs, for stages that reach the driver by way of here."""
        self._num_stages = len(jobs)
        addresses = [f"stage@{fleet.address}{job.control}" for job in jobs]
        there = self._ask(fleet.secret.hex(), *addresses)
        return [msgspec.structs.replace(j, control=at) for j, at in zip(jobs, there, strict=True)]

    def between(self, ready: Sequence[StageReady]) -> list[StageReady]:
        """The same stages, which reach each other by way of here."""
        self._links = [
            (n, at) for n, stage in enumerate(ready) for at in _LINKS if getattr(stage, at)
        ]
        there = iter(self._ask(*[f"{_LINKS[at]}@{getattr(ready[n], at)}" for n, at in self._links]))
        found = list(ready)
        for number, at in self._links:
            found[number] = msgspec.structs.replace(found[number], **{at: next(there)})
        return found

    def late_s(
        self,
        by_seam: Mapping[int, float],
        feedback_s: float,
        plans_s: float,
        results_s: float = 0.0,
        to_last_s: float = 0.0,
    ) -> None:
        """From now on; what is under way comes at once. The seam behind the last stage is that of
        rows, to the first one. `feedback_s`: of tokens to the first stage; `to_last_s`: of those to
        the last one, where both sample."""
        # Of a connection first the way from who listens to who connects, and then the other.
        ways = [*[plans_s, results_s] * self._num_stages]
        for number, at in self._links:
            seam_s = by_seam.get((number - 1) % self._num_stages, 0.0)
            tokens_s = to_last_s if number else feedback_s
            ways += [0.0, tokens_s if at == "tokens_at" else seam_s]
        self._ask(*map(str, ways))

    def all_late_s(self, late_s: float) -> None:
        """Every message of stages, each way, as between hosts that far from each other."""
        seams = dict.fromkeys(range(self._num_stages), late_s)
        self.late_s(seams, late_s, late_s, late_s, late_s)

    def close(self) -> None:
        self._process.stdin.close()  # by which it ends
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, *words: str) -> list[str]:
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().split()


def through(links: LateLinks) -> type[Fleet]:
    """Of a driver whose stages are reached, and reach each other, by way of these links."""

    class LinkedFleet(Fleet):
        def start(self, jobs: Sequence[StartStage]) -> None:
            super().start(links.before_start(jobs, self))

        def _connect(self, stages: Sequence[StageReady]) -> None:
            super()._connect(links.between(stages))

    return LinkedFleet


class _Way:
    """One direction."""

    def __init__(self, give: Callable[[Any], None]) -> None:
        self.late_s = 0.0
        self._give = give
        self._waiting: deque[tuple[float, Any]] = deque()

    def take(self, messages: Sequence[Any]) -> None:
        due_s = time.monotonic() + self.late_s
        self._waiting.extend((due_s, message) for message in messages)

    def change(self, late_s: float) -> None:
        """The tokens of a run that has ended keep those of the next one waiting no longer."""
        self.late_s = late_s
        self._waiting = deque((0.0, message) for _, message in self._waiting)

    def give(self) -> float:
        """What is due; returns when the next will be."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            self._give(self._waiting.popleft()[1])
        return self._waiting[0][0] if self._waiting else _NEVER


class _Relay:
    """All ways, by what they are called: each source carries the name of the way that it begins."""

    def __init__(self) -> None:
        self.sources = Sources()
        self.ways: dict[str, _Way] = {}
        self._by_name: dict[str, Connection] = {}

    def around(self, word: str) -> str:
        """Where to connect to, to reach what listens at an address, for a purpose."""
        purpose, address = word.split("@")
        number = len(self.ways)  # the driver's address comes once for each stage
        there, here = f"there {number}", f"here {number}"
        self._by_name[there] = connect(address, self.sources, purpose)
        self._by_name[there].carries = there
        for name, other in ((there, here), (here, there)):
            self.ways[name] = _Way(lambda message, other=other: self._by_name[other].send(message))
        return Listener("127.0.0.1", self.sources, (purpose,), carries=here).address

    def take(self, source: Source) -> None:
        """All that has come."""
        messages = source.receive()
        if isinstance(source, Connection) and source.is_open:
            self._by_name[source.carries] = source
        if messages:
            self.ways[source.carries].take(messages)

    def close(self) -> None:
        self.sources.close()


class _Lines:
    """Standard input, among the sources: what it said last."""

    carries = "lines"

    def __init__(self, sources: Sources) -> None:
        sources.add(self, sys.stdin.fileno())

    def receive(self) -> list[str]:
        return sys.stdin.readline().split()

    def close(self) -> None: ...


def main() -> None:
    """Lines from standard input: the secret and addresses of the driver, one for each stage, then
    addresses of the stages, then, any number of times, the delays of all ways."""
    relay = _Relay()
    lines = _Lines(relay.sources)
    num_lines, due_s = 0, _NEVER
    while True:
        # `ready` waits for whole milliseconds; what is left is slept, for the stages want the core.
        left_s = max(due_s - time.monotonic(), 0.0)
        if left_s < 1e-3:
            time.sleep(left_s)
        ready = relay.sources.ready(None if due_s == _NEVER else int(left_s * 1000))
        for source in ready:
            if source is not lines:
                relay.take(source)
        if lines in ready:
            words = lines.receive()
            if not words:
                break
            num_lines += 1
            if num_lines == 1:
                relay.sources.secret = bytes.fromhex(words.pop(0))
            if num_lines <= 2:
                print(*[relay.around(word) for word in words], flush=True)
            else:
                for way, late_s in zip(relay.ways.values(), words, strict=True):
                    way.change(float(late_s))
                print(flush=True)
        due_s = min([way.give() for way in relay.ways.values()], default=_NEVER)
    relay.close()


if __name__ == "__main__":
    main()
