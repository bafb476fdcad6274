"""Idle time by cause on real CPU stages, schedule by schedule, on three mixes. The table of
docs/schedules.md.

    python bench/idle_by_cause.py [--profile FILE] [--model smollm2-135m] [--stages 2]
                                  [--policies NAME,NAME,...] [--repeat N]

Each run is `pipeserve bench --record` and what `pipeserve report` makes of it; of several repeats
the one of median duration counts. `uniform` goes by a cost profile of this machine: without
--profile it is calibrated first. Use an idle machine with a core for each stage: what others take
is `jitter`, and truly so.
"""

import json
import sys
import tempfile
from pathlib import Path
from random import Random

from commands import LIMITS, profile_of, result, stage_flags
from report import plain_table, show

REFERENCE = ["--workload", "sharegpt", "--scale", "8", "--num-prompts", "64"]
HEAVY = {
    "decode-heavy": {"num_prompts": 48, "prompt": (16, 64), "output": (48, 128)},
    "prefill-heavy": {"num_prompts": 40, "prompt": (400, 1200), "output": (2, 10)},
}
"""Drawn evenly between the two."""
LEAST = 0.0005
"""Of the wall time, mean over stages: causes below are not shown."""


def write_heavy(folder: Path) -> dict[str, list[str]]:
    """Flags of each mix."""
    mixes = {"reference": REFERENCE}
    for name, mix in HEAVY.items():
        rng, path = Random(name), folder / f"{name}.jsonl"
        with path.open("w") as file:
            for _ in range(mix["num_prompts"]):
                ids = [rng.randrange(100, 40_000) for _ in range(rng.randint(*mix["prompt"]))]
                request = {"prompt_token_ids": ids, "max_tokens": rng.randint(*mix["output"])}
                file.write(json.dumps(request) + "\n")
        mixes[name] = ["--workload", str(path)]
    return mixes


def run(folder: Path, repeat: int, *flags: str) -> tuple[dict, dict]:
    """What `bench` and `report` say of the run of median duration."""
    found = []
    for _ in range(repeat):
        record = tempfile.mkdtemp(dir=folder)
        bench = result(folder / "bench.json", "bench", *flags, *LIMITS, "--record", record)
        found.append((bench, result(folder / "report.json", "report", record)))
    return sorted(found, key=lambda pair: pair[0]["output_tokens_per_s"])[(repeat - 1) // 2]


def row(mix: str, policy: str, bench: dict, report: dict) -> list[str]:
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
    parser = stage_flags(__doc__.splitlines()[0], "sarathi_serve,uniform")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    args = parser.parse_args()
    model = [args.model, "-pp", args.stages]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = profile_of(args, folder)
        for mix, flags in write_heavy(folder).items():
            for policy in args.policies.split(","):
                which = ["--policy", policy, "--device-profile", str(profile)]
                rows.append(row(mix, policy, *run(folder, args.repeat, *model, *which, *flags)))
                print(*rows[-1], file=sys.stderr, flush=True)
    header = ["mix", "policy", "output tokens/s", "TTFT P50", "TBT P99", "idle of each stage",
              "by cause, mean of the stages"]  # fmt: skip
    show(plain_table(header, rows), "idle by cause", args.page)


if __name__ == "__main__":
    main()
