"""What a fleet hands to its driver, in order: what was said on the wire, and what happened to those
who say it.

An event is no error: what is to become of the run, the driver decides.
"""

from typing import NamedTuple

from pipeserve.errors import ConfigError, StageError
from pipeserve.wire import control


class Joined(NamedTuple):
    """A rank's keeper is there: a stage can be started on it."""


class Sized(NamedTuple):
    """All stages of this epoch have said what they will take, and wait to be told to."""

    stages: tuple[control.StageSized, ...]
    """Of each rank."""


class Ready(NamedTuple):
    """All stages of this epoch have loaded and reached their neighbours: they can take a step."""

    stages: tuple[control.StageReady, ...]
    """Of each rank."""


class Lost(NamedTuple):
    """A rank's stage has failed, died, or cannot be reached any more. Told once in an epoch, after
    all that the stage has said."""

    why: str
    """In one line, with who it was."""
    is_user_error: bool = False
    is_final: bool = False
    """There is nothing to be done about it from here."""
    by_work: bool = True
    """What it computed may be why. Not so, where its keeper or its machine is gone, or a signal has
    stopped it."""

    def error(self) -> ConfigError | StageError:
        """For a run that ends by it."""
        return (ConfigError if self.is_user_error else StageError)(self.why)


class Gone(NamedTuple):
    """A rank's keeper is gone, and its stage with it: there is nobody who could start another."""


FleetEvent = Joined | Sized | Ready | Lost | Gone


class Received(NamedTuple):
    """One of those, or what a stage or a keeper said."""

    message: control.FromStage | control.FromKeeper | FleetEvent
    rank: int
    """Whose; of `Sized` and `Ready`, rank 0."""
    at_s: float
    epoch: int
    """In which it was said, or happened. One that is over is nobody's business any more."""
