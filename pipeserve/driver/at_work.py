"""Whether a stage's process works, stands in line for a core, or does nothing: by what its keeper
says of it with each heartbeat."""

from collections import deque
from math import isnan
from typing import NamedTuple

from pipeserve.core.records import Span
from pipeserve.wire.control import HeartbeatAnswer

_MOST_SAMPLES = 256
_WORKS = 0.02
"""Share of the time that one which works has a core, at least; less is but waking up."""
_STATES = "RD"
"""It runs or stands in line for a core, or for a disk."""


class _Sample(NamedTuple):
    at_s: float
    total_stood_s: float
    """Since the first sample. Of all threads together, but no longer than the time that passed."""


class AtWork:
    """Of one stage. Reads no clock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_MOST_SAMPLES)
        self._last: HeartbeatAnswer | None = None
        self._is_on_cpu = True
        self.is_working = True
        """It has used a core or moved bytes of late, or is about to; or nothing is known of it."""
        self.stood_now_s = 0.0
        """In line for a core, since the sample before the last."""

    def computed(self, span: Span) -> None:
        """Whether it is the CPU that computes there: else it sleeps while it does."""
        self._is_on_cpu = not isnan(span.cpu_s)

    def take(self, signs: HeartbeatAnswer, at_s: float) -> None:
        """With an answer to a heartbeat."""
        last, self._last = self._last, signs
        total_s = 0.0
        if last is None or signs.stood_s < last.stood_s or signs.ran_s < last.ran_s:
            self._samples.clear()  # another process, or one with fewer threads
            self.is_working = True
        else:
            before = self._samples[-1]
            passed_s = max(at_s - before.at_s, 1e-3)
            self.stood_now_s = min(signs.stood_s - last.stood_s, passed_s)
            total_s = before.total_stood_s + self.stood_now_s
            self.is_working = not self._is_on_cpu or (
                signs.state in _STATES
                or signs.num_moved > last.num_moved
                or (signs.ran_s - last.ran_s) / passed_s > _WORKS
            )
        self._samples.append(_Sample(at_s, total_s))

    def stood_s(self, since_s: float) -> float:
        """How long it stood in line for a core since then: rather too long than too short."""
        if not self._samples:
            return 0.0
        before = self._samples[0]
        for sample in reversed(self._samples):
            if sample.at_s <= since_s:
                before = sample
                break
        return self._samples[-1].total_stood_s - before.total_stood_s
