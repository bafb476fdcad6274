"""`--explain`: a line on stderr for each microbatch that says why it looks as it does.

`docs/explain.md` says what the words mean.
"""

import sys
from math import isfinite

from pipeserve.core.engine import Engine
from pipeserve.core.records import Planned, Record, Recorder


def explaining(engine: Engine) -> Recorder:
    """Prints a line for each plan of this engine that it is told."""

    def record(entry: Record) -> None:
        if isinstance(entry, Planned):
            print(explanation(engine, entry), file=sys.stderr)

    return record


def explanation(engine: Engine, planned: Planned) -> str:
    """Of the microbatch that the engine has just planned."""
    parts = [_composition(engine, planned)]
    if planned.predicted_s:
        parts[0] += f", predicted {_ms(max(planned.predicted_s))}"
    if engine.why is not None:
        bound, budget, due_s = engine.why
        shown = _ms(budget) if planned.predicted_s else f"{budget:g} tokens"
        parts.append(f"budget {shown} ({bound})")
        if planned.predicted_s:
            parts[-1] += f", through in {engine.last_known_s - planned.start_s:.2f} s"
        if isfinite(due_s):
            parts[-1] += f", due in {due_s - planned.start_s:.2f} s"
    return "; ".join(parts)


def _composition(engine: Engine, planned: Planned) -> str:
    num_decodes, num_prefill_tokens = engine.last.num_decodes, engine.last.num_prefill_tokens
    held = []
    if num_decodes:
        held.append(_counted(num_decodes, "decode"))
    if num_prefill_tokens:
        num_prompts = len(planned.chunks) - num_decodes
        held.append(
            f"{_counted(num_prefill_tokens, 'prefill token')} of {_counted(num_prompts, 'prompt')}"
        )
    return f"microbatch {planned.index}: {', '.join(held)}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
