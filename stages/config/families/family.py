"""What a family of models is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeserve.stages.config.config_file import ConfigFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How config.json is read, and where the parts of a stage are found."""

    name: str
    architectures: tuple[str, ...]
    """As in config.json."""
    model_type: str
    """As in config.json; what transformers goes by."""
    models: str
    """That people know."""
    differs: str
    """From a Llama, in a line."""
    layers: str
    """Where the checkpoint keeps its layers; ".0." and so on follow."""
    parts: str
    """Of `stages/families/`, the module that has them."""
    read_config: Callable[[ConfigFile], Any]
    """-> a ModelConfig, which the parts take."""
