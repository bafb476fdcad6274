"""What a stage is built of."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Parts(NamedTuple):
    """Of one family; each is made of its ModelConfig.

    A layer is called with (hidden [T, D], LayerInputs, PoolLayer) and returns hidden [T, D], or of
    the rows alone that `LayerInputs` has go on behind its keys and values; the
    embedding with (ids [T], positions [T]); the head with hidden [R, D], for logits [R, V].
    """

    make_embedding: Callable[[Any], nn.Module]
    make_layer: Callable[[Any, int, str], nn.Module]
    """(config, number of the layer, prefix of its tensors' names)."""
    make_head: Callable[[Any], nn.Module]
