"""What a family of models is to a stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeserve.stages.config.config_file import ConfigFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How config.json is read, and what the parts of a stage are.

    A layer is called with (hidden [T, D], LayerInputs, PoolLayer) and returns hidden [T, D]; the
    embedding with (ids [T], positions [T]); the head with hidden [R, D], for logits [R, V].
    """

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
    read_config: Callable[[ConfigFile], Any]
    """-> a ModelConfig, which the functions below take."""
    make_embedding: Callable[[Any], nn.Module]
    make_layer: Callable[[Any, int, str], nn.Module]
    """(config, number of the layer, prefix of its tensors' names)."""
    make_head: Callable[[Any], nn.Module]
