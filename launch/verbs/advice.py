"""`pipeserve report --advise` in the terminal and in `--json`: what to change of a recorded run."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeserve.profiling.advice.advice import Advice, Prediction
from pipeserve.profiling.advice.replay import Figures

_LEAST_WORTH = 0.005
"""Share of tokens/s, or of P99 TBT, under which a wish is not shown."""
_AT_MOST = {"replica": "replica, an upper bound"}
"""Kind -> how it is shown. Two devices that take turns at half the time each would need even loads
and KV that both can read."""


def print_advice(advice: Advice, console: Console) -> None:
    """How far to trust it, what to change, and what the rest is worth."""
    console.print(_trust_table(advice))
    if advice.suggestions:
        table = _table("what to change, one thing at a time", "change, and how")
        for prediction in advice.suggestions:
            change = f"{prediction.change.what}\n[cyan]{prediction.change.how}[/]"
            table.add_row(*_cells(prediction), change)
        console.print(table)
        console.print(_caution(advice))
    else:
        console.print(
            f"none of the {len(advice.tried)} changes tried gives 1 % more tokens/s, or a P99 TBT "
            "5 % shorter at as many"
        )
    worths = [prediction for prediction in advice.worths if _is_seen(prediction)]
    if worths:
        table = _table("what it is worth: no flag changes these", "cause, and what if it were gone")
        for prediction in worths:
            kind = prediction.change.kind
            change = f"{_AT_MOST.get(kind, kind)}\n[dim]{prediction.change.what}[/]"
            table.add_row(*_cells(prediction), change)
        console.print(table)
    for note in advice.notes:
        console.print(f"note: {note}")


def advice_report(advice: Advice) -> dict[str, Any]:
    """What `--json` has under "advice" (docs/timeline.md). Rates per second, times in seconds,
    gains and errors as shares."""
    return {
        "recorded": _figures(advice.recorded),
        "replayed": _figures(advice.replayed),
        "error": {
            "output_tokens_per_s": advice.tokens_error,
            "tbt_p99_s": advice.tbt_error,
            "idle": list(advice.idle_errors),
        },
        "spread": advice.spread,
        "suggestions": _predictions(advice.suggestions),
        "worths": _predictions(advice.worths),
        "notes": list(advice.notes),
    }


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        "output_tokens_per_s": figures.output_tokens_per_s,
        "tbt_p99_s": figures.tbt_p99_s,
        "idle": list(figures.idle),
    }


def _predictions(predictions: Iterable[Prediction]) -> list[dict[str, Any]]:
    return [
        {
            "kind": prediction.change.kind,
            "what": prediction.change.what,
            "how": prediction.change.how,
            "tokens_gain": prediction.tokens_gain,
            "tbt_gain": prediction.tbt_gain,
            "output_tokens_per_s": prediction.output_tokens_per_s,
            "tbt_p99_s": prediction.tbt_p99_s,
        }
        for prediction in predictions
    ]


def _trust_table(advice: Advice) -> Table:
    table = Table(title="the run, and the simulator's replay of it")
    table.add_column("")
    for name in ("recorded", "replayed", "off by"):
        table.add_column(name, justify="right")
    recorded, replayed = advice.recorded, advice.replayed
    table.add_row(
        "output tokens/s",
        f"{recorded.output_tokens_per_s:,.1f}",
        f"{replayed.output_tokens_per_s:,.1f}",
        f"{advice.tokens_error:+.1%}",
    )
    if advice.tbt_error is not None:
        table.add_row(
            "P99 TBT",
            _milliseconds(recorded.tbt_p99_s),
            _milliseconds(replayed.tbt_p99_s),
            f"{advice.tbt_error:+.1%}",
        )
    idle = zip(recorded.idle, replayed.idle, advice.idle_errors, strict=True)
    for stage, (was, became, error) in enumerate(idle):
        points = f"{100 * error:+.1f} points"
        table.add_row(f"idle, stage {stage}", f"{was:.1%}", f"{became:.1%}", points)
    return table


def _table(title: str, what: str) -> Table:
    table = Table(title=title, show_lines=True)
    for name in ("tokens/s", "P99 TBT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(what)
    return table


def _cells(prediction: Prediction) -> tuple[str, str]:
    """Gain and value each."""
    tokens = f"{prediction.output_tokens_per_s:,.1f} {_gain(prediction.tokens_gain, 1)}"
    if prediction.tbt_gain is None:
        return tokens, ""
    tbt = f"{_milliseconds(prediction.tbt_p99_s)} {_gain(prediction.tbt_gain, -1)}"
    return tokens, tbt


def _gain(gain: float, good: int) -> str:
    """Green for better, red for worse, by more than a point."""
    text = f"{gain:+7.1%}"
    if abs(gain) < 0.01:
        return text
    return f"[{'green' if gain * good > 0 else 'red'}]{text}[/]"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:,.1f} ms"


def _caution(advice: Advice) -> str:
    """What the errors above mean for the table."""
    error = max(abs(advice.tokens_error), advice.spread)
    return (
        f"gains are between replays; the replay itself is {advice.tokens_error:+.1%} off, and "
        f"{advice.spread:.1%} apart from draw to draw: under {100 * error:.1f} points, a gain may "
        "be none"
    )


def _is_seen(prediction: Prediction) -> bool:
    return max(abs(prediction.tokens_gain), abs(prediction.tbt_gain or 0.0)) >= _LEAST_WORTH
