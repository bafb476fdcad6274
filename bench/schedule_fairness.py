"""Who waits for whom: time to first token by length of prompt, of `uniform` and the best
`sarathi_serve` under each order, at one rate. Draws docs/schedules/fairness.svg.

    python bench/schedule_fairness.py --traces DIR --cache FILE.jsonl [--plot FILE.svg] [--quick]
                                      [--workloads sharegpt]

`--cache`: that of `schedules.py`; a panel for each of its cells. The rate is 0.9 of what the best
swept `sarathi_serve` has by capacity under fcfs. A line is the P90 of tenths of the requests,
shortest prompts first; the dotted one is what goodput allows (`schedule_goodput.py`). Both axes are
logarithmic.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from math import ceil, floor, log10
from pathlib import Path

from plain_svg import picture, text
from schedule_cases import SLOS, Case, case_of
from schedule_goodput import ttft_by_length, ttft_limit_s
from schedule_search import Cache, at_rate, is_of

PLOT = Path(__file__).parent.parent / "docs" / "schedules" / "fairness.svg"
ORDERS = ("fcfs", "sjf")
COLOURS = {"uniform": "#1b7837", "sarathi_serve": "#b2182b"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 260, 60, 40, 80

Line = tuple[str, str, Sequence[tuple[int, float]]]
"""Policy, order, and (tokens of a prompt, seconds) of each tenth."""


def of_cell(
    cache: Cache, layout: str, workload: str, traces: Path | None, quick: bool
) -> tuple[float, list[Line]]:
    """The rate, and the lines of the cell within the strict limit."""
    slo_s, lines, rate = SLOS["strict"], [], 0.0
    for order in ORDERS:
        for policy in ("sarathi_serve", "uniform"):
            case = _best(cache, Case(layout, workload, policy, (), slo_s, order))
            if not rate:
                rate = 0.9 * cache.found[case.key]["capacity"][str(slo_s)]
            groups = ttft_by_length(at_rate(case, traces, rate, quick).met)
            lines.append((policy, order, [(length, p90) for length, _, p90 in groups]))
    return rate, lines


def _best(cache: Cache, wanted: Case) -> Case:
    """Of the policy under the order, the setting with the highest capacity."""
    slo_s = str(wanted.slo_s)
    entries = [
        entry
        for entry in cache.found.values()
        if entry["case"]["policy"] == wanted.policy
        and is_of(entry, wanted.layout, wanted.workload, SLOS["strict"], wanted.order)
    ]
    if not entries:
        what = f"`{wanted.policy}` under {wanted.order} at {wanted.layout}, {wanted.workload}"
        raise SystemExit(f"error: the cache has no search of {what}; make it by schedules.py")
    return case_of(max(entries, key=lambda entry: entry["capacity"][slo_s]))


def svg(panels: Sequence[tuple[str, Sequence[Line]]]) -> str:
    parts = [_panel(place, *panel) for place, panel in enumerate(panels)]
    for place, (policy, order) in enumerate(product(COLOURS, ORDERS)):
        x, y = LEFT + place * 180, TOP + HEIGHT + 62
        parts.append(_stroke(f"M{x} {y - 4} h24", policy, order))
        parts.append(text(x + 30, y, f"{policy}, {order}"))
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 80
    return picture(width, height, parts)


def _panel(place: int, title: str, lines: Sequence[Line]) -> str:
    left = LEFT + place * (WIDTH + GAP)
    lengths = [length for _, _, points in lines for length, _ in points]
    limits = [(length, ttft_limit_s(length, SLOS["strict"])) for length in sorted(set(lengths))]
    seconds = [y for _, y in limits] + [y for _, _, points in lines for _, y in points]
    low_x, high_x = log10(min(lengths)), log10(max(lengths))
    low_y, high_y = floor(log10(min(seconds))), ceil(log10(max(seconds)))

    def at(length: float, y: float) -> str:
        across = (log10(length) - low_x) / (high_x - low_x)
        down = (high_y - log10(y)) / (high_y - low_y)
        return f"{left + WIDTH * across:.1f},{TOP + HEIGHT * down:.1f}"

    parts = [text(left, TOP - 16, title)]
    for power in range(low_y, high_y + 1):
        y = float(at(10**low_x, 10**power).split(",")[1])
        parts.append(f'<path d="M{left} {y} h{WIDTH}" stroke="#ddd"/>')
        parts.append(text(left - 6, y + 4, f"{10**power:g} s", "end"))
    for length in (min(lengths), sorted(lengths)[len(lengths) // 2], max(lengths)):
        x = float(at(length, 1).split(",")[0])
        parts.append(text(x, TOP + HEIGHT + 18, f"{length:,}", "middle"))
    parts.append(text(left + WIDTH / 2, TOP + HEIGHT + 36, "tokens of the prompt", "middle"))
    drawn = " L".join(at(*point) for point in limits)
    parts.append(f'<path d="M{drawn}" stroke="#888" stroke-dasharray="2 4"/>')
    for policy, order, points in lines:
        parts.append(_stroke("M" + " L".join(at(*point) for point in points), policy, order))
    return "\n".join(parts)


def _stroke(path: str, policy: str, order: str) -> str:
    dashes = "" if order == "fcfs" else ' stroke-dasharray="8 4"'
    return f'<path d="{path}" stroke="{COLOURS[policy]}" stroke-width="2"{dashes}/>'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="shorter trials")
    parser.add_argument("--workloads", nargs="*", default=["sharegpt"])
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    cache, panels = Cache(given.cache), []
    cases = map(case_of, cache.found.values())
    cells = dict.fromkeys((each.layout, each.workload) for each in cases)
    for layout, workload in [cell for cell in cells if cell[1] in given.workloads]:
        rate, lines = of_cell(cache, layout, workload, given.traces, given.quick)
        panels.append((f"{layout}, {workload}, {rate:.2f} requests/s: P90 of TTFT", lines))
    if not panels:
        parser.error(
            f"{given.cache} has no {' or '.join(given.workloads)}; make it by schedules.py"
        )
    given.plot.write_text(svg(panels))


if __name__ == "__main__":
    main()
