"""How well the simulator foretells real CPU stages: the same commands, once real, once simulated.

    python bench/simulated_vs_real.py [--profile FILE] [--model smollm2-135m] [--stages 2]
                                      [--policies NAME,NAME,...] [--rate R] [--repeat N]
                                      [--page docs/simulate.md]

Without --profile the machine is calibrated first. Then each policy runs `pipeserve bench` and
`pipeserve simulate` on one workload, ShareGPT's lengths divided by 8; the simulated stages have the
layers that the real ones had, and like them take turns with the head where they are two. Of several
repeats the run of median duration counts. Use an idle machine: a stage robbed of its core is slower
than its profile.
"""

import sys
import tempfile
from pathlib import Path

from commands import LIMITS, profile_of, result, stage_flags
from report import plain_table, show

WORKLOAD = ["--workload", "sharegpt", "--scale", "8", "--num-prompts", "64"]
POLICIES = "sarathi_serve,vllm,uniform"


def compare(policy: str, real: dict, simulated: dict) -> list[list[str]]:
    """Rows of the table: figure, real, simulated, how far off."""
    rows = []
    for name, get in (
        ("total tokens/s", lambda r: r["total_tokens_per_s"]),
        ("TBT p50, ms", lambda r: r["tbt_s"]["p50"] * 1e3),
        ("TTFT p50, ms", lambda r: r["ttft_s"]["p50"] * 1e3),
    ):
        ratio = get(simulated) / get(real) - 1
        rows.append([policy, name, f"{get(real):,.1f}", f"{get(simulated):,.1f}", f"{ratio:+.1%}"])
    for stage, (there, here) in enumerate(zip(real["stages"], simulated["stages"], strict=True)):
        idle, made_up = 1 - there["busy"], 1 - here["busy"]
        off = f"{(made_up - idle) * 100:+.1f} points"
        rows.append([policy, f"idle share, stage {stage}", f"{idle:.1%}", f"{made_up:.1%}", off])
    return rows


def main() -> None:
    parser = stage_flags(__doc__, POLICIES)
    parser.add_argument("--rate", help="requests a second; by default all at once")
    parser.add_argument("--repeat", default="1")
    parser.add_argument("--page", type=Path, help="put the table there")
    args = parser.parse_args()
    rate = ["--rate", args.rate] if args.rate else []
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_of(args, Path(folder))
        rows = []
        for policy in args.policies.split(","):
            run = [args.model, "-pp", args.stages, "--policy", policy, *WORKLOAD, *LIMITS, *rate]
            run += ["--head-stages", "both" if args.stages == "2" else "last"]
            real = result(Path(folder, "real.json"), "bench", *run, "--repeat", args.repeat)
            layers = ",".join(str(stage["layers"]) for stage in real["stages"])
            made_up = ["simulate", *run, "--device-profile", str(profile)]
            made_up += ["--pipeline-layers", layers]
            rows += compare(policy, real, result(Path(folder, "simulated.json"), *made_up))
            print(f"{policy}: runs of {real['run_seconds']} s", file=sys.stderr, flush=True)
    table = plain_table(["policy", "figure", "real", "simulated", "off by"], rows)
    show(table, "against real stages", args.page)


if __name__ == "__main__":
    main()
