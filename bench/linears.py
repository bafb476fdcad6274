"""Why linear layers are packed, and why row counts are padded to few values.

    python bench/linears.py                                        (about a minute, one core)

First table: bf16 products of SmolLM2's shapes, plain F.linear against the packed weight. Second:
what a number of rows that was not met before costs, because oneDNN compiles a kernel for it.
"""

import os
import time

import torch
import torch.nn.functional as F

from pipeserve.memory import resident_bytes
from pipeserve.stages.linear import Linear

SHAPES = {
    "qkv": (960, 576),
    "out": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}


def least_ms(function, seconds: float = 0.2) -> float:
    function()
    until, least = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < until:
        started = time.perf_counter()
        function()
        least = min(least, time.perf_counter() - started)
    return least * 1e3


def make_linear(shape: tuple[int, int]) -> Linear:
    linear = Linear(shape[1], shape[0])
    linear.set(torch.randn(shape).to(torch.bfloat16))
    return linear


def compare_packing() -> None:
    print(f"{'layer':<9}{'rows':>6}{'plain ms':>10}{'packed ms':>11}{'GFLOP/s':>9}")
    for name, shape in SHAPES.items():
        plain = torch.randn(shape).to(torch.bfloat16)
        linear = make_linear(shape)
        for rows in (1, 16, 32) if name == "head" else (1, 16, 128, 512):
            x = torch.randn(rows, shape[1]).to(torch.bfloat16)
            slow = least_ms(lambda x=x, plain=plain: F.linear(x, plain))
            fast = least_ms(lambda x=x, linear=linear: linear(x))
            rate = 2 * rows * shape[0] * shape[1] / fast / 1e6
            print(f"{name:<9}{rows:>6}{slow:>10.3f}{fast:>11.3f}{rate:>9.0f}")


def cost_of_new_shapes(step: int) -> None:
    layers = [make_linear(shape) for name, shape in SHAPES.items() if name != "head"]
    extra_s, before, count = 0.0, resident_bytes(), 0
    for rows in range(step, 513, step):
        for linear in layers:
            x = torch.randn(rows, linear.shape[1]).to(torch.bfloat16)
            times = []
            for _ in range(2):
                started = time.perf_counter()
                linear(x)
                times.append(time.perf_counter() - started)
            extra_s += times[0] - times[1]
            count += 1
    grown = (resident_bytes() - before) / 2**20
    print(
        f"rows in steps of {step:>2}: {count} shapes, first call {extra_s / count * 1e3:.2f} ms "
        f"longer than the second, memory grew by {grown:.0f} MiB"
    )


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.inference_mode():
        compare_packing()
        for step in (16, 4):
            cost_of_new_shapes(step)


if __name__ == "__main__":
    main()
