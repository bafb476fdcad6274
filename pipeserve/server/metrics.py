"""What Prometheus reads: vLLM's names where the meaning is the same, so that dashboards carry over,
and ours (`pipeserve:`) of the pipeline and its stages. docs/server.md lists them.
"""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import generate_latest as text_of

from pipeserve.server.http_metrics import HttpMetrics
from pipeserve.server.pipeline_metrics import PipelineMetrics
from pipeserve.server.request_metrics import RequestMetrics
from pipeserve.wire.client import Opened


class Metrics:
    """Of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # or each series has another one beside it
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self.http = HttpMetrics(self._registry)
        self.requests: RequestMetrics | None = None
        """These two from `opened` on."""
        self.pipeline: PipelineMetrics | None = None

    def opened(self, opened: Opened) -> None:
        """The pipeline is up."""
        self.requests = RequestMetrics(self._registry, self._model_name, opened.limits)
        self.pipeline = PipelineMetrics(self._model_name, opened.limits)
        self._registry.register(self.pipeline)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        if self.requests is not None:
            self.requests.settle()
        return text_of(self._registry)
