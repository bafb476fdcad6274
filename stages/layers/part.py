"""What a stage is made of."""

from typing import Any

from torch import nn

from pipeserve.stages.backends.backend import Backend


class Part(nn.Module):
    """A module that computes by its stage's backend."""

    backend: Backend
    """Set by the stage, once all of its parts are there."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """`forward`, without what PyTorch does around it for hooks that nobody has: a tenth of a
        stage's Python."""
        return self.forward(*arguments, **named)
