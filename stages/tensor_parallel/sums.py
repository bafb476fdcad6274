"""What a rank of a stage spends on the sums that it makes with the others, and on waiting for them.

How long it was in an all-reduce says neither: most of it may be that another rank came late
(pytorch#59433). The rank that comes last waits for nobody. So the least that any of them took is
the sum's own time, and what one took longer, it has waited.

To know that, they exchange what each took: of a size of microbatch that they have not compared yet,
and of each size now and then. In between it takes what it took then, or less, where this rank was
not in it as long.

Of CPUs alone: a GPU makes its sums later than this process asks for them.
"""

import time
from math import inf, log2

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_COMPARED_EVERY = 16
"""Microbatches of a size: an exchange is one more sum, beside dozens that each of them makes."""
_CLASSES_AN_OCTAVE = 4


class Sums:
    """Of one rank. All ranks of the stage make the same calls in the same order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.meet(group)

    def meet(self, group: ProcessGroup) -> None:
        """What was compared before is forgotten: some may have come further than others."""
        self._group = group
        self._took_s: list[float] = []
        self._least_s: dict[int, tuple[float, int]] = {}
        """Size class -> what its sums took, and microbatches since that was compared."""

    def begin(self) -> None:
        """This rank's part of a sum is there."""
        self._begun_s = time.monotonic()

    def end(self) -> None:
        """The sum is."""
        self._took_s.append(time.monotonic() - self._begun_s)

    def of_microbatch(self, num_tokens: int) -> tuple[float, float]:
        """Seconds of the sums themselves, and of waiting, since this was asked last."""
        took_s, self._took_s = self._took_s, []
        if not took_s:
            return 0.0, 0.0
        size = round(_CLASSES_AN_OCTAVE * log2(num_tokens))
        least_s, num_since = self._least_s.get(size, (inf, _COMPARED_EVERY))
        if num_since == _COMPARED_EVERY:
            least_s, num_since = self._compare(took_s), 0
        whole_s = sum(took_s)
        own_s = min(whole_s, least_s)
        self._least_s[size] = own_s, num_since + 1
        return own_s, whole_s - own_s

    def _compare(self, took_s: list[float]) -> float:
        """The least that any rank took for each sum, all together."""
        least_S = torch.tensor(took_s, dtype=torch.float64)
        dist.all_reduce(least_S, dist.ReduceOp.MIN, group=self._group)
        return float(least_S.sum())
