"""What `versus.py` finds of its sides: medians, their ratios, and the spread of the rounds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from report import plain_table


class Figure(NamedTuple):
    """One column of what is found."""

    title: str
    keys: Sequence[str]
    """Where a report has it."""
    format: str

    def of(self, report: Mapping[str, Any]) -> float:
        value: Any = report
        for key in self.keys:
            value = value[key]
        return value


FIGURES = (
    Figure("total tokens/s", ("total_tokens_per_s",), ",.0f"),
    Figure("output tokens/s", ("output_tokens_per_s",), ",.1f"),
    Figure("TTFT P50, s", ("ttft_s", "p50"), ".2f"),
    Figure("TTFT P99, s", ("ttft_s", "p99"), ".2f"),
    Figure("TBT P50, s", ("tbt_s", "p50"), ".3f"),
    Figure("TBT P99, s", ("tbt_s", "p99"), ".3f"),
)
RATE = FIGURES[0]


class Ratio(NamedTuple):
    of_medians: float
    least: float
    greatest: float
    """Of the rounds."""


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, Ratio]:
    """By title, of what was measured in the same rounds."""
    found = {}
    for figure in FIGURES:
        our_values, their_values = map(figure.of, ours), map(figure.of, theirs)
        pairs = list(zip(our_values, their_values, strict=True))
        rounds = [our / their for our, their in pairs]
        our_median, their_median = map(statistics.median, zip(*pairs, strict=True))
        found[figure.title] = Ratio(our_median / their_median, min(rounds), max(rounds))
    return found


def comparison(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What `--json` has of a workload: `reports` are each side's, round by round, ours first."""
    ours, *peers = reports
    medians = {
        name: {figure.title: statistics.median(map(figure.of, rounds)) for figure in FIGURES}
        for name, rounds in reports.items()
    }
    best = max(peers, key=lambda name: medians[name][RATE.title])
    return {
        "medians": medians,
        "best_peer": best,
        "ratios": {
            name: {
                title: ratio._asdict()
                for title, ratio in ratios(reports[ours], reports[name]).items()
            }
            for name in peers
        },
        "rounds": reports,
    }


def table(found: Mapping[str, Any]) -> str:
    """Medians of each side, then ratios to each peer."""
    rows = [
        [name, *(format(medians[figure.title], figure.format) for figure in FIGURES)]
        for name, medians in found["medians"].items()
    ]
    for name, by_title in found["ratios"].items():
        cells = [
            f"{ratio['of_medians']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"
            for ratio in by_title.values()
        ]
        note = ", its best" if name == found["best_peer"] and len(found["ratios"]) > 1 else ""
        rows.append([f"ours / {name}{note}", *cells])
    return plain_table(["medians", *(figure.title for figure in FIGURES)], rows)
