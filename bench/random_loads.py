"""Every policy under random loads of the kinds that people send, from any seed on.

    python bench/random_loads.py [--first 0] [--loads 10000] [--policy uniform]

A load follows from its seed alone; `tests/support/loads.py` says what is in it, `load_runs.py`
beside it what is checked. What fails is named in one line with its seed, and how to run it alone;
the script goes on, and exits with 1 at the end. `--verbose` prints the load and the traceback.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from load_runs import run
from loads import make_load, policy_of

from pipeserve.core.policies import POLICIES


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--loads", type=int, default=10_000)
    parser.add_argument("--policy", choices=list(POLICIES), help="its loads alone")
    parser.add_argument("--verbose", action="store_true", help="print each load, and tracebacks")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.loads)
    started, tried, failed = time.process_time(), Counter(), 0
    for seed in seeds:
        if args.policy not in (None, policy_of(seed)):
            continue
        load = make_load(seed)
        tried[load.policy] += 1
        if args.verbose:
            print(load)
        try:
            run(load)
        except Exception as error:
            failed += 1
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(
                f"seed {seed} ({load.policy}): {what}; alone: "
                f"python bench/random_loads.py --first {seed} --loads 1 --verbose",
                flush=True,
            )
            if args.verbose:
                traceback.print_exc()
    by_policy = ", ".join(f"{name} {count}" for name, count in tried.items())
    seconds = time.process_time() - started
    print(
        f"{sum(tried.values())} loads ({by_policy}): {failed} failed; {seconds:.0f} s of CPU time"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
