"""`pipeserve report`: a recorded run in the terminal, as a page and as a Perfetto trace; or two
runs, cause by cause.

`docs/timeline.md` says how to read it and documents the keys of `--json`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeserve.configs.device_profiles import load_profile
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import rough_profile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.jsonl import check_writable, write_json
from pipeserve.launch.show.report_numbers import compare, report_of
from pipeserve.launch.show.report_tables import print_comparison, print_run
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.pages.html_report import write_report
from pipeserve.profiling.pages.perfetto import write_perfetto
from pipeserve.profiling.recording.clocks import align
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.recording.recording import Recording

MOST_TRACED = 200_000
"""Spans. A trace of more is not written unless it is asked for."""
_TRACE_BYTES = 500  # for each span, with its idle time and arrows


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """A recording in a folder, on the driver's clock; no ledger where nothing was computed."""

    folder: Path
    recording: Recording
    ledger: Ledger | None


def report(
    folders: Sequence[Path],
    html_file: Path | None = None,
    json_file: Path | None = None,
    perfetto_file: Path | None = None,
    advise: bool = False,
) -> int:
    """One folder: prints the run, and writes report.html and trace.json, by default beside the
    recording. Two: compares them. Returns the exit code.

    Raises ConfigError: no recording there, files that cannot be written, more than two folders.
    """
    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"{len(folders)} folders; give one to report on, or two to compare")
    if len(folders) == 2 and (html_file or perfetto_file or advise):
        raise ConfigError("--html, --perfetto and --advise are of one run; give one folder")
    if json_file is not None:
        check_writable(json_file)
    runs = [read_run(folder) for folder in folders]
    console = Console()
    if len(runs) == 2:
        found = compare(*map(_numbers, runs))
        print_comparison(found, console)
    else:
        [run] = runs
        found = _numbers(run)
        print_run(found, console)
        _write_pictures(run, html_file, perfetto_file, console)
        if advise:
            found["advice"] = _advise(run, console)
    write_json(json_file, found)
    return 0


def read_run(folder: Path) -> ReportedRun:
    """Raises ConfigError where nothing of a recording is there."""
    recording = align(read_recording(folder)).recording
    ledger = explain(recording) if any(recording.spans) else None
    return ReportedRun(folder, recording, ledger)


def _numbers(run: ReportedRun) -> dict[str, Any]:
    return report_of(run.folder.name, run.recording, run.ledger)


def _write_pictures(
    run: ReportedRun, html_file: Path | None, perfetto_file: Path | None, console: Console
) -> None:
    """Beside the recording, unless other files are named."""
    if run.ledger is None or run.ledger.seconds <= 0:
        console.print("no page and no trace: nothing was computed")
        return
    html_file = html_file or run.folder / "report.html"
    check_writable(html_file)
    num_spans = sum(map(len, run.recording.spans))
    if perfetto_file is None and num_spans <= MOST_TRACED:
        perfetto_file = run.folder / "trace.json"
    if perfetto_file is not None:
        check_writable(perfetto_file)
    write_report(html_file, run.recording, run.ledger)
    console.print(f"page:  {html_file}", soft_wrap=True, highlight=False)
    if perfetto_file is None:
        size = num_spans * _TRACE_BYTES >> 20
        console.print(f"trace: would have {size:,} MiB; --perfetto FILE writes it", soft_wrap=True)
        return
    write_perfetto(perfetto_file, run.recording, run.ledger)
    console.print(f"trace: {perfetto_file} (ui.perfetto.dev)", soft_wrap=True, highlight=False)


def _advise(run: ReportedRun, console: Console) -> dict[str, Any] | None:
    from pipeserve.launch.verbs.advice import advice_report, print_advice
    from pipeserve.profiling.advice.advice import advise

    if run.ledger is None:
        return None
    make_cost, notes = None, ()
    try:
        make_cost = cost_maker(run.recording.meta)
    except ConfigError as error:
        notes = (f"what policies predicted with is not here, they are replayed without: {error}",)
    with console.status("replaying the run with one change at a time"):
        advice = advise(run.recording, make_cost=make_cost)
    advice = replace(advice, notes=(*advice.notes, *notes))
    print_advice(advice, console)
    return advice_report(advice)


def cost_maker(meta: Mapping[str, Any]) -> Callable[[PipelinePlan], PipelineCost] | None:
    """Of what the run's policy predicted with, for any plan; it learns anew. Raises ConfigError
    where the profile cannot be read any more."""
    if "shape" not in meta:
        return None
    name, shape = meta.get("device_profile"), ModelShape(**meta["shape"])
    config = meta["config"]
    profile = rough_profile(config["device"]) if name is None else load_profile(name)
    size = config["tensor_parallel_size"]
    return lambda plan: PipelineCost(profile, shape, plan, size)
