"""`Client`: the way to a pipeline, for all who bring it requests.

In the process of the driver, the driver itself is one. In another process, one that speaks to it
over a socket stands behind the same methods. Text is made on this side of them: a driver knows
token ids alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Output, Request, RequestId
from pipeserve.core.view import Limits


class Client(Protocol):
    """Requests in, and what becomes known of them out, in order."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def limits(self) -> Limits:
        """By which `check_fits` tells, ahead of `submit`, what can never run."""
        ...

    @property
    def model_folder(self) -> Path: ...

    @property
    def vocab_size(self) -> int:
        """Of the model: token ids are below it."""
        ...

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Of the model's configuration."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or none.

        Raises CapacityError and ConfigError for one that can never run, and StageError when the
        pipeline has ended.
        """
        ...

    def abort(self, request_id: RequestId, reason: str = "abort") -> None:
        """End a request; outputs that are on their way may still come. Does not raise, and may be
        called at any moment and on any thread, for Python collects what was dropped on any."""
        ...

    def outputs(self, timeout_s: float) -> list[Output]:
        """What became known since the last call, waiting at most `timeout_s` for it; may be empty.

        Raises StageError when a stage died, and again at every later call.
        """
        ...

    def close(self) -> None:
        """Safe to call twice."""
        ...
