"""Work spread over processes, none of which outlives the command, however that ends."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, Protocol

from pipeserve.errors import PipeserveError
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.stage.process import end_with

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REAPED_WITHIN_S = 0.005
_LOOKS_UP_S = 0.5
"""A signal that comes just before this thread sleeps, or is handed to another, does not wake it:
its handler runs when this one looks up by itself."""


class ParallelMap(Protocol):
    """Does the same with each of several things."""

    def __call__(
        self, work: Callable[[Any], Any], things: Iterable[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """(thing, what came of it) as they are done. `work` and `things` are pickled; what `work`
        raises is raised here."""
        ...


@contextmanager
def processes(num: int) -> Iterator[ParallelMap]:
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
        with _holding_signals_back():
            futures = {pool.submit(work, thing): thing for thing in things}
        left = set(futures)
        while left:
            done, left = wait(left, _LOOKS_UP_S, FIRST_COMPLETED)
            for future in done:
                yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise PipeserveError(
            f"one of {num} processes was killed, perhaps for want of memory; give fewer --processes"
        ) from None
    finally:  # what still runs, is not wanted any more
        with _holding_signals_back():
            pool.shutdown(wait=False, cancel_futures=True)
            while left := active_children():  # the pool's own thread may be who reaps them
                for process in left:
                    process.kill()
                time.sleep(_REAPED_WITHIN_S)


@contextmanager
def _holding_signals_back() -> Iterator[None]:
    """What ends the command is handled at the end of this: a process half started, or half ended,
    would be lost. Blocking them is not enough, for the kernel then hands them to another thread,
    and Python handles them in this one all the same; so their handlers wait.

    Ctrl-C is blocked besides, so that a process that is started meanwhile never gets it, from its
    first moment: a terminal sends it to all, and it is this one's to handle."""
    came: list[int] = []
    handlers = {each: signal.getsignal(each) for each in _ENDINGS}
    held = [each for each in _ENDINGS if handlers[each] is not signal.SIG_IGN]
    for each in held:
        signal.signal(each, lambda signum, frame: came.append(signum))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for each in held:
            signal.signal(each, handlers[each])
        for each in came[:1]:
            signal.raise_signal(each)
