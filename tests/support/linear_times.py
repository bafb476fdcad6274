"""A made-up cost that is easy to reckon with: the truth of a simulation, and what predicts it."""

from pipeserve.core.nouns import Microbatch, StageCost
from pipeserve.core.work import Work, work_of
from pipeserve.profiling.simulation.stage_times import StageTimes


class LinearTimes(StageTimes):
    """Every stage takes `base`, and so much for each token, for each position that a decode reads
    and for each pair of a prompt position (of whole `rows`) and one before its chunk; `slow` stages
    take longer."""

    control_s = 0.0

    def __init__(
        self,
        num_stages,
        base=0.01,
        per_token=1e-4,
        per_position=0.0,
        per_pair=0.0,
        rows=1,
        slow=None,
    ):
        self.num_stages = num_stages
        self.base, self.per_token, self.per_position = base, per_token, per_position
        self.per_pair, self.rows = per_pair, rows
        self.slow = slow or {}

    def of(self, work: Work) -> tuple[float, ...]:
        pairs = sum(start * -(-tokens // self.rows) * self.rows for start, tokens in work.prefills)
        seconds = (
            self.base
            + self.per_token * work.num_tokens
            + self.per_position * work.context
            + self.per_pair * pairs
        )
        return tuple(seconds * self.slow.get(stage, 1.0) for stage in range(self.num_stages))

    def compute_s(self, microbatch: Microbatch) -> tuple[float, ...]:
        return self.of(work_of(microbatch))

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        return [0.0] * (self.num_stages - 1)


class LinearCost:
    """Predicts with `times`, and learns nothing."""

    def __init__(self, times: LinearTimes):
        self.seconds = times.of

    def predict(self, microbatch: Microbatch) -> StageCost:
        return StageCost(self.seconds(work_of(microbatch)))

    def observe(self, index: int, stage: int, seconds: float) -> None:
        pass
