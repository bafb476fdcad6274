"""What a stage is made of."""

from torch import nn

from pipeserve.stages.backends.backend import Backend


class Part(nn.Module):
    """A module that computes by its stage's backend."""

    backend: Backend
    """Set by the stage, once all of its parts are there."""
