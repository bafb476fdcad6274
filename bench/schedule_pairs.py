"""`uniform` beside the best rival on real CPU stages, mix by mix: alternating pairs of runs.

    python bench/schedule_pairs.py [--model smollm2-135m] [--stages 2] [--pairs 5]
                                   [--mixes reference,bursty] [--page docs/schedules.md]

Each mix is first run once under every rival and setting (`RIVALS`); the one with the most output
tokens/s is then run in turn with `uniform`, which has its defaults and no device profile. A ratio
is ours over theirs, the median of the pairs; beside it the least and the greatest. Of tokens/s more
is better, of times less. The bursty mix comes in groups, so that its tokens/s are about what comes,
and its times tell. Use an idle machine with a core for each stage.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from commands import LIMITS, result
from idle_by_cause import write_heavy
from report import plain_table, show

BURSTY = ["--workload", "sharegpt", "--scale", "8", "--num-prompts", "64", "--rate", "2",
          "--burst", "8"]  # fmt: skip
"""Eight at once, every 4 seconds in the mean."""
RIVALS = {"sarathi_serve": (128, 256, 512, 1024), "token_throttle": (512, 1024, 2048)}
"""Policy, and tokens a microbatch."""
FIGURES = {
    "output tokens/s": lambda run: run["output_tokens_per_s"],
    "TTFT P50": lambda run: run["ttft_s"]["p50"],
    "TTFT P99": lambda run: run["ttft_s"]["p99"],
    "TBT P99": lambda run: run["tbt_s"]["p99"],
}


def best_rival(folder: Path, flags: list[str]) -> list[str]:
    """Flags of the rival and setting with the most output tokens/s."""
    found = {}
    for policy, sizes in RIVALS.items():
        for size in sizes:
            which = ("--policy", policy, "--max-num-batched-tokens", f"{size}")
            run = result(folder / "bench.json", "bench", *flags, *LIMITS, *which)
            found[which] = run["output_tokens_per_s"]
            print(*which, f"{found[which]:.1f} output tokens/s", file=sys.stderr, flush=True)
    return list(max(found, key=found.__getitem__))


def pair(folder: Path, flags: list[str], rival: list[str], ours_first: bool) -> list[float]:
    """Each figure of `uniform` over the rival's."""
    sides = {"ours": ["--policy", "uniform"], "theirs": rival}
    runs = {
        name: result(folder / "bench.json", "bench", *flags, *LIMITS, *sides[name])
        for name in sorted(sides, reverse=not ours_first)
    }
    return [figure(runs["ours"]) / figure(runs["theirs"]) for figure in FIGURES.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mixes", default="reference,decode-heavy,prefill-heavy,bursty")
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixes = {**write_heavy(folder), "bursty": BURSTY}
        for mix in args.mixes.split(","):
            flags = [args.model, "-pp", args.stages, *mixes[mix]]
            rival = best_rival(folder, flags)
            pairs = [pair(folder, flags, rival, bool(n % 2)) for n in range(args.pairs)]
            rows.append([mix, f"`{rival[1]}` ({rival[3]})"])
            for ratios in zip(*pairs, strict=True):
                rows[-1].append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            print(*rows[-1], file=sys.stderr, flush=True)
    show(plain_table(["mix", "best rival", *FIGURES], rows), "pairs", args.page)


if __name__ == "__main__":
    main()
