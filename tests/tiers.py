"""Runs all tests in tiers, and says at the end what came of them and what took long.   ./test

`core`       without torch: a quarter of a minute of two cores.
`parallel`   the rest that runs no stages as processes.
`processes`  stages run as processes, which are many; those of one worker share its core.
`timing`     holds wall time against what was planted: what another process does can break it, so
             its tests run one at a time on all cores, and one that fails is tried again, which the
             summary says.

All but `timing` have two workers, each with a core of its own (conftest.py) and whole files to run.
The markers are in pyproject.toml; `./test tests/driver/test_join.py` runs one file, in one process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
"""In their own order: else files of few tests, which may be long, would come last."""
NOT_CORE = "--ignore=tests/core"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TIERS = {
    "core": (["tests/core", *WORKERS], {"PIPESERVE_TESTS_WITHOUT_TORCH": "1"}),
    "parallel": ([NOT_CORE, "-m", "not processes and not timing", *WORKERS], ONE_THREAD),
    "processes": ([NOT_CORE, "-m", "processes and not timing", *WORKERS], ONE_THREAD),
    "timing": ([NOT_CORE, "-m", "timing"], {}),
}
"""Of each: arguments of pytest, and what is added to the environment."""
NUM_LONGEST = 15


class Took(NamedTuple):
    """Seconds by the clock, and of CPU, those of child processes too once they have ended."""

    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.wall_s:8.1f} s  {self.cpu_s:6.1f} s CPU"


class Outcome(NamedTuple):
    """What came of a tier."""

    passed: bool
    counts: Counter[str]
    """How many tests came to what."""
    took: Took
    tests: dict[str, Took]
    """What is made for all tests of a file counts with the first of them, and what ends with it,
    such as stages, with the last."""


def run(arguments: list[str], more: dict[str, str]) -> Outcome:
    """One tier, in a process of its own."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder, "tally.json")
        environment = {**os.environ, **more, "PIPESERVE_TESTS_TALLY": str(tally)}
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        # Without one, it never came to its own summary.
        told = json.loads(tally.read_text()) if tally.exists() else {"outcomes": {}, "took": {}}
    tests = {test: Took(*took) for test, took in told["took"].items()}
    took = Took(time.monotonic() - start_s, sum(test.cpu_s for test in tests.values()))
    return Outcome(done.returncode == 0, Counter(told["outcomes"]), took, tests)


def main() -> int:
    outcomes: dict[str, Outcome] = {}
    for name, tier in TIERS.items():
        print(f"---- {name} ----", flush=True)
        outcomes[name] = run(*tier)
        print(f"{name}: {outcomes[name].took}\n", flush=True)
    tests = {test: took for outcome in outcomes.values() for test, took in outcome.tests.items()}
    print(f"---- the tiers, and the {NUM_LONGEST} longest of their tests ----")
    for name, outcome in outcomes.items():
        print(f"{outcome.took}  {name}")
    print()
    for test in sorted(tests, key=tests.__getitem__, reverse=True)[:NUM_LONGEST]:
        print(f"{tests[test]}  {test}")
    if failed := [name for name, outcome in outcomes.items() if not outcome.passed]:
        print(f"\nfailed: {', '.join(failed)}")
    counts = sum((outcome.counts for outcome in outcomes.values()), Counter())
    said = ", ".join(f"{number} {what}" for what, number in counts.items())
    seconds = sum(outcome.took.wall_s for outcome in outcomes.values())
    print(f"\n===== {said} in {seconds:.2f}s =====")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
