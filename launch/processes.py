"""Work spread over processes, none of which outlives the command, however that ends."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, Protocol

from pipeserve.errors import PipeserveError
from pipeserve.launch.stage_process import end_with
from pipeserve.launch.starting import exit_on_signals


class Run(Protocol):
    """Does the same with each of several things."""

    def __call__(
        self, work: Callable[[Any], Any], things: Iterable[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """(thing, what came of it) as they are done. `work` and `things` are pickled; what `work`
        raises is raised here."""
        ...


@contextmanager
def processes(num: int) -> Iterator[Run]:
    """So many processes while it is entered; with 1, this one. Raises PipeserveError when one of
    them was killed."""
    if num == 1:
        yield lambda work, things: ((thing, work(thing)) for thing in things)
        return
    exit_on_signals()
    pool = ProcessPoolExecutor(
        num, get_context("spawn"), initializer=end_with, initargs=(os.getpid(),)
    )

    def run(work: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        with _holding_ctrl_c_back():
            futures = {pool.submit(work, thing): thing for thing in things}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise PipeserveError(
            f"one of {num} processes was killed, perhaps for want of memory; give fewer --processes"
        ) from None
    finally:  # what still runs, is not wanted any more
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.kill()
            process.join()


@contextmanager
def _holding_ctrl_c_back() -> Iterator[None]:
    """A process that is started meanwhile never gets it, from its first moment: a terminal sends it
    to all, and it is this one's to handle; what came meanwhile, at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
