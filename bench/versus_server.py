"""Our server and another's, by one client, in turn, on the same cores: what each can take, and how
soon it answers below that.

    python bench/versus_server.py MODEL --peer vllm=FOLDER -pp 2 [--workload sharegpt/8]
                                  [--requests 64] [--slo-ttft 2] [--slo-tbt 0.6] [--rounds 3]
                                  [--loads 0.5,0.8 | --rates R,...] [--json FILE]

Peers:
    vllm=FOLDER   vLLM's CPU build in that virtual environment, with so many requests at a time as
                  `--running` says, as in `versus.py`
    pipeserve     this server once more: what a difference of nothing looks like

First, each side's capacity: `pipeserve bench --url --find-capacity` bisects the rate at which
`--attainment` of the requests keep both limits. In each round every side has a server of its own,
started and ended with it; rounds go forwards and backwards in turn, and the median counts. Then, at
shares of the lesser of the two capacities (`--loads`), TTFT and TBT in as many rounds; or at given
`--rates`, requests a second, without looking for a capacity. Requests
come at Poisson times, the same for both sides, and have random ids, other ones in each run, so that
no prefix cache knows them. Use an idle machine: servers, stages and the client share its cores.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bounded import CommandError, run
from report import plain_table
from sides import CLI, Conditions, Ours, Side, Vllm, serving
from versus import MAX_MODEL_LEN, _names, _numbers, _peer_dtype

from pipeserve.errors import PipeserveError
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.stages.checkpoint.sources import resolve

Report = dict[str, Any]
"""As `pipeserve bench --url --json` writes it."""
_FIGURES = (
    ("TTFT P50, s", lambda report: report["ttft_s"]["p50"]),
    ("TTFT P99, s", lambda report: report["ttft_s"]["p99"]),
    ("TBT P50, s", lambda report: report["tbt_s"]["p50"]),
    ("TBT P99, s", lambda report: report["tbt_s"]["p99"]),
    ("within the limits", lambda report: report["attainment"]),
)


def main() -> int:
    args = _arguments()
    os.sched_setaffinity(0, args.cores)  # what is started here inherits it
    exit_on_signals()
    try:
        _compare(args, resolve(args.model))
    except (CommandError, PipeserveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _compare(args: argparse.Namespace, model: Path) -> None:
    sides = _sides(args, model)
    found: dict[str, Any] = {"conditions": {**vars(args), "json": None}, "loads": {}}
    rates = {f"{rate:g}/s": rate for rate in args.rates}
    if not rates:
        capacities = _rounds(args, sides, "capacity", ("--find-capacity",))
        found["capacity"] = {
            name: [report["capacity"] for report in its] for name, its in capacities.items()
        }
        _print_capacities(found["capacity"])
        least = min(map(median, found["capacity"].values()))
        rates = {f"{share:.0%} of the lesser capacity": share * least for share in args.loads}
    for load, rate in rates.items():
        if not rate:
            break
        reports = _rounds(args, sides, load, ("--rate", f"{rate:.4f}"))
        found["loads"][load] = {"rate": rate, "reports": reports}
        _print_load(load, rate, reports)
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=2, default=str) + "\n")


def _rounds(
    args: argparse.Namespace, sides: Sequence[Side], what: str, flags: Sequence[str]
) -> dict[str, list[Report]]:
    reports: dict[str, list[Report]] = {side.name: [] for side in sides}
    for number in range(args.rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            began_s = time.monotonic()
            report = _measure(args, side, (*flags, "--seed", str(number)))
            reports[side.name].append(report)
            told = ", ".join(f"{name} {of(report):.3f}" for name, of in _FIGURES)
            capacity = f"capacity {report['capacity']:.2f}/s, " if "capacity" in report else ""
            seconds = time.monotonic() - began_s
            print(f"{what}, round {number}, {side.name}: {capacity}{told} ({seconds:.0f} s)")
            sys.stdout.flush()
    return reports


def _measure(args: argparse.Namespace, side: Side, flags: Sequence[str]) -> Report:
    """One start of its server, and one run of the client. Raises CommandError."""
    name, _, scale = args.workload.partition("/")
    with tempfile.TemporaryDirectory(prefix="versus-") as folder:
        out = Path(folder, "out.json")
        ends_s = time.monotonic() + args.limit
        with serving(side, Path(folder, "log"), args.limit) as url:
            client = [*CLI, "bench", "--url", url, "--workload", name, "--scale", scale or "1"]
            client += ["--num-prompts", str(args.requests), "--json", str(out)]
            client += ["--slo-ttft", str(args.slo_ttft), "--slo-tbt", str(args.slo_tbt)]
            client += ["--attainment", str(args.attainment), *flags]
            run(client, Path(folder, "client"), max(ends_s - time.monotonic(), 1.0))
        return json.loads(out.read_text())


def _sides(args: argparse.Namespace, model: Path) -> list[Side]:
    conditions = Conditions(
        model=model,
        num_stages=args.stages,
        cores=tuple(args.cores),
        peer_dtype=args.peer_dtype,
        batched_tokens=512,
        max_model_len=MAX_MODEL_LEN,
        passes=1,
    )
    name, _, environment = args.peer.partition("=")
    if name == "vllm":
        python = str(Path(environment, "bin", "python").absolute())
        peer: Side = Vllm(conditions=conditions, running=args.running, python=python)
    else:
        peer = Ours(conditions=conditions, flags=args.ours, name="pipeserve, again")
    return [Ours(conditions=conditions, flags=args.ours), peer]


# ---- what is told -------------------------------------------------------------------------------


def _print_capacities(capacity: dict[str, list[float]]) -> None:
    rows = [[name, f"{median(its):.2f}", _range(its, ".2f")] for name, its in capacity.items()]
    print("\n" + plain_table(["capacity", "requests/s", "of the rounds"], rows) + "\n", flush=True)


def _print_load(load: str, rate: float, reports: dict[str, list[Report]]) -> None:
    rows = [
        [title, *(f"{median(map(of, its)):.3f} ({_range([*map(of, its)], '.3f')})" for its in each)]
        for title, of in _FIGURES
        if (each := [*reports.values()])
    ]
    head = f"at {load}, {rate:.2f}/s"
    print("\n" + plain_table([head, *reports], rows) + "\n", flush=True)


def _range(values: Sequence[float], kind: str) -> str:
    return f"{min(values):{kind}} to {max(values):{kind}}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--peer", required=True, help="vllm=FOLDER, pipeserve")
    parser.add_argument("-pp", "--stages", default=2, type=int)
    parser.add_argument("--workload", default="sharegpt/8", help="NAME/SCALE")
    parser.add_argument("--requests", default=64, type=int, help="of each run")
    parser.add_argument("--slo-ttft", default=2.0, type=float, metavar="S")
    # A chunk of 512 tokens takes a small model some 0.4 s on one core a stage.
    parser.add_argument("--slo-tbt", default=0.6, type=float, metavar="S")
    parser.add_argument("--attainment", default=0.9, type=float)
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--loads", default=[0.5, 0.8], type=_shares, help="0.5,0.8")
    parser.add_argument("--rates", default=[], type=_shares, help="0.3,0.5")
    parser.add_argument("--running", default=256, type=int, help="of vLLM: requests at a time")
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default=_peer_dtype())
    parser.add_argument("--ours", type=str.split, default=[], help="more flags of `serve`")
    parser.add_argument("--cores", type=_numbers, default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name, _, environment = args.peer.partition("=")
    if name not in ("vllm", "pipeserve"):
        parser.error(f"--peer {name}: there are vllm=FOLDER and pipeserve")
    if name == "vllm" and not Path(environment, "bin", "python").exists():
        parser.error(f"--peer vllm={environment}: no bin/python there; give its environment")
    return args


def _shares(text: str) -> list[float]:
    return [float(part) for part in _names(text)]


if __name__ == "__main__":
    sys.exit(main())
