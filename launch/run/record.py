"""Where the records of a run go: a ring, for what looks at them while and when it ends, and the
files of `--record DIR`.
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeserve.configs import RunConfig
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.records import Planned, Record, Recorder, ignore
from pipeserve.core.view import Limits
from pipeserve.errors import StageError
from pipeserve.launch.run.collector import no_pauses
from pipeserve.launch.show.explain import explaining
from pipeserve.profiling.recording.recording import Recording, Ring, no_collection, recording_of
from pipeserve.profiling.recording.summary import busy_shares
from pipeserve.profiling.recording.writer import RecordingWriter, check_recordable

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver


@dataclass(slots=True)
class RecordedRun:
    """Of one driver."""

    ring: Ring
    meta: dict[str, Any]
    """What is run: `Recording.meta`."""
    num_stages: int
    start_writing: Callable[[], None]
    """From now on, records go into files too, and microbatches are explained, where the user wants
    that. Called once."""
    shown: Callable[[], AbstractContextManager[None]]
    """While it is entered, the run is shown in the terminal (`--live`)."""

    def recording(self, ring: Ring | None = None) -> Recording:
        """What the ring holds, or one that was taken from it, on the driver's clock."""
        from pipeserve.profiling.recording.clocks import align  # numpy: not before a first token

        kept = self.ring if ring is None else ring
        return align(recording_of(kept, self.num_stages, self.meta)).recording

    def busy_shares(self, start_s: float, stop_s: float) -> list[float]:
        """Of each stage, of that time, or of its end where the ring does not hold all of it."""
        recording = self.recording()
        computed = list(chain(*recording.spans, recording.headed))
        return busy_shares(computed, self.num_stages, max(start_s, self.ring.whole_from_s), stop_s)


@no_collection()
def stage_shares(recording: Recording) -> list[dict[str, Any]]:
    """Of each stage `busy` and `idle_by_cause`, which sum to 1: shares of the time from the first
    arrival to the last token (from when every stage had begun, where the beginning was not kept).
    """
    from pipeserve.profiling.ledger.ledger import explain  # numpy, too

    ledger = explain(recording)
    return [
        {"busy": busy_s / ledger.seconds, "idle_by_cause": ledger.idle_shares(stage)}
        for stage, busy_s in enumerate(ledger.busy_s)
    ]


def context_notes(shape: ModelShape, limits: Limits) -> list[str]:
    """What a reader has to know of a run that computes nothing, and so may go on past it."""
    trained = shape.max_position_embeddings
    if limits.max_model_len <= trained:
        return []
    return [
        f"{shape.name} was trained to {trained:,} positions; its context is set to "
        f"{limits.max_model_len:,} here, for the schedule's sake"
    ]


def ring_notes(ring: Ring) -> list[str]:
    """What a reader of shares of the ring's records has to know."""
    if ring.whole_from_s == -inf:
        return []
    return ["busy and idle_by_cause are of the run's end alone: it was too long to keep it whole"]


@contextmanager
def recorded(
    open_driver: Callable[[Recorder], "Driver"],
    folder: Path | None,
    *,
    overwrite: bool = False,
    explained: bool = False,
) -> Iterator[tuple["Driver", RecordedRun]]:
    """A driver from `open_driver`, closed at the end, and its records. With `explained`, each
    microbatch is, on stderr. Raises ConfigError, before it is opened, when there can be no files in
    `folder`."""
    if folder is not None:
        check_recordable(folder, overwrite)
    ring, to_files, to_lines, to_view = Ring(), ignore, ignore, ignore

    def record(entry: Record) -> None:
        ring.record(entry)
        to_files(entry)
        to_lines(entry)
        to_view(entry)
        if type(entry) is Planned:
            collect()  # the driver has started, and the stages are busy

    with ExitStack() as files, open_driver(record) as driver, no_pauses() as collect:
        meta = meta_of_driver(driver)

        def start_writing() -> None:
            nonlocal to_files, to_lines
            if explained:
                to_lines = explaining(driver.engine)
            if folder is not None:
                writer = files.enter_context(RecordingWriter(folder, meta, overwrite=overwrite))
                to_files = writer.record

        @contextmanager
        def shown() -> Iterator[None]:
            nonlocal to_view
            from pipeserve.launch.show.live import live_view

            with live_view(meta, Console(stderr=True)) as to_view:
                try:
                    yield
                finally:
                    to_view = ignore

        yield driver, RecordedRun(ring, meta, len(driver.stages), start_writing, shown)
        with suppress(StageError):  # after all that was asked for is done
            driver.settle()


def tee(first: Recorder, second: Recorder) -> Recorder:
    """Tells both."""

    def record(entry: Record) -> None:
        first(entry)
        second(entry)

    return record


def meta_of_driver(driver: "Driver") -> dict[str, Any]:
    """What `run.json` says of a run on real or emulated stages."""
    hosts = [stage.host for stage in driver.stages]
    boots = [stage.boot_id for stage in driver.stages]
    seen = list(dict.fromkeys(boots))
    limits = driver.limits
    kind, config = driver.setup.kind, driver.config
    meta = run_meta(kind, config, driver.shape, driver.plan, limits, driver.dtype, hosts)
    return meta | {"machines": [seen.index(boot_id) for boot_id in boots]}


def run_meta(
    kind: str,
    config: RunConfig,
    shape: ModelShape,
    plan: PipelinePlan,
    limits: Limits,
    dtype: str,
    hosts: Sequence[str] = (),
) -> dict[str, Any]:
    """What `run.json` says; docs/timeline.md documents it. `kind`: "real", "simulated" or
    "emulated"; `hosts`: of each stage that is a process."""
    return {
        "kind": kind,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "policy": config.policy,
        "device_profile": config.device_profile,
        "dtype": dtype,
        "hosts": list(hosts),
        "config": asdict(config),
        "shape": asdict(shape),
        "plan": asdict(plan),
        "limits": asdict(limits),
    }
