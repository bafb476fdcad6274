"""What a reproduction reports: a paper's figure, ours, their ratio, in a Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure of a paper, and what our simulator gives for it."""

    what: str
    paper: float
    ours: float
    unit: str = ""
    within: float = 0.2
    """The target: how far the ratio may be from 1."""

    @property
    def ratio(self) -> float:
        return self.ours / self.paper

    @property
    def met(self) -> bool:
        return abs(self.ratio - 1) <= self.within


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: what, paper, ours, ratio, and whether it is within the target."""
    lines = ["| what | paper | ours | ratio | within |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = f"{row.within:.0%}: {'yes' if row.met else '**no**'}"
        figures = (f"{value:.3g}{row.unit}" for value in (row.paper, row.ours))
        lines.append(f"| {row.what} | {' | '.join(figures)} | {row.ratio:.2f} | {verdict} |")
    return "\n".join(lines)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of what has no target."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
