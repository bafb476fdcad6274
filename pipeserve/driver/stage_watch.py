"""Which stage owes what, and for how long: so one that hangs is found, though nothing ends.

A stage owes the microbatch that is next there, from when all that it needs was there as far as the
driver has heard; the first one also the heads of those that have left the last one, where it has
them. How long it may take is learnt: about as long as such ones took on that stage
before, by the driver's own clock, and a margin. What its keeper says of its process (`at_work.py`)
tells a slow one from a dead one: time in which it stood in line for a core does not count, and one
that computes, or moves bytes, gets a wider margin than one that sleeps or is stopped. A stage that
owes nothing is asked for a sign of life.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeserve.core.nouns import Microbatch
from pipeserve.core.records import Span
from pipeserve.driver.at_work import AtWork
from pipeserve.driver.silence import Silence
from pipeserve.wire.control import HeartbeatAnswer

_FIRST_S = 60.0
"""For the first microbatch of all."""
_FORGET = 0.97
"""What the longest time of before still counts after each microbatch."""
_GAP_S = 0.5
"""A driver that has not looked for so long was busy, or stood still: that time does not count."""
_WORKING, _SLEEPING = 1.5, 0.5
"""The margin, in times that such ones took before, where that is more than the least margin."""


class Overdue(NamedTuple):
    """A stage that has not done what it owes."""

    stage: int
    index: int | None
    """The microbatch; None: it owed a sign of life."""
    late_s: float
    """Since when it owes it."""
    usual_s: float

    def __str__(self) -> str:
        if self.index is None:
            late = f"{self.late_s:.1f} s"
            return f"has given no sign of life for {late}; is it stopped, or cut off?"
        usual = f", where such ones took {self.usual_s:.2g} s" if self.usual_s else ""
        return (
            f"has not done microbatch {self.index} within {self.late_s:.1f} s{usual}; is it "
            "stopped, or cut off?"
        )


@dataclass(slots=True)
class _Due:
    """A microbatch, at the stage that has all it needs for it but the tokens."""

    index: int
    work: int
    since_s: float
    token_from: int
    """On the first stage: the microbatch whose tokens it waits for; -1 for none."""


class StageWatch:
    """Of one pipeline. Reads no clock."""

    def __init__(self, num_stages: int, margin_s: float, heartbeat_s: float) -> None:
        self._margin_s = margin_s
        self._times = [_Times() for _ in range(num_stages)]
        self._due: list[deque[_Due]] = [deque() for _ in range(num_stages)]
        self._at_work = [AtWork() for _ in range(num_stages)]
        self._silence = Silence(heartbeat_s)
        """Of stages, since they were asked for a sign of life."""
        self._at_first: dict[int, int] = {}
        """Microbatches whose heads the first stage is to apply, and how many rows each has."""
        self._heads: deque[_Due] = deque()
        """Those of them that it owes."""
        self._head_times = _Times()
        self._completed = -1
        self._completed_s = 0.0
        self._looked_s = 0.0
        self.done = [-1] * num_stages
        """The last microbatch that each has computed; -1: none yet."""

    def start_again(self) -> None:
        """Stages with nothing to do."""
        for due in self._due:
            due.clear()
        self._at_first.clear()
        self._heads.clear()
        self._silence.clear()

    # ---- what is heard --------------------------------------------------------------------------

    def planned(self, microbatch: Microbatch, now: float) -> None:
        work, source = 0, -1
        for chunk in microbatch.chunks:
            work += (chunk.stop - chunk.start) * (1024 + chunk.stop)
            if chunk.token_from is not None and chunk.token_from > source:
                source = chunk.token_from
        self._due[0].append(_Due(microbatch.index, work, now, source))
        if microbatch.head_at_first:
            self._at_first[microbatch.index] = sum([c.num_logits for c in microbatch.chunks])

    def completed(self, index: int, at_s: float) -> None:
        self._completed, self._completed_s = index, at_s
        self._at_first.pop(index, None)
        if self._heads and self._heads[0].index == index:
            done = self._heads.popleft()
            self._head_times.take(done.work, at_s - done.since_s)
            for dues in (self._due[0], self._heads):
                if dues:  # it has waited for that head
                    dues[0].since_s = max(dues[0].since_s, at_s)

    def computed(self, span: Span, at_s: float) -> None:
        """It may be heard before what the stage ahead of it says of the same microbatch."""
        stage, index = span.stage, span.index
        self.done[stage] = index
        self._at_work[stage].computed(span)
        self._silence.broken(stage)
        if stage == 0 and self._heads:
            self._heads[0].since_s = at_s
        due = self._due[stage]
        if not due or due[0].index != index:
            return
        done = due.popleft()
        self._times[stage].take(done.work, at_s - done.since_s)
        if due and due[0].since_s < at_s:
            due[0].since_s = at_s
        done.since_s, done.token_from = at_s, -1
        self._hand_on(done, stage + 1)

    def _hand_on(self, due: _Due, stage: int) -> None:
        """To the first stage from there on that has not computed it."""
        while stage < len(self._due) and self.done[stage] >= due.index:
            stage += 1
        if stage < len(self._due):
            self._due[stage].append(due)
        elif due.index in self._at_first:  # else its result is here already
            due.work = self._at_first[due.index]
            self._heads.append(due)

    def answered(self, stage: int) -> None:
        """It is alive."""
        self._silence.broken(stage)

    def signs(self, stage: int, signs: HeartbeatAnswer, at_s: float) -> None:
        """What its keeper says of its process."""
        at_work = self._at_work[stage]
        at_work.take(signs, at_s)
        self._silence.excuse(stage, at_work.stood_now_s)

    # ---- now and then ---------------------------------------------------------------------------

    def at(self, stage: int) -> int | None:
        """The microbatch that it is at; None: it waits."""
        due = self._due[stage]
        return due[0].index if due and self._ready_s(due[0]) is not None else None

    def at_all(self, stage: int) -> list[int]:
        """The microbatches that it may be at: a head goes first, if its rows are there."""
        found = [self.at(stage), self._heads[0].index if stage == 0 and self._heads else None]
        return [index for index in found if index is not None]

    def whereabouts(self, stage: int) -> str:
        """The same, in words, and what it did last."""
        done, at = self.done[stage], " or ".join(map(str, self.at_all(stage)))
        last = "it had computed nothing" if done < 0 else f"its last microbatch was {done}"
        return f"{last}, and it was at {at}" if at else f"{last} and it was idle"

    def wants_to_ask(self, now: float) -> bool:
        """Those that owe nothing are to be asked for a sign of life, now."""
        if any(self._due) or self._heads or not self._silence.is_time_to_ask(now):
            return False
        self._silence.asked(range(len(self._due)), now)
        return True

    def overdue(self, now: float) -> Overdue | None:
        """`now`: before the last look at what has come, all of which was told."""
        gap_s = now - self._looked_s
        if gap_s > _GAP_S:
            self._shift(gap_s)
        self._looked_s = now
        for stage, silent_s in self._silence.too_long(now):
            if not (self._due[stage] or (stage == 0 and self._heads)):
                return Overdue(stage, None, silent_s, 0.0)
        for stage, due, times in self._owed():
            since_s = self._ready_s(due)
            if since_s is None:
                continue
            at_work = self._at_work[stage]
            usual_s = self._usual_s(stage, due, times)
            late_s = now - since_s - at_work.stood_s(since_s)
            share = _WORKING if at_work.is_working else _SLEEPING
            margin_s = max(self._margin_s, share * usual_s)
            if late_s > (usual_s + margin_s if usual_s else _FIRST_S):
                return Overdue(stage, due.index, now - since_s, usual_s)
        return None

    def _owed(self) -> "Iterator[tuple[int, _Due, _Times]]":
        """What is next on each stage, and what it is judged by. A head waits for the microbatch
        that the first stage is at."""
        for stage, (dues, times) in enumerate(zip(self._due, self._times, strict=True)):
            if dues:
                yield stage, dues[0], times
        if self._heads and self.at(0) is None:
            yield 0, self._heads[0], self._head_times

    def _usual_s(self, stage: int, due: _Due, times: "_Times") -> float:
        """What it takes, with the heads that go before it on the first stage; 0 where one of these
        is not known yet."""
        usual_s = [times.usual_s(due.work)]
        if stage == 0 and times is not self._head_times:
            usual_s += [self._head_times.usual_s(head.work) for head in self._heads]
        return sum(usual_s) if all(usual_s) else 0.0

    def _ready_s(self, due: _Due) -> float | None:
        """When its stage had all of it; None: its tokens are on their way."""
        if due.token_from > self._completed:
            return None
        if due.token_from == self._completed:
            return max(due.since_s, self._completed_s)
        return due.since_s

    def _shift(self, gap_s: float) -> None:
        for dues in (*self._due, self._heads):
            if dues:
                dues[0].since_s += gap_s
        self._completed_s += gap_s


class _Times:
    """What microbatches took on one stage, by how much there was to compute."""

    def __init__(self) -> None:
        self._longest_s: dict[int, float] = {}
        """Of each power of two of work, fading."""

    def take(self, work: int, seconds: float) -> None:
        size = work.bit_length()
        faded_s = self._longest_s.get(size, 0.0) * _FORGET
        self._longest_s[size] = max(seconds, faded_s)

    def usual_s(self, work: int) -> float:
        """Rather too long: of a size that was not there yet, what more took, or less in proportion.
        0 before the first."""
        size = work.bit_length()
        if not self._longest_s:
            return 0.0
        if size in self._longest_s:
            return self._longest_s[size]
        more = [each for each in self._longest_s if each > size]
        if more:
            return self._longest_s[min(more)]
        less = max(self._longest_s)
        return self._longest_s[less] * 2 ** (size - less)
