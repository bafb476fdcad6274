"""Where a microbatch's time goes in a stage, with the C kernels and without them, and the floor.

    python bench/stage_parts.py MODEL [--dtype float32]

One core, its own (CPU) time, the two backends in turn, the least of their turns. All
rows are greedy. Parts are the methods of the stage's backend, which are called one by one for it;
"rest" is what is around them: views, allocations, Python. "All" is the stage as it runs, where a
backend does halves of layers in one. The floor of a part: its multiplications at the core's rate,
or the bytes that it reads at the core's read rate, whichever is more; both rates measured in the
same run. Of bfloat16 products the rate is that of the best such product that was measured
(bench/linears.py): --pair-rate.
"""

import argparse
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from types import MethodType

import torch
from commands import script

from pipeserve.stages.attention.inputs import StageInputs, build_inputs
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.checkpoint.sources import resolve
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.layers.ends import Head
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.stage import Stage

BLOCK_SIZE = 16
PARTS = {
    "linear": "products",
    "some_outputs": "products",
    "prepare_attention": "attention",
    "attend": "attention",
    "place_heads": "rotary, KV write",
    "turn_heads": "rotary, KV write",
    "rms_norm": "norms",
    "layer_norm": "norms",
    "gated": "products",  # and its activation
    "likeliest": "products",
    "activate": "activations",
    "pad_rows": "padding",
}
HALVES = ("attention_half", "mlp_half", "layers_at_once")
CASES = {
    "16 decodes": (0, 0, 16),
    "32 decodes": (0, 0, 32),
    "256 tokens behind 256, 16 decodes": (256, 256, 16),
    "496 tokens, 16 decodes": (496, 0, 16),
}
"""(tokens of a chunk, tokens before it, decodes over 300 to 450 positions)."""


class Timed:
    """A backend whose parts are timed while it is `apart`."""

    def __init__(self, backend: Backend) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.head: Head
        self.backend = backend
        self._methods = {
            **{name: self._timed(getattr(backend, name), part) for name, part in PARTS.items()},
            **plain_halves(backend),
        }

    @contextmanager
    def apart(self) -> Iterator[None]:
        for name, method in self._methods.items():
            setattr(self.backend, name, method)
        yield
        for name in self._methods:
            delattr(self.backend, name)

    def _timed(self, method, part):
        """What a part has another one do counts as that one alone."""

        def timed(*arguments, **keywords):
            start_s, before_s = time.thread_time(), sum(self.seconds.values())
            try:
                return method(*arguments, **keywords)
            finally:
                others_s = sum(self.seconds.values()) - before_s
                self.seconds[part] += time.thread_time() - start_s - others_s

        return timed


def plain_halves(backend: Backend) -> dict[str, MethodType]:
    """Methods that do layers part by part."""
    return {name: MethodType(getattr(Backend, name), backend) for name in HALVES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--pair-rate", type=float, default=0.0, help="GFLOP/s of bfloat16 products; 0: float32's"
    )
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    torch.set_num_threads(1)
    if kernels() is None:
        raise SystemExit("error: no kernels were compiled for this machine")
    dtype = getattr(torch, args.dtype)
    multiply, read = multiply_rate(), read_rate()
    if args.pair_rate and dtype == torch.bfloat16:
        multiply = args.pair_rate * 1e9
    print(f"one core: {multiply / 1e9:.0f} GFLOP/s, reads {read / 1e9:.1f} GB/s")
    folder = str(resolve(args.model))
    config = read_config(folder)
    stages = []
    for make in (CpuBackend, KernelBackend):
        timed = Timed(make())
        stage = Stage(
            config,
            first_layer=config.num_layers // 2,
            stop_layer=config.num_layers,
            has_embedding=False,
            has_head=True,
            backend=timed.backend,
        )
        load_weights(stage, folder, dtype)
        timed.head, stage.head = stage.head, None  # as a stage's process has it
        kv = stage.make_kv(num_blocks=1500, block_size=BLOCK_SIZE, dtype=dtype)
        stages.append((stage, kv, timed))
    for name, case in CASES.items():
        inputs = inputs_of(*case)
        before, after = ({}, {})
        with torch.inference_mode():
            for _ in range(args.turns):
                for (stage, kv, timed), best in zip(stages, (before, after), strict=True):
                    keep_least(best, parts_of(stage, kv, timed, inputs))
        own, own_kv, timed = stages[1]
        floor = floors(own, timed.head, own_kv, inputs, multiply, read)
        print(f"\n{name}, {args.dtype}: ms\n")
        print("| part | PyTorch | kernels | floor |\n|---|---|---|---|")
        for part in before:
            own = f"{floor[part] * 1e3:.1f}" if part in floor else ""
            print(f"| {part} | {before[part] * 1e3:.1f} | {after.get(part, 0) * 1e3:.1f} | {own} |")


def inputs_of(chunk: int, prefix: int, decodes: int) -> StageInputs:
    rng = random.Random(0)
    spans = [(prefix, prefix + chunk)] if chunk else []
    spans += [(n - 1, n) for n in (rng.randrange(300, 450) for _ in range(decodes))]
    free = rng.sample(range(1500), 1500)
    return build_inputs(
        [
            (start, stop, [free.pop() for _ in range(-(-stop // BLOCK_SIZE))], 1)
            for start, stop in spans
        ],
        BLOCK_SIZE,
        None,
    )


def parts_of(stage: Stage, kv: object, timed: Timed, inputs: StageInputs) -> dict[str, float]:
    """Seconds of one microbatch, and of its parts one by one."""
    x_TD = torch.randn(inputs.num_tokens, stage.config.hidden_size)

    def seconds() -> float:
        start_s = time.thread_time()
        timed.head.likeliest(stage(x_TD, inputs, kv))
        return time.thread_time() - start_s

    whole_s = seconds()
    timed.seconds.clear()
    with timed.apart():
        apart_s = seconds()
    found = {part: timed.seconds[part] for part in dict.fromkeys(PARTS.values())}
    rest_s = apart_s - sum(found.values())
    return {"all": whole_s, "one by one": apart_s, **found, "rest": rest_s}


def keep_least(best: dict[str, float], found: dict[str, float]) -> None:
    """The least of the whole, and the parts of the turn in which they took the least together."""
    whole_s = min(found["all"], best.get("all", inf))
    if found["one by one"] < best.get("one by one", inf):
        best.update(found)
    best["all"] = whole_s


def floors(
    stage: Stage,
    head: Head | None,
    kv: object,
    inputs: StageInputs,
    multiply: float,
    read: float,
) -> dict[str, float]:
    """Seconds of the products and the attention of a stage with `head`, and of the two. Before a
    head, rows whose logits nobody wants end at the keys and values of the last layer."""
    config, products = stage.config, 0.0
    of_head = set() if head is None else set(head.modules())
    of_last = set(stage.layers[-1].modules()) if stage.gives_rows else set()
    for leaf in {*stage.leaves(), *of_head}:
        if isinstance(leaf, Linear):
            rows = inputs.num_wanted if leaf in of_head | of_last else inputs.num_tokens
            flops, num_bytes = 2 * rows * leaf.num_parameters, leaf.weight.nbytes
            products += max(flops / multiply, num_bytes / read if rows else 0.0)
    seen = [inputs] * len(stage.layers)
    if stage.gives_rows:
        seen[-1] = inputs.of_wanted()
        kv_parameters = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        num_ended = inputs.num_tokens - inputs.num_wanted
        products += 2 * num_ended * kv_parameters / multiply
    flops, positions = 0, 0
    for each in seen:
        for chunk in each.chunks:
            pairs = (chunk.start + 1 + chunk.stop) * chunk.num_tokens // 2
            flops += 4 * pairs * config.num_heads * config.head_dim
            positions += chunk.stop
    size = kv.num_bytes / kv.keys_LKBPH[..., 0].numel() * config.num_kv_heads
    attention = max(flops / multiply, positions * size / read)
    return {"products": products, "attention": attention, "all": products + attention}


def multiply_rate() -> float:
    """Of float32, a second."""
    repeats, best = 2_000_000, float("inf")
    for _ in range(5):
        start_s = time.thread_time()
        operations = kernels().multiply_add(repeats)
        best = min(best, time.thread_time() - start_s)
    return operations * repeats / best


def read_rate() -> float:
    """Bytes a second, from memory."""
    memory, best = torch.zeros(64 << 20), float("inf")
    for _ in range(5):
        start_s = time.thread_time()
        kernels().read_all(memory.data_ptr(), memory.nbytes)
        best = min(best, time.thread_time() - start_s)
    return memory.nbytes / best


if __name__ == "__main__":
    script(main)
