"""Markdown tables of what benches find, and their places in the pages of docs/."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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


def show(text: str, name: str, page: Path | None) -> None:
    """Prints it or, where a page is given, puts it there in place of what an earlier run said:
    between the comments `begin NAME` and `end NAME`."""
    if page is None:
        print(text)
        return
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{page} has no place for {name}"
    page.write_text(f"{before}{begin}{text}\n{end}{after}")
