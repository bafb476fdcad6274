"""What a rank of a stage spends on the sums that it makes with the others, and on waiting for them.

How long it was in an all-reduce says neither: most of it may be that another rank came late
(pytorch#59433). The rank that comes last waits for nobody. So the least that any of them took is
the sum's own time, and what one took longer, it has waited.

To know that, they exchange what each took: of a size of microbatch that they have not compared yet,
and of each size now and then. In between it takes what it took then, or less, where this rank was
not in it as long.

Of CPUs alone: a GPU makes its sums later than this process asks for them.
"""

import statistics
import time
from math import inf, log2

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_COMPARED_EVERY = 16
"""Microbatches of a size: an exchange is one more sum, beside dozens that each of them makes."""
_CLASSES_AN_OCTAVE = 4
_TIMED, _WARM_UPS = 10, 3


class Sums:
    """Of one rank. All ranks of the stage make the same calls in the same order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.meet(group)

    def meet(self, group: ProcessGroup | None) -> None:
        """What was compared before is forgotten: some may have come further than others. None: they
        have parted."""
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
        return sum(_least(took_s, self._group))


def time_sum(shape: tuple[int, ...], device: torch.device, group: ProcessGroup) -> float:
    """Seconds of one over numbers of that shape, the usual one's of several; of all ranks the
    same. They make it beside nothing else."""
    numbers, took_s = torch.zeros(shape, device=device), []
    for _ in range(_WARM_UPS + _TIMED):
        begin_s = time.monotonic()
        dist.all_reduce(numbers, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took_s.append(time.monotonic() - begin_s)
    return statistics.median(_least(took_s[_WARM_UPS:], group))


def _least(took_s: list[float], group: ProcessGroup) -> list[float]:
    """That any rank took for each of so many sums."""
    device = "cpu" if dist.get_backend(group) == "gloo" else "cuda"
    least_S = torch.tensor(took_s, dtype=torch.float64, device=device)
    dist.all_reduce(least_S, dist.ReduceOp.MIN, group=group)
    return least_S.tolist()
