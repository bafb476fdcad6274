"""Every schedule on the Falcon-180B job, each with its published setting and the best of a sweep,
under each order, beside the ceiling that none can pass. Makes the tables of docs/schedules.md.

    python bench/schedules.py --traces DIR --cache FILE.jsonl [--processes 2] [--quick] [--print]

`--traces`: a folder with the published traces; without it the built-in distributions are used,
which are fitted to them. Every search is kept in the cache, so that a run that was ended goes on;
`--print` makes the tables of what is there. A full run takes hours; most of it is settings that are
far from the best in short trials, too: sweep with `--quick` first, and go on with `--near`.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from report import plain_table, show
from schedule_cases import LAYOUTS, PUBLISHED, SLOS, TRACES, Case, case_of, cases, setup_of
from schedule_goodput import RULES, Tried, good_shares
from schedule_loads import at_equal_load, at_ninety, wrong_table
from schedule_search import Cache, ceiling_of, is_of, lengths_of, nearly_best, search_all

from pipeserve.core.order import ORDERS
from pipeserve.profiling.search.ceiling import Ceiling

HEADER = ["order", "policy", "setting", "capacity", "TTFT P50, P90, P99 at it", "TBT P99",
          "goodput", "TTFT P50, P90, P99 at it", "normalised latency P50, P90, P99",
          "good, by quarter"]  # fmt: skip


def best_tried(entry: dict[str, Any], rule: str, slo_s: float) -> Tried | None:
    """The trial at the highest rate within the limits; None where no rate was."""
    rate = entry[rule].get(str(slo_s), 0.0)
    return next((Tried.read(t) for t in entry["trials"] if t["trial"]["rate"] == rate), None)


def cell_table(cache: Cache, layout: str, workload: str, slo_s: float, top: Ceiling) -> str:
    rows = []
    entries = [e for e in cache.found.values() if is_of(e, layout, workload, slo_s)]
    for order, policy in product(ORDERS, ["uniform", *PUBLISHED]):
        mine = [e for e in entries if (e["case"]["order"], e["case"]["policy"]) == (order, policy)]
        for name, entry in _settings(mine, slo_s):
            rows.append([order, f"`{policy}`", *_row(name, entry, slo_s, top)])
    return plain_table(HEADER, rows)


def _settings(mine: Sequence[dict[str, Any]], slo_s: float) -> list[tuple[str, dict[str, Any]]]:
    """Of the searches of one policy, those that have a row: as published, and the best of all by
    each rule."""
    named: dict[str, tuple[list[str], dict[str, Any]]] = {}
    best = [max(mine, key=lambda e: e[rule][str(slo_s)]) for rule in RULES] if mine else []
    for name, entries in {
        "published": [entry for entry in mine if _is_published(entry, slo_s)],
        "best": [entry for entry in best if entry["case"]["policy"] != "uniform"],
        "one setting": [entry for entry in best if entry["case"]["policy"] == "uniform"],
    }.items():
        for entry in entries:
            names, _ = named.setdefault(case_of(entry).key, ([], entry))
            names += [] if name in names else [name]
    return [(" and ".join(names), entry) for names, entry in named.values()]


def _row(name: str, entry: dict[str, Any], slo_s: float, top: Ceiling) -> list[str]:
    knobs = ", ".join(f"{value}" for _, value in entry["case"]["knobs"])
    capacity, goodput = (best_tried(entry, rule, slo_s) for rule in RULES)
    row = [f"{name} ({knobs})", _rate(capacity, top), "", "", _rate(goodput, top), "", "", ""]
    if capacity is not None:
        row[2:4] = [_seconds(capacity.ttft_s), f"{capacity.trial.tbt_p99_s:.2f} s"]
    if goodput is not None:
        of_all, of_quarters = good_shares(goodput.met, slo_s)
        shares = f"{of_all:.0%}: {', '.join(f'{share:.0%}' for share in of_quarters)}"
        row[5:] = [_seconds(goodput.ttft_s), _seconds(goodput.normalised_s), shares]
    return row


def _rate(tried: Tried | None, top: Ceiling) -> str:
    if tried is None:
        return f"under {top.rate / 20:.2f}"
    return f"{tried.trial.rate:.2f} ({tried.trial.rate / top.rate:.2f})"


def _seconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values) + " s"


def _is_published(entry: dict[str, Any], slo_s: float) -> bool:
    case = entry["case"]
    settings = PUBLISHED.get(case["policy"], [])
    if case["policy"] == "sarathi_serve":
        settings = settings[:1] if slo_s == SLOS["strict"] else settings[1:]
    return dict(map(tuple, case["knobs"])) in settings


def tables(cache: Cache, layouts: Sequence[str], workloads: Sequence[str], traces: Any) -> str:
    parts = []
    for layout in layouts:
        for workload in workloads:
            case = Case(layout, workload, "sarathi_serve", (("max_num_batched_tokens", 512),))
            setup, lengths = setup_of(case), lengths_of(workload, traces)
            for slo, slo_s in SLOS.items():
                top = ceiling_of(setup, lengths, slo_s)
                even = ceiling_of(setup, lengths, slo_s, mixed=False)
                parts.append(
                    f"### {layout}, {workload}, {slo} ({slo_s:g} s)\n\nCeiling: {top.rate:.2f} "
                    f"requests/s, microbatches of {top.num_tokens} tokens and "
                    f"{top.microbatch_s * 1e3:.0f} ms (bound by: {top.bound}); with microbatches "
                    f"all of one size {even.rate / top.rate:.2f} of it ({even.num_tokens} tokens, "
                    f"{even.microbatch_s * 1e3:.0f} ms).\n\n"
                    + cell_table(cache, layout, workload, slo_s, top)
                )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="shorter trials")
    parser.add_argument(
        "--near", type=Path, help="cache of a run with --quick: only what was nearly the best there"
    )
    parser.add_argument("--print", action="store_true", help="only the tables of what is there")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--workloads", nargs="*", default=list(TRACES))
    parser.add_argument("--policies", nargs="*")
    parser.add_argument("--orders", nargs="*", default=["fcfs", "sjf"], choices=list(ORDERS))
    parser.add_argument("--loads", action="store_true", help="at equal loads, and wrong profiles")
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the tables are put")
    parser.add_argument("--place", default="cells", help="and the name of their place there")
    given = parser.parse_args()
    cache = Cache(given.cache)
    wanted = list(cases(given.layouts, given.workloads, given.orders))
    if given.policies:
        wanted = [case for case in wanted if case.policy in given.policies]
    how = {"traces": given.traces, "quick": given.quick}
    near = Cache(given.near) if given.near is not None else None
    if near is not None:
        wanted = nearly_best(wanted, near)
    if not (given.print or given.loads):
        search_all(wanted, cache, given.processes, near, **how)
    if given.loads:
        with ProcessPoolExecutor(given.processes) as pool:
            show(at_equal_load(cache, pool, how), "equal load", given.page)
            show(at_ninety(cache, pool, how), "stage-seconds", given.page)
            show(wrong_table(pool, how), "wrong profile", given.page)
    else:
        found = tables(cache, given.layouts, given.workloads, given.traces)
        show(found, given.place, given.page)


if __name__ == "__main__":
    main()
