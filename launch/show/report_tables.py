"""What `pipeserve report` prints: one run, or two beside each other."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeserve.launch.show.tables import run_table

_SPELT_OUT = 5  # stages, in 80 columns
_LEAST = 5e-4
"""Share of the time under which a cause is not printed."""
_OF_BUSY = {
    "of it again": "again",
    "of it all-reduce": "all_reduce",
    "of it a rank waits": "rank_wait",
}
"""Row -> part of the busy share."""
_CAPTION = "idle is not always loss: --advise tries out what a change would give"


def print_run(found: dict[str, Any], console: Console) -> None:
    """The run, its stages, the causes, the microbatches that were waited for most, notes."""
    if "seconds" in found:
        console.print(run_table({**found, "workload": found["title"]}))
    else:
        console.print(f"{found['title']}: no request got a token")
    if found["stages"]:
        console.print(_stage_table(found["stages"], [entry["cause"] for entry in found["causes"]]))
        console.print(_cause_table(found["causes"]))
        console.print(_worst_table(found["worst_microbatches"]))
    for note in found["notes"]:
        console.print(f"note: {note}", highlight=False)


def _stage_table(stages: Sequence[dict[str, Any]], causes: Sequence[str]) -> Table:
    """A column for each stage, so that many causes fit; narrow ones where there are many."""
    is_wide = len(stages) > _SPELT_OUT
    unit, digits = (" in percent", ".1f") if is_wide else ("", ".1%")
    scale = 100 if is_wide else 1

    def cells(shares: Sequence[float], least: float = 0.0) -> list[str]:
        return [f"{scale * share:{digits}}" if share >= least else "" for share in shares]

    table = Table(title=f"stages, shares of the time{unit}")
    table.add_column("stage\nlayers" if is_wide else "", no_wrap=True)
    for number, stage in enumerate(stages):
        parts = [str(number) if is_wide else f"stage {number}"]
        if "layers" in stage:
            parts.append(str(stage["layers"]) + ("" if is_wide else " layers"))
        table.add_column("\n".join(parts), justify="right")
    busy = [stage["busy"] for stage in stages]
    table.add_row("busy", *[f"[bold]{cell}[/]" for cell in cells(busy)])
    for name, key in _OF_BUSY.items():
        if any(stage[key] for stage in stages):
            table.add_row(name, *cells([stage[key] for stage in stages]))
    table.add_row("idle", *cells([1 - share for share in busy]), end_section=True)
    for cause in causes:
        shares = [stage["idle_by_cause"].get(cause, 0.0) for stage in stages]
        if max(shares) >= _LEAST:
            table.add_row(cause, *cells(shares, _LEAST))
    return table


def _cause_table(causes: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="what the stages stood idle for", caption=_CAPTION)
    table.add_column("cause", no_wrap=True)
    for name in ("share", "without it, at most"):
        table.add_column(name, justify="right")
    table.add_column("what it is")
    for entry in causes:
        if entry["most"] < _LEAST:
            continue
        gain, tokens = entry["gain_at_most"], entry["tokens_per_s_at_most"]
        text = "" if gain is None else f"+{gain:.1%}"
        if tokens is not None:
            text = f"{tokens:,.1f} tokens/s {text:>7}"
        table.add_row(entry["cause"], f"{entry['share']:.1%}", text, entry["what"])
    return table


def _worst_table(worst: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="microbatches that stages stood idle longest before")
    for name in ("microbatch", "at", "idle, all stages", "requests", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("mostly for")
    for entry in worst:
        at = "" if entry["at_s"] is None else f"{entry['at_s']:,.3f} s"
        table.add_row(
            f"{entry['index']:,}",
            at,
            _milliseconds(entry["idle_s"]),
            f"{entry['requests']:,}",
            f"{entry['tokens']:,}",
            f"{entry['cause']} ({_milliseconds(entry['cause_s'])})",
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def print_comparison(found: dict[str, Any], console: Console) -> None:
    """The runs beside each other, then what moved, most first."""
    first, second = found["a"], found["b"]
    console.print(_figures_table(first, second))
    table = Table(
        title="where the time of a stage went",
        caption="the mean of all stages; differences of shares in points",
    )
    table.add_column("")
    for name in ("A", "B", "B - A", "ms/microbatch A", "B - A", "ms/token A", "B - A"):
        table.add_column(name, justify="right")
    moved = sorted(found["changes"], key=lambda change: -abs(change["share_points"]))
    for change in sorted(moved, key=lambda change: change["name"] != "busy"):
        a, b = change["a"], change["b"]
        if max(a["share"], b["share"]) < _LEAST:
            continue
        table.add_row(
            change["name"],
            f"{a['share']:.1%}",
            f"{b['share']:.1%}",
            f"{change['share_points']:+.1f}",
            *_per(change, "ms_per_microbatch"),
            *_per(change, "ms_per_token"),
            end_section=change["name"] == "busy",
        )
    console.print(table)
    for name, run in (("A", first), ("B", second)):
        for note in run["notes"]:
            console.print(f"note on {name}: {note}", highlight=False)


def _per(change: dict[str, Any], key: str) -> tuple[str, str]:
    """The first run's, and the difference to it."""
    difference, before = change[key], change["a"][key]
    return (
        "" if before is None else f"{before:,.3f}",
        "" if difference is None else f"{difference:+,.3f}",
    )


def _figures_table(first: dict[str, Any], second: dict[str, Any]) -> Table:
    table = Table(title=f"A: {first['run']}    B: {second['run']}")
    table.add_column("")
    for name in ("A", "B", "B to A"):
        table.add_column(name, justify="right")
    table.add_row("what", first["title"], second["title"])
    table.add_row("policy", str(first["policy"]), str(second["policy"]))
    keys = [("requests", None, 1, ""), ("seconds", None, 1, " s"), ("microbatches", None, 1, "")]
    keys += [(f"{kind}_tokens_per_s", None, 1, "") for kind in ("total", "output")]
    keys += [(name, "p99", 1000, " ms") for name in ("ttft_s", "tbt_s")]
    for key, part, scale, unit in keys:
        a, b = (_number(each.get(key), part) for each in (first, second))
        texts = ["" if value is None else f"{value * scale:,.6g}{unit}" for value in (a, b)]
        name = f"{key.removesuffix('_s').upper()} {part}" if part else key.replace("_", " ")
        change = f"{b / a - 1:+.1%}" if a and b is not None else ""
        table.add_row(name, *texts, change)
    return table


def _number(value: Any, part: str | None) -> float | None:
    return value[part] if part and value is not None else value
