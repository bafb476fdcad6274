"""Stages that take what their parts were measured to take, and seams likewise: for a look ahead."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.core.cost.kernels import Points, interpolate
from pipeserve.core.cost.partition import head_shares
from pipeserve.core.nouns import Microbatch, PipelinePlan
from pipeserve.core.work import PartSeconds, Work, work_of
from pipeserve.profiling.simulation.stage_times import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """What was measured of one."""

    latency_s: float
    bytes_per_s: float
    """inf: more than could be told."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class MeasuredTimes(StageTimes):
    """Of one pipeline: linear between the microbatches that were timed, layers by tokens and the
    head by rows."""

    def __init__(
        self,
        plan: PipelinePlan,
        works: Sequence[Work],
        parts: Sequence[Sequence[PartSeconds]],
        seams: Sequence[Seam],
        bytes_per_token: int,
        feedback_s: float,
        control_s: float,
    ) -> None:
        """`works`: fewest tokens first; `parts`: of each stage, for each of them."""
        self.control_s, self.feedback_s = control_s, feedback_s
        self._seams, self._bytes_per_token = seams, bytes_per_token
        self._layers: list[Points] = []
        self._heads: list[Points] = []
        for stage, found in zip(plan.stages, parts, strict=True):
            held = slice(stage.first_layer, stage.stop_layer)
            seconds = [
                sum(one.layers[held]) + one.host + stage.has_embedding * one.embedding
                for one in found
            ]
            tokens = [work.num_tokens for work in works]
            rows = [work.num_logits for work in works]
            self._layers.append(tuple(zip(tokens, seconds, strict=True)))
            self._heads.append(tuple(zip(rows, [one.head for one in found], strict=True)))
        self._head_shares = head_shares(len(plan.stages), plan.shares_head)

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        seconds = self._layers_s(work_of(microbatch))
        if not microbatch.head_at_first:
            seconds[-1] += self.head_s(microbatch)
        return seconds

    def head_s(self, microbatch: Microbatch) -> float:
        return self._head_s(work_of(microbatch), 0 if microbatch.head_at_first else -1)

    def seconds(self, work: Work) -> list[float]:
        """Of each stage; where two take turns with the head, half of it of either."""
        return [
            seconds + (share * self._head_s(work, stage) if share else 0.0)
            for stage, (seconds, share) in enumerate(
                zip(self._layers_s(work), self._head_shares, strict=True)
            )
        ]

    def _layers_s(self, work: Work) -> list[float]:
        return [interpolate(points, work.num_tokens) for points in self._layers]

    def _head_s(self, work: Work, stage: int) -> float:
        return interpolate(self._heads[stage], work.num_logits) if work.num_logits else 0.0

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        num_bytes = microbatch.num_tokens * self._bytes_per_token
        return [seam.seconds(num_bytes) for seam in self._seams]
