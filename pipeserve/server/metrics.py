"""What Prometheus reads: vLLM's names where the meaning is the same, so that dashboards carry over,
and ours (`pipeserve:`) of each stage.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as text_of
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeserve.core.nouns import RequestId
from pipeserve.frontend.completion import Delta, Generation
from pipeserve.wire import client

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TTFT_S += (20, 40, 80, 160, 640, 2560)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKEN_S += (20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
"""vLLM's buckets (`v1/metrics/loggers.py`)."""


@dataclass(slots=True)
class _Running:
    """One request."""

    asked_s: float
    num_prompt_tokens: int
    last_s: float = 0.0
    """When its last token was told."""
    num_tokens: int = 0


class Metrics:
    """Of one server: counted as requests come and as their tokens do."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._running: dict[RequestId, _Running] = {}
        self.status: client.Status | None = None
        """What the driver said last."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._output_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._ended = self._counter(
            "request_success", "Requests that ended, by how.", ("finished_reason",)
        )
        self._ttft_s = self._histogram("time_to_first_token_seconds", _TTFT_S)
        self._between_s = self._histogram("inter_token_latency_seconds", _TOKEN_S)
        self._request_s = self._histogram("e2e_request_latency_seconds", _REQUEST_S)
        self._prompt_lengths = self._histogram("request_prompt_tokens", _TOKENS)
        self._output_lengths = self._histogram("request_generation_tokens", _TOKENS)

    def text(self) -> bytes:
        return text_of(self._registry)

    # ---- what the pipeline tells ----------------------------------------------------------------

    def submitted(self, generations: Sequence[Generation]) -> None:
        now = time.monotonic()
        for generation in generations:
            request = generation.request
            self._running[request.id] = _Running(now, len(request.prompt))

    def came(self, request_id: RequestId, delta: Delta) -> None:
        running = self._running[request_id]
        if delta.token_ids:
            now = time.monotonic()
            if running.num_tokens:
                self._between_s.observe(now - running.last_s)
            else:
                self._ttft_s.observe(now - running.asked_s)
                self._prompt_tokens.inc(running.num_prompt_tokens)
            running.last_s = now
            running.num_tokens += len(delta.token_ids)
            self._output_tokens.inc(len(delta.token_ids))
        if delta.finish_reason is not None:
            self.ended(request_id, delta.finish_reason)

    def ended(self, request_id: RequestId, reason: str) -> None:
        """Known ones alone are counted: a request ends once."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self._ended.labels(self._model_name, reason).inc()
        self._request_s.observe(time.monotonic() - running.asked_s)
        self._prompt_lengths.observe(running.num_prompt_tokens)
        self._output_lengths.observe(running.num_tokens)

    # ---- what the driver says, when it is asked for ---------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        if self.status is None:
            return
        figures = self.status.figures
        num_used = figures["num_blocks"] - figures["num_free_blocks"]
        yield self._gauge("num_requests_running", figures["num_running"])
        yield self._gauge("num_requests_waiting", figures["num_waiting"])
        yield self._gauge("kv_cache_usage_perc", num_used / figures["num_blocks"])
        yield self._total("num_preemptions", figures["num_preemptions_total"])
        yield self._total("prefix_cache_hits", figures["num_cached_prefix_tokens_total"])
        yield self._gauge("microbatches_in_flight", figures["num_in_flight"], "pipeserve:")
        yield self._gauge("pipeline_ready", float(not self.status.trouble), "pipeserve:")
        yield self._losses()

    def _losses(self) -> Metric:
        """Of each stage: how often it was lost."""
        labels = ("model_name", "stage", "host")
        family = CounterMetricFamily("pipeserve:stage_losses", "stage_losses", labels=labels)
        for at, figures in zip(self.status.where, self.status.stages, strict=True):
            number = figures["num_losses_total"]
            family.add_metric((self._model_name, str(at.stage), at.host), number)
        return family

    def _gauge(self, name: str, value: float, prefix: str = "vllm:") -> Metric:
        family = GaugeMetricFamily(f"{prefix}{name}", name, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _total(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", name, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        counter = Counter(f"vllm:{name}", help, ("model_name", *labels), registry=self._registry)
        return counter if labels else counter.labels(self._model_name)

    def _histogram(self, name: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", name, ("model_name",), registry=self._registry, buckets=buckets
        )
        return histogram.labels(self._model_name)
