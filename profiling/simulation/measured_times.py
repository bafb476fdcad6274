"""Stages that take what their parts were measured to take, and seams likewise: for a look ahead."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.core.cost.kernels import Points, interpolate
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
            heads = [stage.has_head * one.head for one in found]
            self._layers.append(tuple(zip(tokens, seconds, strict=True)))
            self._heads.append(tuple(zip(rows, heads, strict=True)))

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        return self.seconds(work_of(microbatch))

    def seconds(self, work: Work) -> list[float]:
        """Of each stage."""
        layers = [interpolate(points, work.num_tokens) for points in self._layers]
        return [
            seconds + (interpolate(points, work.num_logits) if work.num_logits else 0.0)
            for seconds, points in zip(layers, self._heads, strict=True)
        ]

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        num_bytes = microbatch.num_tokens * self._bytes_per_token
        return [seam.seconds(num_bytes) for seam in self._seams]
