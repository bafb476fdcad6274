"""`pipeserve simulate`: runs on virtual time of the engine and the policies that serve for real.

`docs/simulate.md` says what is simulated and documents the keys of `--json`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeserve.configs import RunConfig
from pipeserve.core.cost.shape import ModelShape
from pipeserve.launch.inputs.wanted import SimulationGoal
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.record import (
    context_notes,
    ring_notes,
    stage_shares,
    tee,
)
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.launch.show.explain import explaining
from pipeserve.launch.show.tables import attainment_line, print_notes, run_table, stage_table
from pipeserve.profiling.recording.recording import Ring, recording_of
from pipeserve.profiling.recording.summary import percentiles, summarize
from pipeserve.profiling.recording.writer import RecordingWriter
from pipeserve.profiling.search.capacity import (
    MAX_MEDIAN_DELAY_S,
    Trial,
    ceiling_rate,
    check_has_gaps,
    find_capacity,
    run_trial,
)
from pipeserve.profiling.search.goodput import Slo, attainment
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    SimulatedPipeline,
    Simulation,
    arrivals_in_order,
)
from pipeserve.profiling.simulation.workloads import check_within_limits

CAPACITY_REQUESTS = 1000
_LONE_REQUESTS = 50
_LONE_SHARE = 1 / 500  # of the ceiling: requests hardly ever meet


def run(
    config: RunConfig,
    shape: ModelShape,
    workload: Workload,
    wanted: SimulationGoal,
    record: Path | None = None,
    explained: bool = False,
) -> dict[str, Any]:
    """Answers, prints, and returns the object that `--json` writes; a run of the workload is
    recorded in the folder `record`, and explained on stderr. Raises ConfigError."""
    setup, console = simulated_run(config, shape), Console()
    if wanted.find_capacity:
        report = search_capacity(setup, workload, wanted.slo_tbt_s)
        print_capacity(report, console)
    else:
        report = simulate(setup, workload, wanted.slo, record, explained)
        print_report(report, console)
    return report


# ---- a run of a workload ------------------------------------------------------------------------


def simulate(
    setup: SimulatedRun,
    workload: Workload,
    slo: Slo | None = None,
    record: Path | None = None,
    explained: bool = False,
) -> dict[str, Any]:
    """Serves the workload to its end, counts what was within `slo`, records it in the folder
    `record` and, if that is wanted, explains each microbatch on stderr.

    Returns the object that `--json` writes (docs/simulate.md).
    Raises ConfigError for a request over the context or the KV pool.
    """
    arrivals = _arrivals(setup, workload)
    engine, ring, meta = setup.make_engine(), Ring(), setup.meta()
    with ExitStack() as stack:
        tell = ring.record
        if record is not None:
            writer = stack.enter_context(RecordingWriter(record, meta))
            tell = tee(tell, writer.record)
        if explained:
            tell = tee(tell, explaining(engine))
        pipeline = SimulatedPipeline(engine, setup.times, tell)
        simulation = Simulation(pipeline, arrivals)
        simulation.run_until()
    records = [served.record() for served in simulation.served]
    delays = [served.started_s - served.arrival_s for served in simulation.served]
    stages = stage_shares(recording_of(ring, len(setup.plan.stages), meta))
    return {
        **asdict(summarize(records)),
        "queueing_s": asdict(percentiles(delays)),
        "preemptions": pipeline.engine.stats.preemptions,
        "microbatches": len(pipeline.flights),
        **({"attainment": attainment(simulation.served, slo)._asdict()} if slo else {}),
        **_common(setup, workload, stages),
        "notes": [*_notes(setup, workload), *ring_notes(ring)],
    }


def _arrivals(setup: SimulatedRun, workload: Workload) -> list[Arrival]:
    lengths = _checked_lengths(setup, workload)
    return arrivals_in_order(workload.arrival_times_s(), lengths, workload.request_priorities())


def _checked_lengths(setup: SimulatedRun, workload: Workload) -> list[tuple[int, int]]:
    """Before anything runs: one that does not fit may be the last of many."""
    lengths = workload.token_lengths()
    check_within_limits(lengths, setup.limits, workload.length_scale)
    return lengths


def _common(
    setup: SimulatedRun, workload: Workload, stages: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What every report ends with. `stages`: `busy` and `idle_by_cause` of each."""
    return {
        "stages": [
            {**shares, "layers": stage.num_layers}
            for stage, shares in zip(setup.plan.stages, stages, strict=True)
        ],
        "policy": setup.config.policy,
        "workload": workload.name,
        "simulated": setup.profile.name,
        "notes": _notes(setup, workload),
        "limits": asdict(setup.limits),
        "config": asdict(setup.config),
    }


def _notes(setup: SimulatedRun, workload: Workload) -> list[str]:
    return [*workload.notes, *context_notes(setup.shape, setup.limits)]


# ---- capacity -----------------------------------------------------------------------------------


def search_capacity(setup: SimulatedRun, workload: Workload, slo_tbt_s: float) -> dict[str, Any]:
    """The highest Poisson rate within the SLO, of requests drawn from the workload's lengths.

    Returns the object that `--json` writes. Raises as `simulate` does.
    """
    lengths = _checked_lengths(setup, workload)
    check_has_gaps(workload.name, lengths)
    seed = setup.config.seed

    def trial(rate: float, min_requests: int = CAPACITY_REQUESTS) -> Trial:
        priorities = workload.request_priorities()
        return run_trial(
            setup.make_pipeline, lengths, rate, min_requests, seed, priorities=priorities
        )

    ceiling = ceiling_rate(setup.times, lengths)
    lone = trial(ceiling * _LONE_SHARE, _LONE_REQUESTS)
    capacity = find_capacity(trial, slo_tbt_s, ceiling, lone)
    best = capacity.best(slo_tbt_s)
    busy = best.busy if best else lone.busy
    return {
        "capacity_rps": capacity.rate,
        "ceiling_rps": capacity.ceiling,
        "slo_tbt_s": slo_tbt_s,
        "trials": [asdict(trial) for trial in capacity.trials],
        **_common(setup, workload, [_unattributed(share) for share in busy]),
    }


def _unattributed(busy: float) -> dict[str, Any]:
    """Of a stage in a trial, which is not recorded: there are many, and they are long."""
    return {"busy": busy, "idle_by_cause": {"unattributed": 1 - busy}}


# ---- printing -----------------------------------------------------------------------------------


def print_report(report: dict[str, Any], console: Console) -> None:
    """A simulated run as tables."""
    console.print(run_table(report))
    console.print(stage_table(report["stages"]))
    if "attainment" in report:
        console.print(attainment_line(report["attainment"]))
    print_notes(report, console)


def print_capacity(report: dict[str, Any], console: Console) -> None:
    """A capacity search as a table of its trials, and what came of it."""
    slo_tbt_s = report["slo_tbt_s"]
    table = Table(title=f"{report['workload']}, policy {report['policy']}")
    for name in ("requests/s", "requests", "TBT p99", "queueing p50", "busy", "within"):
        table.add_column(name, justify="right")
    for trial in sorted(report["trials"], key=lambda trial: trial["rate"]):
        within = trial["tbt_p99_s"] <= slo_tbt_s and trial["queueing_p50_s"] <= MAX_MEDIAN_DELAY_S
        table.add_row(
            f"{trial['rate']:.3f}",
            f"{trial['requests']:,}",
            f"{trial['tbt_p99_s']:.3f} s",
            f"{trial['queueing_p50_s']:.2f} s",
            f"{max(trial['busy']):.0%}",
            "yes" if within else "no",
        )
    console.print(table)
    limits = f"TBT p99 within {slo_tbt_s:g} s, queueing p50 within {MAX_MEDIAN_DELAY_S:g} s"
    if report["capacity_rps"]:
        share = report["capacity_rps"] / report["ceiling_rps"]
        console.print(
            f"capacity {report['capacity_rps']:.3f} requests/s ({limits}), "
            f"{share:.0%} of the {report['ceiling_rps']:.3f} that ever full microbatches would give"
        )
    else:
        console.print(
            f"cannot: even requests that hardly meet are not within the limits ({limits}); "
            "give a longer --slo-tbt, a smaller --max-num-batched-tokens or fewer stages"
        )
    print_notes(report, console)
