"""Where the CPU time of a microbatch goes: all of it, in stages, links and driver, and the floor.

    python bench/microbatch_parts.py MODEL [--stages 2] [--dtype bfloat16 --pair-rate 200]
                                     [--microbatches 60] [--json FILE]

The whole pipeline runs in this process, on one core: driver, messages, links and stages are the
real ones (tests/support/local_fleet.py). Each part has the CPU time (its own) that passed in it and
in no part inside it, so that parts sum to the whole; what is left is "rest". The floor, of products
and attention, is that of stage_parts.py, of the same microbatches, with rates measured in the same
run. Others may use the machine meanwhile, though it makes caches cold; timing itself takes some
0.5 us a call, of which a stage has about twelve a layer. Halves of layers, which a stage with C
kernels has done in one call of C, are done part by part here.

Two loads: decodes alone, 16 in each microbatch over some 300 positions; and 256 tokens of prompts
with up to 16 decodes.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

from commands import script
from local_fleet import LocalFleet
from report import plain_table
from stage_parts import PARTS, floors, multiply_rate, plain_halves, read_rate

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId, SamplingParams
from pipeserve.driver import driver as driver_module
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.stage import worker as worker_module
from pipeserve.stage.loop import StageLoop

BATCH = 16
ORDER = (
    *dict.fromkeys(PARTS.values()),
    "embedding",
    "head",
    "layers: rest",
    "inputs",
    "sampling",
    "links",
    "messages",
    "requests",
    "loop: rest",
    "planning",
    "completing",
    "driver: messages",
    "driver: records",
    "driver: rest",
)


class Account:
    """CPU time by (place, part): a stage's number, or "driver"."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._stack: list[tuple[str, str]] = []
        self._since_s = 0.0
        self._is_closed_to_parts = False
        self._originals: list[tuple[object, str, object]] = []

    def close(self) -> None:
        """What was wrapped is as before."""
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)

    def reset(self) -> None:
        self.seconds.clear()

    def wrap(
        self, owner: object, name: str, part: str, place: str | None = None, whole: bool = False
    ) -> None:
        """The function `owner.name` counts as `part`, of `place` or of who called it; a `whole`
        one with all that it calls."""
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, self.timed(getattr(owner, name), part, place, whole))

    def timed(
        self, function: Callable, part: str, place: str | None = None, whole: bool = False
    ) -> Callable:
        def counted(*arguments, **keywords):
            if self._is_closed_to_parts:
                return function(*arguments, **keywords)
            where = place or (self._stack[-1][0] if self._stack else "driver")
            self._turn()
            self._stack.append((where, part))
            self._is_closed_to_parts = whole
            try:
                return function(*arguments, **keywords)
            finally:
                self._is_closed_to_parts = False
                self._turn()
                self._stack.pop()

        return counted

    def _turn(self) -> None:
        now_s = time.thread_time()
        if self._stack:
            self.seconds[self._stack[-1]] += now_s - self._since_s
        self._since_s = now_s


class Watched:
    """A pipeline in this process whose parts are accounted for."""

    def __init__(self, args: argparse.Namespace, num_tokens: int) -> None:
        self.account = account = Account()
        options = {
            "model": args.model,
            "dtype": args.dtype,
            "pipeline_parallel_size": args.stages,
            "pipeline_window": args.stages,  # in one process every way looks slow
            "max_num_batched_tokens": num_tokens,
            "num_gpu_blocks_override": 4096,
        }
        self.driver = Driver(checkpoint_setup(make_config({}, options)), fleet=LocalFleet)
        self.inputs: dict[str, list] = defaultdict(list)
        self.loops: dict[str, StageLoop] = {}
        for rank, worker in enumerate(self.driver.fleet.workers):
            self.loops[f"stage {rank}"] = worker
            self._watch(worker, f"stage {rank}")
        driver = self.driver
        account.wrap(driver, "step", "driver: rest", "driver")
        for name in ("sample", "draw"):
            if hasattr(worker_module, name):
                account.wrap(worker_module, name, "sampling")
        account.wrap(driver.engine, "plan", "planning")
        account.wrap(driver.engine, "complete", "completing")
        account.wrap(driver.fleet, "broadcast", "driver: messages")
        account.wrap(driver_module, "step_message", "driver: messages")
        account.wrap(driver_module, "step_result", "driver: messages")
        for name in ("planned", "completed", "computed"):
            account.wrap(driver.journal, name, "driver: records")

    def _watch(self, worker: StageLoop, place: str) -> None:
        account, compute = self.account, worker.compute
        account.wrap(worker, "go_round", "loop: rest", place)
        account.wrap(worker, "_receive", "messages")
        account.wrap(worker, "_report", "messages")
        account.wrap(worker, "_feed_back", "messages")
        account.wrap(worker.sequences, "apply", "requests")
        account.wrap(worker.sequences, "take_tokens", "requests")
        account.wrap(worker.sequences, "has_tokens_for", "requests")
        account.wrap(compute, "_build_inputs", "inputs")
        account.wrap(compute, "_unpack", "links")
        account.wrap(compute.links, "send", "links")
        backend = compute.model.backend
        for name, method in plain_halves(backend).items():
            setattr(backend, name, method)
        for name, part in PARTS.items():
            account.wrap(backend, name, part)
        if compute.model.embedding is not None:
            account.wrap(compute.model.embedding, "forward", "embedding", whole=True)
        for name in ("forward", "likeliest"):
            if hasattr(compute.head, name):
                account.wrap(compute.head, name, "head", whole=True)
        forward = account.timed(compute.model.forward, "layers: rest")

        def noted(x, inputs, kv):
            self.inputs[place].append(inputs)
            return forward(x, inputs, kv)

        compute.model.forward = noted

    def reset(self) -> None:
        self.account.reset()
        self.inputs.clear()


def requests(number: int, prompt: int, outputs: int, ids: Iterator[int]) -> list[Request]:
    rng = Random(0)
    return [
        Request(
            id=RequestId(next(ids)),
            prompt=tuple(rng.randrange(100, 40_000) for _ in range(prompt)),
            params=SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, seed=0),
        )
        for _ in range(number)
    ]


def decodes(args: argparse.Namespace) -> Watched:
    """`BATCH` decodes in each microbatch, and nothing else."""
    watched = Watched(args, 512)
    number = BATCH * args.stages
    outputs = args.microbatches // args.stages + 40
    watched.driver.submit(requests(number, 300 - outputs // 2, outputs, count()))
    met: set[int] = set()
    while len(met) < number:  # each has its first token
        met |= {output.request_id for output in watched.driver.step(1.0)}
    return run(watched, args.microbatches)


def mixed(args: argparse.Namespace) -> Watched:
    watched = Watched(args, 256 + BATCH)
    number = args.microbatches * 256 // 300 + 4 * BATCH
    watched.driver.submit(requests(number, 300, 2 * BATCH * args.stages * 300 // 256, count()))
    met: set[int] = set()
    while len(met) < BATCH * args.stages:  # so many decode
        met |= {output.request_id for output in watched.driver.step(1.0)}
    return run(watched, args.microbatches)


def run(watched: Watched, number: int) -> Watched:
    """So many microbatches more on each stage, and what they took."""
    watched.reset()
    while min(map(len, (watched.inputs[place] for place in watched.loops))) < number:
        watched.driver.step(1.0)
    return watched


def rows(watched: Watched, multiply: float, read: float) -> tuple[list[str], list[list[str]]]:
    places = [*watched.loops, "driver"]
    mean: dict[tuple[str, str], float] = {}
    for place in places:
        number = len(watched.inputs[place if place != "driver" else places[0]])
        for part in ORDER:
            mean[place, part] = watched.account.seconds[place, part] / number
    floor = {place: floor_of(watched, place, multiply, read) for place in watched.loops}
    header = ["us of CPU time", *(h for p in watched.loops for h in (p, "floor")), "driver"]
    found = []
    for part in ("all", *ORDER):
        row = [part]
        for place in places:
            own = sum(mean[place, each] for each in ORDER) if part == "all" else mean[place, part]
            row.append(f"{own * 1e6:,.0f}" if own else "")
            if place != "driver":
                row.append(f"{floor[place][part] * 1e6:,.0f}" if part in floor[place] else "")
        if any(row[1:]):
            found.append(row)
    return header, found


def floor_of(watched: Watched, place: str, multiply: float, read: float) -> dict[str, float]:
    compute = watched.loops[place].compute
    totals: dict[str, float] = defaultdict(float)
    for inputs in watched.inputs[place]:
        found = floors(compute.model, compute.head, compute.kv, inputs, multiply, read)
        for part, seconds in found.items():
            totals[part] += seconds
    return {part: seconds / len(watched.inputs[place]) for part, seconds in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--microbatches", type=int, default=60)
    parser.add_argument(
        "--pair-rate", type=float, default=0.0, help="GFLOP/s of bfloat16 products; 0: float32's"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    torch.set_num_threads(1)
    multiply, read = args.pair_rate * 1e9 or multiply_rate(), read_rate()
    print(f"one core: {multiply / 1e9:.0f} GFLOP/s, reads {read / 1e9:.1f} GB/s")
    found = {}
    for name, load in {"decodes": decodes, "prompts and decodes": mixed}.items():
        watched = load(args)
        number = len(watched.inputs["stage 0"])
        tokens = sum(inputs.num_tokens for inputs in watched.inputs["stage 0"]) / number
        header, table = rows(watched, multiply, read)
        print(f"\n{name}: {number} microbatches of {tokens:.0f} tokens, {watched.driver.dtype}\n")
        print(plain_table(header, table), flush=True)
        found[name] = {"header": header, "rows": table}
        watched.driver.close()
        watched.account.close()
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    script(main)
