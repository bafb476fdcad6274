"""`uniform` beside the best rival on real CPU stages, mix by mix: alternating pairs of runs, and
what stages stood idle for in the last pair.

    python bench/schedule_pairs.py [--model smollm2-135m] [--stages 2] [--pairs 5]
                                   [--mixes reference,bursty] [--rival sarathi_serve=256]
                                   [--page docs/schedules.md]

Each mix is first run once under every rival and setting (`RIVALS`); the one with the most output
tokens/s is then run in turn with `uniform`, which has its defaults and no device profile. A ratio
is ours over theirs, the median of the pairs; beside it the least and the greatest. Of tokens/s more
is better, of times less. The bursty mix comes in groups, so that its tokens/s are about what comes,
and its times tell. Use an idle machine with a core for each stage: what others take is `jitter`,
and truly so.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from commands import LIMITS, result, some_of
from report import plain_table, show

SHAREGPT = ["--workload", "sharegpt", "--scale", "8", "--num-prompts", "64"]
HEAVY = {
    "decode-heavy": {"num_prompts": 48, "prompt": (16, 64), "output": (48, 128)},
    "prefill-heavy": {"num_prompts": 40, "prompt": (400, 1200), "output": (2, 10)},
}
"""Drawn evenly between the two."""
BURSTY = [*SHAREGPT, "--rate", "2", "--burst", "8"]
"""Eight at once, every 4 seconds in the mean."""
RIVALS = {"sarathi_serve": (128, 256, 512, 1024), "token_throttle": (512, 1024, 2048)}
"""Policy, and tokens a microbatch."""
FIGURES = {
    "output tokens/s": lambda run: run["output_tokens_per_s"],
    "TTFT P50": lambda run: run["ttft_s"]["p50"],
    "TTFT P99": lambda run: run["ttft_s"]["p99"],
    "TBT P99": lambda run: run["tbt_s"]["p99"],
}
LEAST = 0.0005
"""Of the wall time, mean over stages: causes below are not shown."""


MIXES = ("reference", *HEAVY, "bursty")


def mixes_in(folder: Path) -> dict[str, list[str]]:
    """Flags of each mix."""
    mixes = {"reference": SHAREGPT}
    for name, mix in HEAVY.items():
        rng, path = Random(name), folder / f"{name}.jsonl"
        with path.open("w") as file:
            for _ in range(mix["num_prompts"]):
                ids = [rng.randrange(100, 40_000) for _ in range(rng.randint(*mix["prompt"]))]
                request = {"prompt_token_ids": ids, "max_tokens": rng.randint(*mix["output"])}
                file.write(json.dumps(request) + "\n")
        mixes[name] = ["--workload", str(path)]
    return {**mixes, "bursty": BURSTY}


def best_rival(
    folder: Path, flags: Sequence[str], rivals: Mapping[str, Sequence[int]]
) -> list[str]:
    """Flags of the rival and setting with the most output tokens/s."""
    found = {}
    for policy, sizes in rivals.items():
        for size in sizes:
            which = ("--policy", policy, "--max-num-batched-tokens", f"{size}")
            run = result(folder / "bench.json", "bench", *flags, *LIMITS, *which)
            found[which] = run["output_tokens_per_s"]
            print(*which, f"{found[which]:.1f} output tokens/s", file=sys.stderr, flush=True)
    return list(max(found, key=found.__getitem__))


def pair(folder: Path, sides: dict[str, list[str]], ours_first: bool) -> dict[str, Any]:
    """What `bench` says of each side. Its recording is in the folder of the side's name."""
    runs = {}
    for side in sorted(sides, reverse=not ours_first):
        shutil.rmtree(folder / side, ignore_errors=True)
        record = ["--record", str(folder / side)]
        runs[side] = result(folder / "bench.json", "bench", *sides[side], *record)
    return runs


def idle_row(mix: str, policy: str, bench: dict[str, Any], report: dict[str, Any]) -> list[str]:
    causes = [each for each in report["causes"] if each["share"] >= LEAST]
    return [
        mix,
        f"`{policy}`",
        f"{bench['output_tokens_per_s']:.1f}",
        f"{bench['ttft_s']['p50']:.2f} s",
        f"{bench['tbt_s']['p99'] * 1e3:.0f} ms",
        " / ".join(f"{1 - stage['busy']:.1%}" for stage in report["stages"]),
        ", ".join(f"{each['cause']} {each['share']:.1%}" for each in causes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mixes", type=some_of(MIXES), default=[*MIXES])
    parser.add_argument(
        "--rival", help="POLICY=TOKENS: the best of an earlier sweep; none is made then"
    )
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the tables are put")
    args = parser.parse_args()
    rivals: Mapping[str, Sequence[int]] = RIVALS
    if args.rival:
        policy, _, size = args.rival.partition("=")
        if not size.isdigit():
            parser.error(f"--rival {args.rival}: give POLICY=TOKENS")
        rivals = {policy: (int(size),)}
    rows, idle = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixes = mixes_in(folder)
        for mix in args.mixes:
            flags = [args.model, "-pp", args.stages, *mixes[mix], *LIMITS]
            rival = best_rival(folder, flags, rivals)
            sides = {"ours": [*flags, "--policy", "uniform"], "theirs": [*flags, *rival]}
            pairs = [pair(folder, sides, bool(n % 2)) for n in range(args.pairs)]
            rows.append([mix, f"`{rival[1]}` ({rival[3]})"])
            for figure in FIGURES.values():
                ratios = [figure(runs["ours"]) / figure(runs["theirs"]) for runs in pairs]
                rows[-1].append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            print(*rows[-1], file=sys.stderr, flush=True)
            for side, policy in {"theirs": rival[1], "ours": "uniform"}.items():
                report = result(folder / "report.json", "report", str(folder / side))
                idle.append(idle_row(mix, policy, pairs[-1][side], report))
                print(*idle[-1], file=sys.stderr, flush=True)
    show(plain_table(["mix", "best rival", *FIGURES], rows), "pairs", args.page)
    header = ["mix", "policy", "output tokens/s", "TTFT P50", "TBT P99", "idle of each stage",
              "by cause, mean of the stages"]  # fmt: skip
    show(plain_table(header, idle), "idle by cause", args.page)


if __name__ == "__main__":
    main()
