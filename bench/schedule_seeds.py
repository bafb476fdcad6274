"""Whether other draws of arrivals say the same as the searches of `schedules.py`.

    python bench/schedule_seeds.py --traces DIR --near FILE.jsonl --cache FILE.jsonl
                                   [--processes 2] [--page docs/schedules.md]

`--near`: the cache of a full run of `schedules.py`, which is seed 1. Of each of its cells:
`uniform`, and the rivals' setting that was the best there by each rule, both searched anew with
seeds 2 and 3, from where seed 1 ended. So rivals keep the setting that seed 1 liked best;
`uniform` has but one. A step is 5 % of the ceiling, and less than half of one apart is the same.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from report import plain_table, show
from schedule_cases import Case, case_of
from schedule_goodput import RULES
from schedule_loads import cells_of, name_of
from schedule_search import SEED, SEEDS, Cache, is_of, search

Rates = Mapping[str, Mapping[str, float]]
"""The highest rate that was within the limits: by rule, and limit between tokens."""
SAME = 1.025
"""Half a step: those of a policy that heeds the limit are of another ceiling than the others'."""


def sides(near: Cache) -> Iterator[tuple[Case, str, Case]]:
    """Of each cell `uniform`, and by each rule the best rival."""
    for cell in cells_of(near):
        rivals = [
            entry
            for entry in near.found.values()
            if is_of(entry, cell.layout, cell.workload, cell.slo_s, cell.order)
            and entry["case"]["policy"] != "uniform"
        ]
        for rule in RULES:
            yield cell, rule, case_of(max(rivals, key=lambda e: e[rule][str(cell.slo_s)]))


def table(near: Cache, found: Mapping[tuple[str, int], Rates]) -> str:
    def rates(case: Case, rule: str, slo_s: float) -> list[float]:
        return [found[case.key, seed][rule][str(slo_s)] for seed in SEEDS]

    rows = []
    for cell, rule, rival in sides(near):
        ours, theirs = rates(cell, rule, cell.slo_s), rates(rival, rule, cell.slo_s)
        pairs = list(zip(ours, theirs, strict=True))
        ahead = sum(our > SAME * their for our, their in pairs)
        behind = sum(their > SAME * our for our, their in pairs)
        setting = ", ".join(str(value) for _, value in rival.knobs)
        rows.append([name_of(cell), rule, _listed(ours), f"`{rival.policy}` ({setting})",
                     _listed(theirs), f"{ahead}, {behind}"])  # fmt: skip
    header = ["cell", "rule", "`uniform`, by seed", "best rival of seed 1", "its rates",
              "seeds ahead, behind"]  # fmt: skip
    return plain_table(header, rows)


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:.2f}" for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--near", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="what was found, a line each")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    given = parser.parse_args()
    if not given.near.exists():
        parser.error(f"--near {given.near} is not there; make it by schedules.py")
    near = Cache(given.near)
    found: dict[tuple[str, int], Any] = {(key, SEED): e for key, e in near.found.items()}
    if given.cache.exists():
        for line in given.cache.read_text().splitlines():
            key, seed, rates = json.loads(line)
            found[key, seed] = rates
    cases = {case.key: case for cell, _, rival in sides(near) for case in (cell, rival)}
    todo = [each for each in product(SEEDS, cases) if (each[1], each[0]) not in found]
    with ProcessPoolExecutor(given.processes, max_tasks_per_child=1) as pool:
        futures = {
            pool.submit(
                search, cases[key], given.traces, quick=False, near=near.found[key], seed=seed
            ): (key, seed)
            for seed, key in todo
        }
        for number, future in enumerate(as_completed(futures)):
            key, seed = futures[future]
            found[key, seed] = {rule: future.result()[rule] for rule in RULES}
            with given.cache.open("a") as file:
                file.write(json.dumps([key, seed, found[key, seed]]) + "\n")
            print(f"{number + 1}/{len(todo)} seed {seed} {key}: {found[key, seed]}", flush=True)
    show(table(near, found), "seeds", given.page)


if __name__ == "__main__":
    main()
