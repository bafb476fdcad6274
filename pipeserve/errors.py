"""What can go wrong, as one small tree.

PipeserveError
├── ConfigError      the arguments, the recipe or the model are wrong (exit code 2)
├── CapacityError    a request cannot fit: context, KV pool (one request fails, the run goes on)
└── StageError       a stage process died, hung or could not start (exit code 1)

Every message is one line: the value, the limit, the remedy. Imports nothing, so that every part of
the project may import it.
"""


class PipeserveError(Exception):
    """Base of every error that a user is meant to read."""


class ConfigError(PipeserveError):
    """An argument, a recipe or a checkpoint is wrong; nothing was started."""


class CapacityError(PipeserveError):
    """A request asks for more than the context length or the KV pool can ever hold."""


class StageError(PipeserveError):
    """A stage process could not start, died, or lost a neighbour."""
