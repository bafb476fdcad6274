"""pipeserve serves one large language model over several devices as a pipeline.

    with pipeserve.LLM("smollm2-135m", pipeline_parallel_size=2) as llm:
        for completion in llm.generate(["Hello"], pipeserve.SamplingParams(temperature=0)):
            print(completion.text)

Importing this package loads neither torch nor transformers; each name is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeserve.frontend.completion import Completion
    from pipeserve.frontend.llm import LLM
    from pipeserve.launch.job.job import launched
    from pipeserve.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__", "launched"]

_HOMES = {
    "LLM": "pipeserve.frontend.llm",
    "SamplingParams": "pipeserve.core.nouns",
    "Completion": "pipeserve.frontend.completion",
    "launched": "pipeserve.launch.job.job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
