"""When the outstanding microbatches will have left the last stage, by the cost model. Pure.

Stages are servers that take microbatches strictly in order, one at a time, so a microbatch's whole
way follows from when each stage is free (the recurrence of a permutation flow shop: Johnson,
"Optimal two- and three-stage production schedules", 1954). Links are left out: they overlap
compute, and what they add is in the completions, by which the forecast is set right.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import inf


class Forecast:
    """Of one pipeline. The engine adds every microbatch that has a predicted cost; policies
    only ask. Times are those of the engine's host, in seconds."""

    def __init__(self, num_stages: int) -> None:
        self._free_s = [-inf] * num_stages
        self._through_s: OrderedDict[int, float] = OrderedDict()

    @property
    def num_stages(self) -> int:
        return len(self._free_s)

    def through_s(self, seconds: Sequence[float], ready_s: float) -> float:
        """When a microbatch of so many seconds on each stage, all of which is there at `ready_s`,
        leaves the last one."""
        at_s = ready_s
        for free_s, stage_s in zip(self._free_s, seconds, strict=True):
            at_s = (free_s if free_s > at_s else at_s) + stage_s
        return at_s

    def known_s(self, index: int) -> float:
        """When the tokens of an outstanding microbatch will be known."""
        return self._through_s[index]

    def planned(self, index: int, seconds: Sequence[float], ready_s: float) -> None:
        """One is outstanding now; as `through_s`."""
        at_s, free_s = ready_s, self._free_s
        for stage, stage_s in enumerate(seconds):
            at_s = free_s[stage] = max(free_s[stage], at_s) + stage_s
        self._through_s[index] = at_s

    def completed(self, index: int, now: float, is_of_first: bool = False) -> None:
        """What is behind it in the pipeline comes as much earlier or later as it did itself; but
        not where its head was at the first stage (`is_of_first`), for it had waited there, too."""
        expected_s = self._through_s.pop(index, now)
        if is_of_first:
            return
        late_s = now - expected_s
        self._free_s = [free_s + late_s for free_s in self._free_s]
        for other in self._through_s:
            self._through_s[other] += late_s

    def forget(self) -> None:
        """All that is outstanding is void."""
        self._free_s = [-inf] * len(self._free_s)
        self._through_s.clear()
