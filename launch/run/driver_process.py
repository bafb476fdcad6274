"""The process of a server's driver: `python -m pipeserve.launch.run.driver_process`, with its job
on standard input (`server/pipeline.py`). It ends when the server does, and by no signal.
"""

import gc
import sys

import msgspec

from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.gathering import gathering
from pipeserve.driver.serving import ClientDoor
from pipeserve.errors import PipeserveError
from pipeserve.launch.run.figures import RunningFigures
from pipeserve.launch.run.starting import print_plan
from pipeserve.server.pipeline import DriverJob

MODULE = "pipeserve.launch.run.driver_process"


def main() -> int:
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=DriverJob)
    try:
        with ClientDoor(job.address, job.secret) as door:
            with gathering(job.config) as fleet:
                setup = checkpoint_setup(job.config, door.progress)
            with (
                RunningFigures(len(setup.plan.stages)) as figures,
                Driver(setup, door.progress, figures.record, fleet, print_plan) as driver,
            ):
                gc.collect()
                gc.freeze()
                door.serve(driver, figures.latest)
    except (PipeserveError, ConnectionError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
