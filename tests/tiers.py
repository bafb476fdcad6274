"""Runs all tests in tiers, and says at the end what came of them.   ./test

`core`       without torch: half a minute of one core.
`parallel`   the rest that takes one core, a file to each of two workers.
`processes`  stages run as processes, which want both cores: one test at a time.
`timing`     holds wall time against what was planted: what another process does can break it, so
             a test that fails is tried again, and the summary says so.

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

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ["-n", "2", "--dist", "loadfile"]
ONE_CORE = {"OMP_NUM_THREADS": "1"}
NO_SPINNING = {"OMP_WAIT_POLICY": "passive"}
"""Torch's threads give their core to other stages while they wait for work."""
TIERS = {
    "core": (["tests/core", *WORKERS], {"PIPESERVE_TESTS_WITHOUT_TORCH": "1"}),
    "parallel": (
        ["--ignore=tests/core", "-m", "not processes and not timing", *WORKERS],
        ONE_CORE,
    ),
    "processes": (["--ignore=tests/core", "-m", "processes and not timing"], NO_SPINNING),
    "timing": (["--ignore=tests/core", "-m", "timing"], {}),
}
"""Of each: arguments of pytest, and what is added to the environment."""
NUM_SLOWEST = 20


def run(arguments: list[str], more: dict[str, str]) -> tuple[bool, Counter[str], dict[str, float]]:
    """Whether all passed, how many came to what, and the seconds that each test took."""
    with tempfile.TemporaryDirectory() as folder:
        tally = Path(folder, "tally.json")
        environment = {**os.environ, **more, "PIPESERVE_TESTS_TALLY": str(tally)}
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if not tally.exists():  # it never came to its own summary
            return False, Counter(), {}
        told = json.loads(tally.read_text())
    return done.returncode == 0, Counter(told["outcomes"]), told["seconds"]


def main() -> int:
    start_s = time.monotonic()
    failed, outcomes, seconds = [], Counter(), {}
    for name, tier in TIERS.items():
        print(f"---- {name} ----", flush=True)
        tier_start_s = time.monotonic()
        passed, tier_outcomes, tier_seconds = run(*tier)
        print(f"{name} took {time.monotonic() - tier_start_s:.0f} s\n", flush=True)
        failed += [] if passed else [name]
        outcomes += tier_outcomes
        seconds |= tier_seconds
    print(f"---- the {NUM_SLOWEST} longest ----")
    for test in sorted(seconds, key=seconds.__getitem__, reverse=True)[:NUM_SLOWEST]:
        print(f"{seconds[test]:7.2f} s  {test}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    print(f"\n===== {counts} in {time.monotonic() - start_s:.2f}s =====")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
