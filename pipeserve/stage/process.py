"""A stage's process from its first moment on: it ends when its keeper does, takes its cores, and
becomes the program that the keeper names.

    python -m pipeserve.stage.process KEEPER_PID CORE,CORE,... MODULE

Here, and not between fork and exec: what a forked child of a process with threads does there may
wait for a lock that nobody holds any more.
"""

import contextlib
import ctypes
import gc
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(keeper_pid: int) -> None:
    """This process when that one, its parent, does, however that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper_pid:  # it ended before the line above
        os._exit(1)


def main() -> None:
    keeper_pid, cores, module = sys.argv[1:]
    end_with(int(keeper_pid))
    for ending in (signal.SIGINT, signal.SIGTERM):  # they come to all: the keeper's to handle
        signal.signal(ending, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # some containers do not allow it, and a core may have gone
        os.sched_setaffinity(0, map(int, cores.split(",")))
    gc.disable()  # until all is imported: it would walk through the same objects again and again
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
