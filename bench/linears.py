"""Why linear layers are packed, and why row counts are padded to few values.

    python bench/linears.py                                        (about a minute, one core)

First table: products of SmolLM2's shapes in bf16 and float32, plain F.linear against the packed
weight. Second: ways to have logits in float32 from a checkpoint in bf16, and how far off each is.
Third: what a number of rows that was not met before costs, because oneDNN compiles a kernel for it.
"""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeserve.stage.memory import resident_bytes
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.layers.linear import Linear

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


def make_linear(weight: torch.Tensor) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.backend = CpuBackend()
    linear.set(weight)
    return linear


def compare_packing(dtype: torch.dtype) -> None:
    print(f"\n{dtype}:")
    print(f"{'layer':<9}{'rows':>6}{'plain ms':>10}{'packed ms':>11}{'GFLOP/s':>9}")
    for name, shape in SHAPES.items():
        plain = torch.randn(shape).to(dtype)
        linear = make_linear(plain.clone())
        for rows in (1, 16, 32) if name == "head" else (1, 16, 128, 512):
            x = torch.randn(rows, shape[1]).to(dtype)
            slow = least_ms(lambda x=x, plain=plain: F.linear(x, plain))
            fast = least_ms(lambda x=x, linear=linear: linear(x))
            rate = 2 * rows * shape[0] * shape[1] / fast / 1e6
            print(f"{name:<9}{rows:>6}{slow:>10.3f}{fast:>11.3f}{rate:>9.0f}")


def compare_heads() -> None:
    """oneDNN's bf16 products leave in bf16, and torch has none that leave in float32 on CPU."""
    weight = (torch.randn(SHAPES["head"]) / 24).to(torch.bfloat16)
    print("\nlogits in float32:")
    print(f"{'head':<24}{'rows':>6}{'ms':>8}{'error':>10}")
    for rows in (8, 16, 32):
        x = torch.randn(rows, weight.shape[1]).bfloat16().float()
        exact = x.double() @ weight.double().T
        for name, head in heads(weight).items():
            error = (head(x).double() - exact).abs().max()
            print(f"{name:<24}{rows:>6}{least_ms(lambda h=head, x=x: h(x)):>8.1f}{error:>10.1e}")


def heads(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """By what they are called; the second is what stages have."""
    half, single, wide = make_linear(weight), make_linear(weight.float()), weight.float()
    product = torch.ops.mkldnn._linear_pointwise

    def in_two(x: torch.Tensor) -> torch.Tensor:
        """What the first product's rounding left out comes out of a second one."""
        high = half(x)
        x = x.to(torch.bfloat16)
        low = product.binary(x, high.neg(), half.weight, None, "add")
        return high.float() + low.float()

    def in_blocks(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x @ block.float().T for block in weight.split(4096)], -1)

    found = {
        "bf16, rounded": half,
        "float32, packed": single,
        "float32": lambda x: F.linear(x, wide),
        "bf16 made wide in blocks": in_blocks,
    }
    if half.weight.is_mkldnn:
        found["bf16 in two products"] = in_two
    return found


def cost_of_new_shapes(step: int) -> None:
    layers = [
        make_linear(torch.randn(shape).to(torch.bfloat16))
        for name, shape in SHAPES.items()
        if name != "head"
    ]
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
        for dtype in (torch.bfloat16, torch.float32):
            compare_packing(dtype)
        compare_heads()
        for step in (16, 4):
            cost_of_new_shapes(step)


if __name__ == "__main__":
    main()
