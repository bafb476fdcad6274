"""Whether `--pipeline-layers auto` finds the best split where a neighbour takes part of a core.

    python bench/layers.py [MODEL] [--rounds 3] [--num-prompts 48] [--slow 1]
    python bench/layers.py --emulated

A process that only computes shares the core of stage --slow; auto is asked where the layers go.
Then that split and its neighbours, two layers either way, are benched in turn, a few rounds of
each, and compared by the median of their seconds. The target: auto is within one layer of the best.

With --emulated, stages wait as an A100 would take, one of them 1.5 times as long: the same on a
machine that is busy with other things.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import LIMITS, result

from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.stages.checkpoint.sources import cache_root

NEIGHBOURS = (-2, -1, 0, 1, 2)
SPIN = "while True: pass"
EMULATED = ["llama2-7b", "--device-profile", "a100-80gb-dgx", "--device", "emulated"]


@contextmanager
def busy_neighbour(core: int) -> Iterator[None]:
    """On that core, as hungry as a stage."""
    command = ["taskset", "-c", str(core), sys.executable, "-c", SPIN]
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def nothing_kept() -> Iterator[None]:
    """What was timed beside the neighbour would lead astray whoever runs this model next."""
    kept = cache_root() / "layer-times.json"
    before = kept.read_bytes() if kept.exists() else None
    try:
        yield
    finally:
        kept.unlink(missing_ok=True)
        if before is not None:
            kept.write_bytes(before)


def split_by_auto(flags: list[str]) -> list[int]:
    """What one short run says of its plan."""
    command = [sys.executable, "-m", "pipeserve.launch.cli", "bench", *flags]
    command += ["--num-prompts", "2", "--scale", "64", "--pipeline-layers", "auto"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return list(map(int, re.search(r"stages of ([\d+]+) layers", done.stderr)[1].split("+")))


def compare(flags: list[str], load: list[str], rounds: int) -> None:
    found = split_by_auto(flags)
    splits = [(found[0] + more, found[1] - more) for more in NEIGHBOURS]
    splits = [split for split in splits if min(split) > 0]
    seconds: dict[tuple[int, int], list[float]] = {split: [] for split in splits}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        for _ in range(rounds):
            for split in splits:  # in turn, so that what else the machine does meets all alike
                layers = ",".join(map(str, split))
                command = ["bench", *flags, *load, "--pipeline-layers", layers]
                seconds[split].append(result(path, *command)["seconds"])
    medians = {split: statistics.median(took) for split, took in seconds.items()}
    best = min(medians, key=medians.get)
    print("| layers | seconds, each round | median |\n|---|---|---|")
    for split, took in seconds.items():
        mark = " (auto)" * (list(split) == found) + " (best)" * (split == best)
        rounded = " ".join(f"{each:.2f}" for each in took)
        print(f"| {split[0]}+{split[1]}{mark} | {rounded} | {medians[split]:.2f} |")
    away = abs(best[0] - found[0])
    print(f"\nauto is {away} layer{'s' * (away != 1)} from the best of {len(splits)} splits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", default="48")
    parser.add_argument("--scale", default="8")
    parser.add_argument("--slow", type=int, default=1, help="the stage whose core is shared")
    parser.add_argument("--emulated", action="store_true")
    args = parser.parse_args()
    exit_on_signals()  # the neighbour, too
    load = ["--workload", "sharegpt", "--scale", args.scale, "--num-prompts", args.num_prompts]
    if args.emulated:
        slowdown = "1.5,1" if args.slow == 0 else "1,1.5"
        compare([*EMULATED, "-pp", "2", "--stage-slowdown", slowdown], load, args.rounds)
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // 2  # as the keepers share them out (pipeserve.stage.placement)
    if not share:
        sys.exit("error: two stages need two cores")
    with nothing_kept(), busy_neighbour(cores[args.slow * share]):
        compare([args.model, "-pp", "2", *LIMITS], load, args.rounds)


if __name__ == "__main__":
    main()
