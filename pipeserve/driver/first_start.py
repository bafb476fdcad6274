"""The first start of a pipeline: from keepers that are waited for to stages that say what they
would take. What is to run where is settled here, with the ranks that have joined.
"""

from collections.abc import Callable

from pipeserve.driver import layer_choice
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.setup import Setup
from pipeserve.driver.stage_info import one_of_each_stage
from pipeserve.driver.starting import jobs_of
from pipeserve.driver.waiting import gather_examined, wait_for_keepers, wait_until_sized
from pipeserve.wire import control

Sizes = tuple[control.StageSized, ...]
"""What each rank says that it would take."""


def first_start(
    setup: Setup, fleet: Fleet, on_progress: Callable[[str], None]
) -> tuple[Setup, Sizes]:
    """The run as it suits the ranks, whose stages wait for `TakeMemory` then."""
    wait_for_keepers(fleet, on_progress)
    setup = _suited(setup, fleet)
    start_stages(setup, fleet)
    sizes = wait_until_sized(fleet, on_progress)
    return _placed(setup, fleet, sizes, on_progress)


def start_stages(setup: Setup, fleet: Fleet) -> None:
    """All of them, in a fresh epoch."""
    fleet.start(jobs_of(setup, fleet.topology, fleet.local_name))


def _suited(setup: Setup, fleet: Fleet) -> Setup:
    """Another run, where ranks on other machines compute on other devices than was thought."""
    keepers = [fleet.keepers[rank] for rank in range(fleet.topology.num_ranks)]
    native = tuple(keeper.native_dtypes for keeper in keepers)
    devices = tuple(keeper.device for keeper in keepers)
    if setup.for_ranks is None or (native, devices) == (setup.native_dtypes, setup.devices):
        return setup
    return setup.for_ranks(keepers)


def _placed(
    setup: Setup, fleet: Fleet, sizes: Sizes, on_progress: Callable[[str], None]
) -> tuple[Setup, Sizes]:
    """The same with its layers placed, where that is left to us: by what the ranks say of
    themselves. Their processes stay, and say what they would take with those layers."""
    choice = setup.choice
    if choice is None or len(setup.plan.stages) == 1:
        return setup, sizes
    found: list[control.Examined] = []
    if choice.works:
        on_progress("timing layers on each rank")
        examined = gather_examined(fleet, choice.works, layer_choice.EXAMINE_S)
        found = [examined[rank] for rank in fleet.topology.speakers]
    placed = layer_choice.place(setup, one_of_each_stage(setup.plan, sizes), found)
    if placed.plan == setup.plan:
        return placed, sizes
    start_stages(placed, fleet)
    return placed, wait_until_sized(fleet, on_progress)
