"""The process of a server's driver: `python -m pipeserve.launch.run.driver_process`, with its job
on standard input (`server/pipeline.py`). It ends when the server does.
"""

import gc
import signal
import sys

import msgspec

from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.serving import ClientDoor
from pipeserve.errors import PipeserveError
from pipeserve.launch.run.figures import RunningFigures
from pipeserve.launch.run.starting import print_plan
from pipeserve.server.pipeline import DriverJob

MODULE = "pipeserve.launch.run.driver_process"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    # Ctrl-C in a terminal goes to all of its processes: the server ends this one when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=DriverJob)
    try:
        with ClientDoor(job.address, job.secret) as door:
            setup = checkpoint_setup(job.config, door.progress)
            with (
                RunningFigures(len(setup.plan.stages)) as figures,
                Driver(setup, door.progress, figures.record, on_plan=print_plan) as driver,
            ):
                gc.collect()
                gc.freeze()
                door.serve(driver, figures.latest)
    except (PipeserveError, ConnectionError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
