"""Every schedule on the Falcon-180B job, each with its published setting and the best of a sweep,
beside the ceiling that none can pass. Makes the tables of docs/schedules.md.

    python bench/schedules.py --traces DIR --cache FILE.jsonl [--processes 2] [--quick] [--print]

`--traces`: a folder with the published traces; without it the built-in distributions are used,
which are fitted to them. Every search is kept in the cache, so that a run that was ended goes on;
`--print` makes the tables of what is there.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from report import plain_table, show
from schedule_cases import LAYOUTS, PUBLISHED, SLOS, TRACES, Case, ablation_cases, cases, setup_of
from schedule_loads import at_equal_load, at_ninety, wrong_table
from schedule_search import Cache, ceiling_of, is_of, lengths_of, search_all

from pipeserve.profiling.search.ceiling import Ceiling


def best_trial(entry: dict[str, Any], slo_s: float) -> dict[str, Any] | None:
    rate = entry["capacity"].get(str(slo_s), 0.0)
    return next((t for t in entry["trials"] if t["rate"] == rate and rate), None)


def cell_table(cache: Cache, layout: str, workload: str, slo_s: float, top: Ceiling) -> str:
    rows = []
    entries = [e for e in cache.found.values() if is_of(e, layout, workload, slo_s)]
    for policy in ["uniform", *PUBLISHED]:
        mine = [e for e in entries if e["case"]["policy"] == policy]
        if not mine:
            continue
        published = [e for e in mine if _is_published(e, slo_s)]
        best = max(mine, key=lambda e: e["capacity"].get(str(slo_s), 0.0))
        for name, entry in [("published", e) for e in published] + [("best swept", best)]:
            if policy == "uniform":
                name = "one setting"
                if entry is not best:
                    continue
            rows.append(_row(policy, name, entry, slo_s, top))
    return plain_table(
        ["policy", "setting", "requests/s", "of the ceiling", "TTFT P50", "TBT P99"], rows
    )


def _row(policy: str, name: str, entry: dict[str, Any], slo_s: float, top: Ceiling) -> list[str]:
    trial, rate = best_trial(entry, slo_s), entry["capacity"].get(str(slo_s), 0.0)
    knobs = ", ".join(f"{value}" for _, value in entry["case"]["knobs"])
    return [
        f"`{policy}`",
        f"{name} ({knobs})",
        f"{rate:.2f}" if rate else f"under {top.rate / 20:.2f}",
        f"{rate / top.rate:.2f}",
        f"{trial['ttft_p50_s']:.2f} s" if trial else "",
        f"{trial['tbt_p99_s']:.2f} s" if trial else "",
    ]


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


def ablation_table(cache: Cache, traces: Path | None) -> str:
    rows = []
    slo_s = SLOS["strict"]
    for case in ablation_cases():
        entry = cache.found.get(case.key)
        if entry is None:
            continue
        top = ceiling_of(setup_of(case), lengths_of(case.workload, traces), slo_s)
        rows.append([f"{case.policy}", *_row("", "", entry, slo_s, top)[1:]])
    return plain_table(
        ["part", "tokens", "requests/s", "of the ceiling", "TTFT P50", "TBT P99"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="shorter trials")
    parser.add_argument("--print", action="store_true", help="only the tables of what is there")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--workloads", nargs="*", default=list(TRACES))
    parser.add_argument("--policies", nargs="*")
    parser.add_argument("--ablation", action="store_true", help="what each part brings")
    parser.add_argument("--loads", action="store_true", help="at equal loads, and wrong profiles")
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the tables are put")
    given = parser.parse_args()
    cache = Cache(given.cache)
    wanted = list(ablation_cases() if given.ablation else cases(given.layouts, given.workloads))
    if given.policies:
        wanted = [case for case in wanted if case.policy in given.policies]
    how = {"traces": given.traces, "quick": given.quick}
    if not (given.print or given.loads):
        search_all(wanted, cache, given.processes, **how)
    if given.loads:
        with ProcessPoolExecutor(given.processes) as pool:
            show(at_equal_load(cache, pool, how), "equal load", given.page)
            show(at_ninety(cache, pool, how), "stage-seconds", given.page)
            show(wrong_table(pool, how), "wrong profile", given.page)
    elif given.ablation:
        show(ablation_table(cache, given.traces), "parts", given.page)
    else:
        name = "cells" if given.workloads == list(TRACES) else "unseen"
        show(tables(cache, given.layouts, given.workloads, given.traces), name, given.page)


if __name__ == "__main__":
    main()
