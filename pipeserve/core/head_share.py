"""Which end of a pipeline applies the head of a microbatch, where both have it. Pure.

A head is as much work as several layers in a microbatch of decodes, and next to none in one of
prompts. So no cut of the layers is even for both, and whichever stage had the head alone would wait
for the others, or they for it. Here the layers are cut as if half a head stood at either end, and
microbatch by microbatch the end that has been busy for less time takes the whole of it.

Sharing the vocabulary's work among stages is due to Yeung, Qi, Lin and Wan, "Balancing Pipeline
Parallelism with Vocabulary Parallelism" (arXiv:2411.05288), who split each head; whole ones by
turns need no sums over stages, and read the weights once.
"""


class HeadShare:
    """Of one pipeline. Learns from what the two ends took; late or never is fine."""

    def __init__(self, num_stages: int) -> None:
        self._last = num_stages - 1
        self._ahead_s = 0.0
        """For which the first stage was busier than the last one, as far as both are known."""
        self._head_s = 0.0
        """Of the latest head at the first stage; 0 before that is known."""
        self._pending: dict[int, bool] = {}
        """Of each microbatch whose head is not known yet, whether the first stage has it."""
        self._first_s: dict[int, float] = {}
        """What the first stage took, where that of the last one is not known yet."""

    def at_first(self, index: int) -> bool:
        """Whether the first stage shall have the head of a microbatch that samples."""
        on_first = sum(self._pending.values())
        on_last = len(self._pending) - on_first
        takes = self._ahead_s + self._head_s * (on_first - on_last) <= 0
        self._pending[index] = takes
        return takes

    def took(self, index: int, stage: int, seconds: float) -> None:
        """What a stage took for a microbatch; on the last one with its head, where it has that."""
        if stage == 0:
            self._first_s[index] = seconds
        elif stage == self._last:
            if self._pending.get(index) is False:
                del self._pending[index]
            if index in self._first_s:
                self._ahead(self._first_s.pop(index) - seconds)

    def headed(self, index: int, seconds: float) -> None:
        """What the first stage took for a head."""
        self._pending.pop(index, None)
        self._head_s = seconds
        self._ahead(seconds)

    def forget(self) -> None:
        """What was outstanding is void."""
        self._pending.clear()
        self._first_s.clear()

    def _ahead(self, seconds: float) -> None:
        """More than a head is not made good later: the end that had less to do has waited."""
        ahead_s = self._ahead_s + seconds
        self._ahead_s = max(-self._head_s, min(ahead_s, self._head_s))
