"""Our engine and another, on the same requests, in turn, on the same cores: ratios of medians.

    python bench/versus.py MODEL --peer vllm=FOLDER -pp 2 [--workloads sharegpt/8,decode,prefill]
                           [--rounds 5] [--requests N] [--http] [--imitate-avx2]
                           [--limit S] [--within S] [--json FILE]

Peers:
    vllm=FOLDER    vLLM's CPU build in that virtual environment (it wants a C++ compiler)
    transformers   its continuous batching, in this environment; it knows no stages
each with so many requests at a time as `--running` says, where the workload has as many, in
bfloat16 where this CPU multiplies it natively, else float32. llama.cpp is not among them: its
Python package is source only.

Each measurement starts an engine, warms it up with 8 short requests, lets it rest for a second,
submits the whole workload at once and ends the engine, so that the others take neither memory nor
time meanwhile. In each round every side gets the same requests of random ids, other ones than in
the round before, and rounds are run forwards and backwards in turn. Offline both sides are asked
through their own Python interface and tokens are timed where they come out; with --http each runs
its own server and `pipeserve bench --url` times both. A ratio is ours over the peer's, of medians;
beside it the least and the greatest of the rounds. Tokens/s are better over 1, times under 1.

--imitate-avx2 has all sides do without AVX512, as on the other kind of CPU that people have: oneDNN
and PyTorch by their variables, which our kernels go by, too, and vLLM by its library for AVX2.

A run takes at most ROUNDS x WORKLOADS x SIDES x LIMIT seconds, and begins no round after WITHIN.
Use an idle machine.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from bounded import CommandError
from ratios import FIGURES, comparison, table
from sides import Conditions, Ours, Side, Transformers, Vllm, measure

from pipeserve.errors import PipeserveError
from pipeserve.launch.inputs.workload import read_workload
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.machine import device_name, native_dtypes
from pipeserve.profiling.simulation.workloads import random_items
from pipeserve.stages.checkpoint.sources import resolve

Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, output tokens) of each request."""
WORKLOADS = {"sharegpt/8": 64, "decode": 32, "prefill": 32}
"""Requests of each."""
MAX_MODEL_LEN = 2048
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_BUSY_LOAD = 0.5


# ---- requests ----------------------------------------------------------------------------------


def lengths_of(workload: str, num_requests: int | None) -> Lengths:
    num_requests = num_requests or WORKLOADS[workload]
    if workload == "decode":
        return [(64, 256)] * num_requests
    if workload == "prefill":
        return [(1500, 16)] * num_requests
    return read_workload("sharegpt", num_requests, 8, None, seed=0).token_lengths()


def write_requests(path: Path, lengths: Lengths, vocab_size: int, seed: str) -> None:
    lines = [
        json.dumps({"prompt_token_ids": item.prompt, "max_tokens": item.max_tokens})
        for item in random_items(lengths, 1, vocab_size, Random(seed))
    ]
    path.write_text("\n".join(lines) + "\n")


# ---- the command -------------------------------------------------------------------------------


def main() -> int:
    args = _arguments()
    os.sched_setaffinity(0, args.cores)  # what is started here inherits it
    exit_on_signals()
    try:
        folder = resolve(args.model)
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        _compare(args, folder, vocab_size)
    except (CommandError, PipeserveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _compare(args: argparse.Namespace, model: Path, vocab_size: int) -> None:
    ends_s = time.monotonic() + args.within
    result: dict[str, Any] = {"conditions": _conditions(args), "workloads": {}}
    for workload in args.workloads:
        lengths = lengths_of(workload, args.requests)
        sides = sides_of(args, model, len(lengths))
        reports: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        for number in range(args.rounds):
            if time.monotonic() > ends_s:
                print(f"time is up after {number} rounds of {workload}", file=sys.stderr)
                break
            with tempfile.TemporaryDirectory(prefix="versus-") as folder:
                requests = Path(folder, "requests.jsonl")
                write_requests(requests, lengths, vocab_size, f"{workload}/{number}")
                for side in sides[:: -1 if number % 2 else 1]:
                    report = measure(side, requests, Path(folder), args.limit, args.http)
                    reports[side.name].append(report)
                    _say(workload, number, side, report)
        if not reports[sides[0].name]:
            continue
        result["workloads"][workload] = {
            "requests": len(lengths),
            "prompt_tokens": sum(prompt for prompt, _ in lengths),
            "output_tokens": sum(output for _, output in lengths),
            **comparison(reports),
        }
        print(f"\n{_heading(workload, result['workloads'][workload], reports)}\n")
        print(table(result["workloads"][workload]) + "\n", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")


def sides_of(args: argparse.Namespace, model: Path, num_requests: int) -> list[Side]:
    """Ours first."""
    conditions = Conditions(
        model=model,
        num_stages=args.stages,
        cores=tuple(args.cores),
        peer_dtype=args.peer_dtype,
        batched_tokens=args.batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        passes=args.passes,
    )
    sides: list[Side] = [Ours(conditions=conditions, flags=args.ours)]
    for name, _, environment in (peer.partition("=") for peer in args.peer):
        for running in settings(args.running, num_requests):
            if name == "transformers":
                sides.append(Transformers(conditions=conditions, running=running))
            else:
                python = str(Path(environment, "bin", "python").absolute())
                sides.append(Vllm(conditions=conditions, running=running, python=python))
    return sides


def settings(running: Sequence[int], num_requests: int) -> list[int]:
    """Those of `running` that differ: one that is enough for all requests is as good as any."""
    enough = [number for number in running if number >= num_requests]
    return [number for number in running if number not in enough or number == min(enough)]


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    return {**asked, "cpu": device_name(), "native_dtypes": native_dtypes()}


def _say(workload: str, number: int, side: Side, report: Mapping[str, Any]) -> None:
    figures = (f"{figure.title} {format(figure.of(report), figure.format)}" for figure in FIGURES)
    print(f"{workload}, round {number}, {side.name}: {', '.join(figures)}", flush=True)


def _heading(workload: str, found: Mapping[str, Any], reports: Mapping[str, Sequence]) -> str:
    num_rounds = min(map(len, reports.values()))
    return (
        f"{workload}: {found['requests']} requests, {found['prompt_tokens']:,} prompt and "
        f"{found['output_tokens']:,} output tokens, {num_rounds} rounds"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--peer", action="append", required=True, help="vllm=FOLDER, transformers")
    parser.add_argument("-pp", "--stages", default=1, **whole)
    parser.add_argument("--workloads", type=_names, default=list(WORKLOADS))
    parser.add_argument("--requests", help="of each workload, for a short trial", **whole)
    parser.add_argument("--rounds", default=5, **whole)
    parser.add_argument("--passes", default=1, help="of each start; the median counts", **whole)
    parser.add_argument("--running", type=_numbers, default=[32, 256], help="of the peers: 32,256")
    parser.add_argument("--batched-tokens", default=512, help="of the peers", **whole)
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--ours", type=shlex.split, default=[], help="more flags of `pipeserve`")
    parser.add_argument("--cores", type=_numbers, default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--imitate-avx2", action="store_true", help="all sides, without AVX512")
    parser.add_argument("--http", action="store_true", help="servers, and one client for both")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a measurement")
    parser.add_argument("--within", type=float, default=7200, help="seconds to begin rounds in")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _check(parser, args)
    if args.imitate_avx2:
        os.environ.update(WITHOUT_AVX512)  # of all that is started here
    args.peer_dtype = args.peer_dtype or _peer_dtype()
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    unknown = set(args.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if len(args.cores) < args.stages:
        parser.error(f"{args.stages} stages on {len(args.cores)} cores; give a core for each")
    if args.http and args.passes > 1:
        parser.error("--passes is for runs without --http: a server would find its prompts cached")
    for name, given, environment in (peer.partition("=") for peer in args.peer):
        if name == "vllm" and not Path(environment, "bin", "python").exists():
            parser.error(f"--peer vllm={environment}: no bin/python there; give its environment")
        if name == "transformers" and (given or args.http):
            parser.error("--peer transformers runs here and offline; give no folder, no --http")
        if name not in ("vllm", "transformers"):
            parser.error(f"--peer {name}: there are vllm=FOLDER and transformers")
    load = os.getloadavg()[0]
    if load > _BUSY_LOAD:
        print(f"warning: {load:.1f} other processes run here: times say little", file=sys.stderr)


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _peer_dtype() -> str:
    return "bfloat16" if "bfloat16" in native_dtypes() else "float32"


if __name__ == "__main__":
    sys.exit(main())
