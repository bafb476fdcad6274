"""Metrics of requests, counted as they come and as their tokens do. Names, labels and buckets are
vLLM's (`v1/metrics/loggers.py`), and so is when each is counted.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import HistogramMetricFamily

from pipeserve.core.nouns import Begun, Output, RequestId
from pipeserve.core.view import Limits
from pipeserve.frontend.completion import Delta, Generation

LABELS = ("model_name", "engine")
ENGINE = "0"
"""There is one."""
_REASONS = ("stop", "length", "abort", "error")
_SOURCES = ("local_compute", "local_cache_hit")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TTFT_S += (20, 40, 80, 160, 640, 2560)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TOKEN_S += (20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_REQUEST_S += (1920, 7680)
_SAMPLES = (1, 2, 5, 10, 20)


@dataclass(slots=True)
class _Prompt:
    """What its samples share."""

    num_left: int
    """Samples that have not ended."""
    most_tokens: int = 0
    """Of a sample that has."""


@dataclass(slots=True)
class _Running:
    """One request."""

    asked_s: float
    generation: Generation
    prompt: _Prompt
    begun: Begun | None = None
    first_s: float = 0.0
    """When its first token was told, and its last one."""
    last_s: float = 0.0
    num_tokens: int = 0


class QuickHistogram:
    """As prometheus_client's, for what comes by the thousand in a second, on one thread: that one
    takes a lock twice for each value. A collector, as it asks for one."""

    def __init__(
        self, name: str, help: str, labels: tuple[str, ...], buckets: Sequence[float]
    ) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._buckets = tuple(map(float, buckets))
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=LABELS)
        below = zip([*map(str, self._buckets), "+Inf"], accumulate(self._counts), strict=True)
        family.add_metric(self._labels, list(below), self._sum)
        yield family


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes metrics of one server."""

    registry: CollectorRegistry
    model_name: str

    def counter(self, name: str, help: str) -> Counter:
        return self._counter(name, help, LABELS).labels(self.model_name, ENGINE)

    def counters(self, name: str, help: str, label: str, values: Sequence[str]) -> dict:
        """One for each value of a label; all are there from the start."""
        family = self._counter(name, help, (*LABELS, label))
        return {value: family.labels(self.model_name, ENGINE, value) for value in values}

    def histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", help, LABELS, registry=self.registry, buckets=buckets)
        return family.labels(self.model_name, ENGINE)

    def quick_histogram(self, name: str, help: str, buckets: Sequence[float]) -> "QuickHistogram":
        made = QuickHistogram(f"vllm:{name}", help, (self.model_name, ENGINE), buckets)
        self.registry.register(made)
        return made

    def _counter(self, name: str, help: str, labels: Sequence[str]) -> Counter:
        return Counter(f"vllm:{name}", help, labels, registry=self.registry)


class RequestMetrics:
    """Of one server."""

    def __init__(self, registry: CollectorRegistry, model_name: str, limits: Limits) -> None:
        self._running: dict[RequestId, _Running] = {}
        self._num_untold = 0
        """Output tokens of which the counter does not know yet."""
        make = _Maker(registry, model_name)
        tokens = _powers(limits.max_model_len)
        self._prompt_tokens = make.counter("prompt_tokens", "Prompt tokens of requests that began.")
        self._by_source = make.counters(
            "prompt_tokens_by_source", "Prompt tokens by source.", "source", _SOURCES
        )
        self._cached = make.counter("prompt_tokens_cached", "Prompt tokens that were cached.")
        self._output_tokens = make.counter("generation_tokens", "Tokens generated.")
        self._ended = make.counters(
            "request_success", "Requests that ended, by how.", "finished_reason", _REASONS
        )
        self._ttft_s = make.histogram(
            "time_to_first_token_seconds", "From asking to the first token.", _TTFT_S
        )
        self._between_s = make.quick_histogram(
            "inter_token_latency_seconds", "From a token to the next.", _TOKEN_S
        )
        self._mean_s = make.histogram(
            "request_time_per_output_token_seconds",
            "Mean of that over each request; 0 of a single token.",
            _TOKEN_S,
        )
        self._request_s = make.histogram(
            "e2e_request_latency_seconds", "From asking to the end.", _REQUEST_S
        )
        self._queue_s = make.histogram(
            "request_queue_time_seconds", "Until the engine admitted it first.", _REQUEST_S
        )
        self._prefill_s = make.histogram(
            "request_prefill_time_seconds", "From there to the first token.", _REQUEST_S
        )
        self._decode_s = make.histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_S
        )
        self._inference_s = make.histogram(
            "request_inference_time_seconds", "Prefill and decode time.", _REQUEST_S
        )
        self._prompt_lengths = make.histogram("request_prompt_tokens", "Prompt tokens.", tokens)
        self._output_lengths = make.histogram(
            "request_generation_tokens", "Tokens generated.", tokens
        )
        self._computed = make.histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", tokens
        )
        self._most_tokens = make.histogram(
            "request_max_num_generation_tokens", "Of the longest sample of each prompt.", tokens
        )
        self._n = make.histogram("request_params_n", "n of each prompt.", _SAMPLES)
        self._max_tokens = make.histogram("request_params_max_tokens", "max_tokens.", tokens)

    # ---- what the pipeline tells ----------------------------------------------------------------

    def submitted(self, generations: Sequence[Generation]) -> None:
        now = time.monotonic()
        for generation in generations:
            request = generation.request
            if request.sample_of is None:  # those of the same prompt follow it
                prompt = _Prompt(request.params.n)
            self._running[request.id] = _Running(now, generation, prompt)

    def came(self, output: Output, delta: Delta) -> None:
        running, num_tokens = self._running[output.request_id], len(delta.token_ids)
        if num_tokens:
            now = time.monotonic()
            if running.num_tokens:
                self._between_s.observe(now - running.last_s)
            else:
                running.first_s = now
                self._ttft_s.observe(now - running.asked_s)
            running.last_s = now
            running.num_tokens += num_tokens
            self._num_untold += num_tokens
        if output.begun is not None:
            self._begin(running, output.begun)
        if delta.finish_reason is not None:
            self.ended(output.request_id, delta.finish_reason)

    def settle(self) -> None:
        """The metrics have all that came."""
        self._output_tokens.inc(self._num_untold)
        self._num_untold = 0

    def _begin(self, running: _Running, begun: Begun) -> None:
        running.begun = begun
        num_prompt = len(running.generation.request.prompt)
        self._prompt_tokens.inc(num_prompt)
        self._by_source["local_cache_hit"].inc(begun.num_cached)
        self._by_source["local_compute"].inc(num_prompt - begun.num_cached)
        self._cached.inc(begun.num_cached)

    def ended(self, request_id: RequestId, reason: str) -> None:
        """Known ones alone are counted: a request ends once. What this server ended for a reason of
        its own is "abort"."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        request = running.generation.request
        self._ended[reason if reason in _REASONS else "abort"].inc()
        self._request_s.observe(time.monotonic() - running.asked_s)
        self._prompt_lengths.observe(len(request.prompt))
        self._output_lengths.observe(running.num_tokens)
        self._max_tokens.observe(request.max_tokens)
        if running.begun is not None:
            self._observe_phases(running, running.begun)
        prompt = running.prompt
        prompt.num_left -= 1
        prompt.most_tokens = max(prompt.most_tokens, running.num_tokens)
        if not prompt.num_left:
            self._n.observe(request.params.n)
            self._most_tokens.observe(prompt.most_tokens)

    def _observe_phases(self, running: _Running, begun: Begun) -> None:
        decode_s = running.last_s - running.first_s
        self._queue_s.observe(begun.queued_s)
        self._prefill_s.observe(begun.prefill_s)
        self._decode_s.observe(decode_s)
        self._inference_s.observe(begun.prefill_s + decode_s)
        self._mean_s.observe(decode_s / max(running.num_tokens - 1, 1))
        self._computed.observe(len(running.generation.request.prompt) - begun.num_cached)


def _powers(most: int) -> list[int]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    found, step = [], 1
    while step <= most:
        found += [digit * step for digit in (1, 2, 5) if digit * step <= most]
        step *= 10
    return found
