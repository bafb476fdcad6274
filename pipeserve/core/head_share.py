"""Which end of a pipeline applies the head of a microbatch, where both have it. Pure.

A head is as much work as several layers in a microbatch of decodes, and next to none in one of
prompts. So no cut of the layers is even for both, and whichever stage had the head alone would wait
for the others, or they for it. Here the layers are cut as if half a head stood at either end, and
the two ends take turns with the whole of it: then the same decodes have it at the same end each
time round, which leaves no gaps. Only where one end is much busier than the other, as by a cut that
was made for heads at the last stage alone, the other takes more than its turns.

Sharing the vocabulary's work among stages is due to Yeung, Qi, Lin and Wan, "Balancing Pipeline
Parallelism with Vocabulary Parallelism" (arXiv:2411.05288), who split each head; whole ones by
turns need no sums over stages, and read the weights once.
"""

_KEPT = 0.75
"""What a microbatch leaves of all that was before it, where the ends are compared."""
_MOST = 1.5
"""Heads by which an end may be busier before it misses a turn. Turns alone make it half of one, so
that the layers may differ by a fourth of a head in each microbatch."""


class HeadShare:
    """Of one pipeline. Learns from what the two ends took; late or never is fine."""

    def __init__(self, num_stages: int) -> None:
        self._last = num_stages - 1
        self._was_first = False
        """The first stage has the latest head."""
        self._ahead_s = 0.0
        """For which the first stage was busier of late than the last one."""
        self._head_s = 0.0
        """Of the latest head at the first stage; 0 before that is known."""
        self._one_s: dict[int, float] = {}
        """What the first stage took more than the last one, of microbatches that only one of them
        has told of."""

    def at_first(self) -> bool:
        """Whether the first stage shall have the head of the next microbatch that samples."""
        is_uneven = abs(self._ahead_s) > _MOST * self._head_s
        self._was_first = self._ahead_s < 0 if is_uneven else not self._was_first
        return self._was_first

    def took(self, index: int, stage: int, seconds: float) -> None:
        """What a stage took for a microbatch; on the last one with its head, where it has that."""
        if 0 < stage < self._last:
            return
        more_s = seconds if stage == 0 else -seconds
        if index in self._one_s:
            self._ahead_s = _KEPT * self._ahead_s + self._one_s.pop(index) + more_s
        else:
            self._one_s[index] = more_s

    def headed(self, seconds: float) -> None:
        """What the first stage took for a head."""
        self._head_s = seconds
        self._ahead_s += seconds

    def forget(self) -> None:
        """What was outstanding is void."""
        self._one_s.clear()
