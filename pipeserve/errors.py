"""What can go wrong, as one small tree.

PipeserveError
├── ConfigError      the arguments, the recipe or the model are wrong (exit code 2)
├── CapacityError    a request cannot fit: context, KV pool (one request fails, the run goes on)
└── StageError       a stage process died, hung or could not start (exit code 1)

Every message is one line: the value, the limit, the remedy. Imports nothing, so that every part of
the project may import it.
"""

_LONGEST_QUOTE = 500


class PipeserveError(Exception):
    """Base of every error that a user is meant to read."""


class ConfigError(PipeserveError):
    """An argument, a recipe or a checkpoint is wrong; nothing was started."""


class CapacityError(PipeserveError):
    """A request asks for more than the context length or the KV pool can ever hold."""


class StageError(PipeserveError):
    """A stage process could not start, died, or lost a neighbour."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line and not too long; its name, where it says
    nothing."""
    text = " ".join(str(error).split())
    return text[:_LONGEST_QUOTE] if text else type(error).__name__
