"""Starting a driver from the command line: what is said meanwhile, and what a signal does."""

import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.core.records import Recorder, ignore
from pipeserve.launch.run.phases import status

if TYPE_CHECKING:
    from pipeserve.core.view import CostModel
    from pipeserve.driver.driver import Driver
    from pipeserve.driver.setup import Setup
    from pipeserve.launch.run.record import RecordedRun
    from pipeserve.stages.config.model_config import ModelConfig

Check = Callable[["ModelConfig"], None]


def open_driver(
    run_config: RunConfig,
    cost: "CostModel | None" = None,
    record: Recorder = ignore,
    check: Check = lambda model_config: None,
) -> "Driver":
    """Start the stages, unless `check` raises for their model. Says on stderr what was loaded and,
    on a terminal, what is being waited for until then."""
    from pipeserve.driver.checkpoint import checkpoint_setup
    from pipeserve.launch.show.loaded import loaded

    return _start(
        run_config, lambda say: checkpoint_setup(run_config, say, cost, check), record, loaded
    )


def open_emulated(run_config: RunConfig, record: Recorder = ignore) -> "Driver":
    """As `open_driver`, on stages that wait as long as their device profile says."""
    from pipeserve.launch.run.emulated import check_one_clock, emulated, emulated_setup

    driver = _start(run_config, lambda say: emulated_setup(run_config), record, emulated)
    check_one_clock(driver)
    return driver


def open_unloaded(run_config: RunConfig, lacks: list[str], record: Recorder = ignore) -> "Driver":
    """As `open_driver`, of stages that load nothing. What they would lack of memory is put into
    `lacks`."""
    from pipeserve.driver.checkpoint import checkpoint_setup
    from pipeserve.launch.run.unloaded import without_weights

    return _start(
        run_config, lambda say: without_weights(checkpoint_setup(run_config, say), lacks), record
    )


def _start(
    config: RunConfig,
    make_setup: "Callable[[Callable[[str], None]], Setup]",
    record: Recorder,
    describe: "Callable[[Driver], str] | None" = None,
) -> "Driver":
    from pipeserve.driver.driver import Driver
    from pipeserve.driver.gathering import gathering

    exit_on_signals()
    with status("looking for the model") as say:
        with gathering(config) as fleet:
            setup = make_setup(say)
        driver = Driver(setup, say, record, fleet, print_plan)
    if driver.setup.dtype_warning:
        print(f"warning: {driver.setup.dtype_warning}", file=sys.stderr)
    if describe is not None:
        print(describe(driver), file=sys.stderr)
    return driver


def print_plan(driver: "Driver") -> None:
    """On stderr."""
    from pipeserve.launch.show.plan import plan_lines

    print(*plan_lines(driver), sep="\n", file=sys.stderr, flush=True)


def recorded_driver(
    run_config: RunConfig,
    folder: Path | None,
    *,
    overwrite: bool = False,
    explained: bool = False,
    check: Check = lambda model_config: None,
    may_emulate: bool = False,
) -> AbstractContextManager[tuple["Driver", "RecordedRun"]]:
    """A driver, and its records, which `--record FOLDER` wants in files and `--explain` in words.
    Its stages are emulated where the run says so and the caller can do with tokens that mean
    nothing (`may_emulate`)."""
    from pipeserve.launch.run.record import recorded

    def start(record: Recorder) -> "Driver":
        if may_emulate and run_config.device == "emulated":
            return open_emulated(run_config, record)
        return open_driver(run_config, record=record, check=check)

    return recorded(start, folder, overwrite=overwrite, explained=explained)


def exit_on_signals() -> None:
    """From now on, what ends the command does so as Ctrl-C does: what was opened is closed. What
    it was started to ignore (nohup) it goes on ignoring."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, _exit_on_signal)


def _exit_on_signal(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)
