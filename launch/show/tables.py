"""The tables that verbs print of a report, the object that `--json` writes."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def run_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['workload']}, policy {report['policy']}", show_header=False)
    table.add_row("requests", f"{report['requests']:,}")
    table.add_row(
        "tokens", f"{report['prompt_tokens']:,} prompt + {report['output_tokens']:,} output"
    )
    table.add_row("seconds", f"{report['seconds']:.2f}")
    if len(report.get("run_seconds", ())) > 1:
        table.add_row("of runs", " ".join(f"{run:.2f}" for run in report["run_seconds"]))
    table.add_row("total tokens/s", f"{report['total_tokens_per_s']:,.1f}")
    table.add_row("output tokens/s", f"{report['output_tokens_per_s']:,.1f}")
    for name, key in (("TTFT", "ttft_s"), ("TBT", "tbt_s"), ("queueing", "queueing_s")):
        if report.get(key) is not None:
            numbers = " / ".join(f"{seconds * 1000:,.1f}" for seconds in report[key].values())
            table.add_row(f"{name} p50 / p90 / p99", f"{numbers} ms")
    return table


def stage_table(stages: Sequence[dict[str, Any]]) -> Table:
    shares = [name for name in ("busy", "cpu") if name in stages[0]]
    table = Table(title="stages, shares of the time")
    for name in ("stage", "layers", *shares, "idle"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(stages):
        values = [*(stage[name] for name in shares), 1 - stage["busy"]]
        table.add_row(str(number), str(stage["layers"]), *(f"{value:.0%}" for value in values))
    return table


def memory_table(stages: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="memory in MiB; bare is the interpreter with torch")
    for name in ("stage", "weights", "KV", "bare", "sum", "peak", "peak/sum"):
        table.add_column(name, justify="right")
    for number, stage in enumerate(stages):
        parts = [stage[key] for key in ("weight_bytes", "kv_bytes", "baseline_bytes")]
        total, peak = sum(parts), stage["peak_bytes"]
        sizes = (f"{size / 2**20:,.0f}" for size in (*parts, total, peak))
        table.add_row(str(number), *sizes, f"{peak / total:.2f}")
    return table


def attainment_line(shares: dict[str, float]) -> str:
    return (
        f"within the SLO: TTFT {shares['ttft']:.1%}, TPOT {shares['tpot']:.1%}, "
        f"both {shares['both']:.1%} of requests"
    )


def print_notes(report: Mapping[str, Any], console: Console) -> None:
    """What a reader of the report has to know."""
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
