"""Why linear layers are packed, and why row counts are padded to few values.

    python bench/linears.py                                        (about a minute, one core)
    python bench/linears.py rates [SHAPE ...]                      (about three minutes)

`rates`: GFLOP/s of the C kernels beside torch's products, in turn, with weights that no cache
holds; above them the most that the core multiplies and reads. Seconds are of the core's own time,
so other processes disturb little. With ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 as on a
CPU without AVX512.

Without it, first table: products of SmolLM2's shapes in bf16 and float32, plain F.linear against
the packed weight. Second: ways to have logits in float32 from a checkpoint in bf16, and how far off
each is. Third: what a number of rows that was not met before costs, because oneDNN compiles a
kernel for it.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from commands import one_of

from pipeserve.stage.memory import resident_bytes
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.library import kernels, usable_libraries
from pipeserve.stages.backends.cpu.products import PackedWeight
from pipeserve.stages.layers.linear import Linear

SHAPES = {
    "qkv": (960, 576),
    "out": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
LARGE_SHAPES = {"7b out": (4096, 4096), "7b up": (11008, 4096)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COLD_BYTES = 100 * 2**20
"""Weights are taken in turn from this much, more than a cache holds."""

Product = Callable[[torch.Tensor], torch.Tensor]


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


def heads(weight: torch.Tensor) -> dict[str, Product]:
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


def products(weight: torch.Tensor) -> dict[str, Product]:
    """By what they are called; `weight` is float32 and exact in bfloat16."""
    half, single = make_linear(weight.bfloat16()), make_linear(weight)
    prepacked = torch.ops.quantized.linear_prepack_fp16(weight, None)
    in_float16 = weight * 1.001  # not exact in bfloat16 any more
    found: dict[str, Product] = {
        "F.linear": lambda x: F.linear(x, weight),
        "oneDNN": single,
        "fp16": lambda x: torch.ops.quantized.linear_dynamic_fp16(x, prepacked),
        "own 32": PackedWeight(in_float16).product,
        "own fp16": PackedWeight(in_float16.half()).product,
        "own bf16": PackedWeight(weight).product,
    }
    if "avx512_bf16" in usable_libraries():
        found["oneDNN bf16"] = half
        found["own dot"] = PackedWeight(weight.bfloat16(), rounds_x=True).product
    return found


def compare_rates(shapes: dict[str, tuple[int, int]], seconds: float = 0.2) -> None:
    """A table of GFLOP/s; `seconds` of measuring for each number in it."""
    library, room = kernels(), torch.zeros(COLD_BYTES // 4)
    repeats = 10**5
    operations = library.multiply_add(0) * repeats / 1e9
    multiplies = operations / least_of(lambda: library.multiply_add(repeats))
    reads = COLD_BYTES / least_of(lambda: library.read_all(room.data_ptr(), COLD_BYTES)) / 1e9
    print(f"{usable_libraries()[0]}: {multiplies:.0f} GFLOP/s at most, reads {reads:.0f} GB/s")
    for number, (name, shape) in enumerate(shapes.items()):
        copies = max(1, COLD_BYTES // (2 * shape[0] * shape[1]))
        made = [products((torch.randn(shape) / 24).bfloat16().float()) for _ in range(copies)]
        if number == 0:
            print(f"{'':<8}{'rows':>5}" + "".join(f"{each:>12}" for each in made[0]))
        for rows in ROWS:
            x = torch.randn(rows, shape[1])
            times = in_turn(made, x, seconds)
            rates = [2 * rows * shape[0] * shape[1] / least / 1e9 for least in times]
            print(f"{name:<8}{rows:>5}" + "".join(f"{rate:>12.1f}" for rate in rates), flush=True)


def in_turn(copies: list[dict[str, Product]], x: torch.Tensor, seconds: float) -> list[float]:
    """Of each kind of product the seconds that only a tenth of its runs stayed below."""
    times: dict[str, list[float]] = {name: [] for name in copies[0]}
    for product in copies[0].values():
        product(x)
    until, turn = time.perf_counter() + seconds * len(times), 0
    while time.perf_counter() < until or turn < 3:
        for name, product in copies[turn % len(copies)].items():
            started = time.thread_time()
            product(x)
            times[name].append(time.thread_time() - started)
        turn += 1
    return [sorted(each)[len(each) // 10] for each in times.values()]


def least_of(function: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the core's time that `function` takes at least."""
    until, least = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < until:
        started = time.thread_time()
        function()
        least = min(least, time.thread_time() - started)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = SHAPES | LARGE_SHAPES
    parser.add_argument("what", nargs="?", choices=["rates"])
    parser.add_argument(
        "shapes", nargs="*", type=one_of(shapes), metavar="SHAPE", help="by default all"
    )
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.inference_mode():
        if args.what is not None:
            compare_rates({name: shapes[name] for name in args.shapes or shapes})
            return
        for dtype in (torch.bfloat16, torch.float32):
            compare_packing(dtype)
        compare_heads()
        for step in (16, 4):
            cost_of_new_shapes(step)


if __name__ == "__main__":
    main()
