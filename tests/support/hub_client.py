"""Fetches a model from a hub in a process of its own, since the hub's client reads its environment
variables once. For the tests.

Such a process is a fork of one that has imported torch, which takes seconds, and not the client.
"""

import os
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.sources import resolve

_context = get_context("forkserver")
_context.set_forkserver_preload([resolve.__module__])


class Fetch:
    """`resolve(model)` with these variables and no other HF_ ones, begun when it is made."""

    def __init__(self, model: str, folder: Path, environment: dict[str, str]) -> None:
        self._answer, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_fetch, args=(theirs, model, folder, environment))
        self.process.start()
        theirs.close()

    def result(self) -> tuple[Path | None, str, list[str]]:
        """The folder that the model is in, or why there is none, and what was said meanwhile."""
        assert self._answer.poll(60), "no answer"
        result = self._answer.recv()
        self.process.join()
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _fetch(answer: Connection, model: str, folder: Path, environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    said: list[str] = []
    try:
        answer.send((resolve(model, on_progress=said.append), "", said))
    except ConfigError as error:
        answer.send((None, str(error), said))
