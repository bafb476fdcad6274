"""What stages took for the microbatches that they ran: what a calibration is fitted on.

`Samples` stands where an engine has its cost model. There it sees every microbatch when it is
planned and every stage's seconds when they are known, on a real pipeline as on a simulated one.
"""

from dataclasses import dataclass

from pipeserve.core.nouns import Microbatch, StageCost
from pipeserve.core.work import Work, work_of


@dataclass(frozen=True, slots=True)
class Sample:
    """One microbatch on one stage."""

    stage: int
    work: Work
    seconds: float
    index: int = 0
    """Of the microbatch, by which its span is found."""


class Samples:
    """A `view.CostModel` that predicts nothing and remembers all."""

    def __init__(self, num_stages: int) -> None:
        self.taken: list[Sample] = []
        self._no_cost = StageCost((0.0,) * num_stages)
        self._work: dict[int, Work] = {}

    def predict(self, microbatch: Microbatch) -> StageCost:
        self._work[microbatch.index] = work_of(microbatch)
        return self._no_cost

    def observe(self, index: int, stage: int, seconds: float) -> None:
        if index in self._work:
            self.taken.append(Sample(stage, self._work[index], seconds, index))
