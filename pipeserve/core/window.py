"""How many microbatches may be outstanding: one for each stage, and as many more as fit on the way
round the ring. Pure.

A microbatch's way is a ring: from stage to stage, and from the last one back to the first, with its
tokens or, by way of the driver, with the next plan. With N outstanding, a stage gets one every
(compute + delay) / N seconds: what all stages take for one, and all ways between them. If that is
longer than what the slowest stage takes, it stands idle between them. So N of them fill the ring
when N * slowest >= compute + delay: with N = P where nothing is delayed.

Each way's delay is the time from the end of a microbatch on one stage to when the next stage had
it, taken only where that stage was waiting: what comes to a busy one is seen when it is done. The
clocks of different machines go into each way, and cancel round the ring.

The same decodes in one microbatch more are smaller ones, and each costs something however small it
is (weights are read). So there is one more only where the same work gets done sooner by that, and
one less where it does not take longer. Where a link has no more bandwidth, one more waits for it,
which looks like a longer way; so it is taken back when the delay grows by it.
"""

from collections import deque
from functools import partial
from math import inf
from typing import NamedTuple

from pipeserve.core.nouns import PipelinePlan

MOST = 8
"""At most so many microbatches for each stage."""
SHORTER = 0.97
"""One more has to bring the time of the same work down to this share."""
LONGER = 1.015
"""One less may bring it up to this one: less than would ask for one more, or they would take turns.
"""
KEPT = 9
"""Delays of each way that are looked at: their median counts."""
FORGOTTEN = 512
"""After so many microbatches in a row that came to a busy stage, nobody knows how long its way
still takes. Then there is one less outstanding after the other, until the stage waits and sees."""
_WEIGHT = 1 / 32
"""Of the latest microbatch in what one takes."""
_REMEMBERED = 1024
"""Microbatches of which a stage may still tell."""
_FIXED = 0.5
"""Share of a microbatch's time that it takes however small it is, while it is not known."""


class _Took(NamedTuple):
    """A microbatch on one stage; times of that stage's machine."""

    ready_s: float
    start_s: float
    end_s: float


# What NamedTuple's own constructor does, without a Python call for every span.
_new_took = partial(tuple.__new__, _Took)


class _Microbatch:
    """What is known of one, until all stages have told of it."""

    __slots__ = ("follows", "head_at_first", "num_tokens", "stages")

    def __init__(self, num_tokens: int, follows: int | None, head_at_first: bool) -> None:
        self.num_tokens, self.follows = num_tokens, follows
        self.head_at_first = head_at_first
        self.stages: dict[int, _Took] = {}


class Window:
    """Follows what the stages tell; or stays at the plan's, where that says so."""

    def __init__(self, plan: PipelinePlan) -> None:
        self.least = self.size = plan.window
        self._most = max(self.least, MOST * len(plan.stages)) if plan.window_follows else self.least
        self._ways = [_Way() for _ in plan.stages]
        """To each stage; to the first one, from the last."""
        self._compute_s = [0.0] * len(plan.stages)
        """Of each stage, for a microbatch of these days."""
        self._left_over = 0.0
        """Share of microbatches that leave prompts over for the next."""
        self._sizes = _Sizes()
        self._microbatches: dict[int, _Microbatch] = {}
        self._tokens_s: dict[int, float] = {}
        """When the last stage was done with one, by its clock."""
        self._heads: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        """On the first stage: the end of each, and its seconds."""
        self._settles, self._grows_at = 2 * self.size + KEPT, 0
        """The first microbatch that says what has come of the latest change, and the first after
        which there may be more outstanding again."""
        self._before = 0, inf
        """What it was before it last grew, and the delay round the ring that this may lead to."""

    def planned(
        self,
        index: int,
        num_tokens: int,
        follows: int | None,
        left_over: bool,
        head_at_first: bool = False,
    ) -> None:
        """`follows`: the microbatch of which it needs the tokens, or whose completion made room for
        it; None where it waited for neither. `left_over`: it has prompts, and there are more.
        `head_at_first`: its tokens are made where they are needed, so they tell of no way."""
        if self._most > self.least:
            self._left_over += _WEIGHT * (left_over - self._left_over)
            self._microbatches[index] = _Microbatch(num_tokens, follows, head_at_first)
            if len(self._microbatches) > _REMEMBERED:
                del self._microbatches[next(iter(self._microbatches))]

    def took(self, index: int, stage: int, ready_s: float, start_s: float, end_s: float) -> None:
        """A stage tells of a microbatch. `ready_s`: when all that it needed was there; no later
        than the end of the one before where the stage did not wait for it."""
        microbatch = self._microbatches.get(index)
        if microbatch is None or not start_s < end_s < inf:
            return
        microbatch.stages[stage] = _new_took((ready_s, start_s, end_s))
        if len(microbatch.stages) == len(self._ways):  # and so of all before it
            del self._microbatches[index]
            self._learn(index, microbatch)
            if index >= self._settles:
                self._adapt(index)

    def headed(self, start_s: float, end_s: float) -> None:
        """The first stage tells of a head that it applied between two microbatches: it was not
        waiting then."""
        self._heads.append((end_s, end_s - start_s))

    def forget(self) -> None:
        """All that is outstanding is void, and stages have other links."""
        self._microbatches.clear()
        self._tokens_s.clear()
        self._heads.clear()
        self._ways = [_Way() for _ in self._ways]

    def _learn(self, index: int, microbatch: _Microbatch) -> None:
        took = [microbatch.stages[stage] for stage in range(len(self._ways))]
        sent_s = self._tokens_s.get(microbatch.follows) if microbatch.follows is not None else None
        heads_s = self._heads_before(took[0].start_s)
        for stage, (way, each) in enumerate(zip(self._ways, took, strict=True)):
            way.came(sent_s, each)
            sent_s = each.end_s
            seconds = each.end_s - each.start_s + heads_s * (stage == 0)
            mean_s = self._compute_s[stage]
            self._compute_s[stage] += (seconds - mean_s) * (_WEIGHT if mean_s else 1.0)
        if not microbatch.head_at_first:
            self._tokens_s[index] = took[-1].end_s
        if len(self._tokens_s) > 2 * self._most:
            del self._tokens_s[next(iter(self._tokens_s))]
        self._sizes.add(microbatch.num_tokens, sum([each.end_s - each.start_s for each in took]))

    def _heads_before(self, start_s: float) -> float:
        """The seconds of those that the first stage applied since its microbatch before, which is
        until when it was not waiting."""
        seconds = 0.0
        while self._heads and self._heads[0][0] <= start_s:
            end_s, head_s = self._heads.popleft()
            self._ways[0].busy_until(end_s)
            seconds += head_s
        return seconds

    @property
    def _delay_s(self) -> float:
        """All the way round; 0 where some of it is not known."""
        delays_s = [way.delay_s for way in self._ways]
        return 0.0 if None in delays_s else max(0.0, sum(filter(None, delays_s)))

    def _adapt(self, index: int) -> None:
        """At most to twice as many at a time, or one less; and then not before what is planned from
        now on has come round."""
        delay_s = self._delay_s
        now_s = self._work_s(self.size, delay_s)
        (fewer, most_s), self._before = self._before, (0, inf)
        number, most = self.size, self.size
        if index >= self._grows_at:
            most = min(self._most, 2 * self.size)
        while number < most and self._work_s(number + 1, delay_s) < SHORTER * self._work_s(
            number, delay_s
        ):
            number += 1
        if delay_s > most_s:  # they queue on their way: a link is what is slowest
            self.size, self._grows_at = fewer, index + FORGOTTEN
        elif number > self.size:
            half_s = now_s / self.size / 2  # of the time between two
            self._before = self.size, delay_s + (number - self.size) * half_s
            self.size = number
        elif self.size > self.least and self._work_s(self.size - 1, delay_s) <= LONGER * now_s:
            self.size -= 1
        else:
            return
        self._settles = index + 2 * self.size + KEPT

    def _work_s(self, number: int, delay_s: float) -> float:
        """How long the work of a turn of now takes with so many outstanding.

        A turn is the time until the same requests decode again. Its decodes are the same then, so
        that each microbatch has fewer. Where prompts are left over, it is as large as before, and
        the turn does more."""
        share = self.size / number
        smaller = 1 - (1 - self._left_over) * (1 - self._sizes.fixed) * (1 - share)
        more = 1 + self._left_over * (1 / share - 1)
        compute_s = smaller * sum(self._compute_s) + delay_s
        return max(number * smaller * max(self._compute_s), compute_s) / more


class _Way:
    """From one stage to the next."""

    __slots__ = ("_delays_s", "_end_s", "_num_unseen", "delay_s")

    def __init__(self) -> None:
        self.delay_s: float | None = None
        """By the clocks of its two ends; None: it is not known."""
        self._end_s = -inf  # of the microbatch before, on the stage that it leads to
        self._delays_s: deque[float] = deque(maxlen=KEPT)
        self._num_unseen = 0

    def busy_until(self, end_s: float) -> None:
        """With something else than a microbatch."""
        self._end_s = max(self._end_s, end_s)

    def came(self, sent_s: float | None, took: _Took) -> None:
        """A microbatch, with what was sent at `sent_s`; None where it waited for something else."""
        has_waited = took.ready_s > self._end_s
        self._end_s = took.end_s
        if has_waited and sent_s is not None:
            self._num_unseen = 0
            self._delays_s.append(took.ready_s - sent_s)
            self.delay_s = sorted(self._delays_s)[len(self._delays_s) // 2]
            return
        self._num_unseen += 1
        if self._num_unseen == FORGOTTEN:
            self._delays_s.clear()
            self.delay_s = None


class _Sizes:
    """How the time of a microbatch goes with its tokens: a line through the latest ones."""

    __slots__ = ("_mean_s", "_mean_tokens", "_product", "_square", "fixed")

    def __init__(self) -> None:
        self.fixed = _FIXED
        """Share of the mean microbatch's time that does not go with its tokens."""
        self._mean_tokens = self._mean_s = 0.0
        self._square = self._product = 0.0
        """Means of squared deviations of the tokens, and of their products with those of the time.
        """

    def add(self, num_tokens: int, seconds: float) -> None:
        weight = _WEIGHT if self._mean_s else 1.0
        tokens, time = num_tokens - self._mean_tokens, seconds - self._mean_s
        self._mean_tokens += weight * tokens
        self._mean_s += weight * time
        self._square += weight * ((1 - weight) * tokens * tokens - self._square)
        self._product += weight * ((1 - weight) * tokens * time - self._product)
        if (
            self._square > (0.05 * self._mean_tokens) ** 2 and self._mean_s > 0
        ):  # else all are alike
            per_token_s = self._product / self._square
            self.fixed = min(max(1 - per_token_s * self._mean_tokens / self._mean_s, 0.0), 1.0)
