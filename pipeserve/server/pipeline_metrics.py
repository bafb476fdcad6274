"""Metrics of the engine and the stages: what the driver said last of them (`wire/client.py`)."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from pipeserve.core.view import Limits
from pipeserve.server.request_metrics import ENGINE, LABELS
from pipeserve.wire.client import STEP_S, STEP_TOKENS, Distribution, StageFigures, Status

_COMPUTING = "computing"


class PipelineMetrics:
    """A collector, as prometheus_client asks for one."""

    def __init__(self, model_name: str, limits: Limits) -> None:
        self._labels = (model_name, ENGINE)
        self._limits = limits
        self.status: Status | None = None
        """What the driver said last."""

    def collect(self) -> Iterator[Metric]:
        yield self._cache_config()
        if self.status is None:
            return
        yield from self._of_engine(self.status.figures)
        yield from self._of_losses(self.status)
        if self.status.stages:
            yield from self._of_stages(self.status.stages)

    # ---- the engine -----------------------------------------------------------------------------

    def _cache_config(self) -> Metric:
        limits = self._limits
        labels = {
            "engine": ENGINE,
            "block_size": str(limits.block_size),
            "num_gpu_blocks": str(limits.num_blocks),
            "enable_prefix_caching": str(limits.enable_prefix_caching),
        }
        help = "The KV cache: its blocks (vLLM's word for them), whatever the device."
        family = GaugeMetricFamily("vllm:cache_config_info", help, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _of_engine(self, figures: dict[str, float]) -> Iterator[Metric]:
        num_free = figures["num_free_blocks"]
        num_used = figures["num_blocks"] - num_free
        yield self._gauge("vllm:num_requests_running", "Admitted.", figures["num_running"])
        yield self._gauge("vllm:num_requests_waiting", "Not admitted.", figures["num_waiting"])
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks that requests hold, 0 to 1.",
            num_used / figures["num_blocks"],
        )
        yield self._total("vllm:num_preemptions", "Preemptions.", figures["num_preemptions_total"])
        yield self._total(
            "vllm:prefix_cache_queries",
            "Tokens that were looked for in the prefix cache.",
            figures["num_prefix_queries_total"],
        )
        yield self._total(
            "vllm:prefix_cache_hits", "Those that it had.", figures["num_prefix_hits_total"]
        )
        yield self._total(
            "pipeserve:wasted_decodes",
            "Tokens that were dropped because their request had ended.",
            figures["num_wasted_decodes_total"],
        )
        yield self._gauge(
            "pipeserve:microbatches_in_flight",
            "Microbatches that were planned and have not completed.",
            figures["num_in_flight"],
        )
        yield self._gauge(
            "pipeserve:microbatch_window",
            "How many of them may be at once, the one planned ahead not counted.",
            figures["window"],
        )
        blocks = GaugeMetricFamily(
            "pipeserve:kv_blocks",
            "KV blocks of each stage: those that requests hold, and the others.",
            labels=(*LABELS, "state"),
        )
        blocks.add_metric((*self._labels, "used"), num_used)
        blocks.add_metric((*self._labels, "free"), num_free)
        yield blocks

    def _of_losses(self, status: Status) -> Iterator[Metric]:
        yield self._gauge(
            "pipeserve:pipeline_ready",
            "1 while the stages take steps; 0 while lost ones are started again.",
            float(not status.trouble),
        )
        if status.trouble:
            family = GaugeMetricFamily(
                "pipeserve:lost_stage",
                "While lost ones are started again: which, and why.",
                labels=(*LABELS, "reason"),
            )
            family.add_metric((*self._labels, status.trouble), 1.0)
            yield family
        family = CounterMetricFamily(
            "pipeserve:stage_losses",
            "How often a stage was lost.",
            labels=(*LABELS, "stage", "host"),
        )
        for at in status.where:
            family.add_metric((*self._labels, str(at.stage), at.host), at.num_losses)
        yield family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _total(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    # ---- the stages -----------------------------------------------------------------------------

    def _of_stages(self, stages: Sequence[StageFigures]) -> Iterator[Metric]:
        yield self._histogram(
            "vllm:iteration_tokens_total",
            "Tokens of each microbatch.",
            STEP_TOKENS,
            [(self._labels, stages[0].tokens)],
        )
        yield self._histogram(
            "pipeserve:stage_microbatch_seconds",
            "What each microbatch took a stage.",
            STEP_S,
            [(self._stage_labels(stage), each.steps) for stage, each in enumerate(stages)],
            (*LABELS, "stage"),
        )
        yield self._seconds(stages)
        if any(each.predicted_s for each in stages):
            yield from self._predictions(stages)

    def _predictions(self, stages: Sequence[StageFigures]) -> Iterator[Metric]:
        predicted = ("stage_predicted", "What the cost model predicted for microbatches")
        measured = ("stage_measured", "What the microbatches took that it predicted")
        off = ("stage_prediction_error", "By how much predictions were off, whichever way")
        for (name, help), attribute in (
            (predicted, "predicted_s"),
            (measured, "measured_s"),
            (off, "off_s"),
        ):
            family = CounterMetricFamily(
                f"pipeserve:{name}_seconds", f"{help}.", labels=(*LABELS, "stage")
            )
            for stage, each in enumerate(stages):
                family.add_metric(self._stage_labels(stage), getattr(each, attribute))
            yield family

    def _seconds(self, stages: Sequence[StageFigures]) -> Metric:
        family = CounterMetricFamily(
            "pipeserve:stage_seconds",
            "Where a stage's time went: computing, or idle for a cause (docs/timeline.md).",
            labels=(*LABELS, "stage", "state", "cause"),
        )
        for stage, each in enumerate(stages):
            for name, seconds in each.seconds.items():
                state, cause = (name, "") if name == _COMPUTING else ("idle", name)
                family.add_metric((*self._stage_labels(stage), state, cause), seconds)
        return family

    def _stage_labels(self, stage: int) -> tuple[str, ...]:
        return *self._labels, str(stage)

    @staticmethod
    def _histogram(
        name: str,
        help: str,
        buckets: Sequence[float],
        values: Sequence[tuple[tuple[str, ...], Distribution]],
        labels: tuple[str, ...] = LABELS,
    ) -> Metric:
        family = HistogramMetricFamily(name, help, labels=labels)
        ends = [*map(str, map(float, buckets)), "+Inf"]
        for its_labels, value in values:
            below = list(zip(ends, accumulate(value.counts), strict=True))
            family.add_metric(its_labels, below, value.sum)
        return family
