"""How far off the cost model is: writes the tables and plots of docs/cost-model.md.

    python bench/cost_model.py --data DIR                 # needs matplotlib: pip install .[bench]

`--data` as for `bench/fit_device.py`. Products are predicted by a fit that has not seen the model;
whole iterations by the shipped profiles, whose fit saw neither those models nor any iteration.
Takes about 10 seconds.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from commands import script
from cost_model_plots import plot_attention, plot_prefill, plot_tiles
from published.fit import fit_gemm
from published.measurements import (
    Iteration,
    LayerTimes,
    read_attention,
    read_iterations,
    read_layers,
)

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.kernels import Gemm, products
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.core.work import Work
from pipeserve.profiling.simulation.stage_times import ProfiledTimes

DOC = Path("docs/cost-model.md")
BEGIN, END = "<!-- begin: bench/cost_model.py -->", "<!-- end: bench/cost_model.py -->"
NUM_PROCESSORS = 108


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    layers, iterations = read_layers(args.data), known(read_iterations(args.data))
    left_out = {times.shape.name: without(layers, times) for times in layers}
    shown = next(times for times in layers if times.shape.name == "Llama-2-70b-hf")
    plot_tiles(shown, left_out[shown.shape.name])
    plot_attention(read_attention(args.data))
    plot_prefill(iterations, [predicted_s(iteration) for iteration in iterations])
    sections = [
        layer_table(layers, left_out),
        step_table(shown, left_out[shown.shape.name]),
        iteration_table(iterations),
        falcon_table(),
        learning_table(),
    ]
    before, _, rest = DOC.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOC.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(sections) + f"\n\n{END}{after}")
    print("\n\n".join(sections))


# ---- layers of a model that the fit has not seen ------------------------------------------------


def without(layers: Sequence[LayerTimes], left_out: LayerTimes) -> Gemm:
    return fit_gemm([times for times in layers if times is not left_out], NUM_PROCESSORS)


def layer_sums(times: LayerTimes, gemm: Gemm, size: int) -> tuple[np.ndarray, ...]:
    """Tokens, and seconds of a layer's four products, measured and predicted, at one TP size."""
    chosen = times.tensor_parallel_size == size
    tokens, first = np.unique(times.num_tokens[chosen], return_index=True)
    measured = sum(times.products[name][chosen][first] for name in times.products)
    predicted = sum(
        gemm.seconds(tokens, columns, inner)
        for _, columns, inner in products(times.shape.shard(size))
    )
    return tokens, measured, predicted


def layer_table(layers: Sequence[LayerTimes], left_out: dict[str, Gemm]) -> str:
    rows, gated = [], []
    for times in layers:
        gemm, name = left_out[times.shape.name], times.shape.name
        by_size = []
        for size in np.unique(times.tensor_parallel_size):
            _, measured, predicted = layer_sums(times, gemm, int(size))
            by_size.append(np.abs(predicted / measured - 1))
        errors = np.concatenate(by_size)
        if times.shape.gated_mlp:
            gated.append(errors)
        medians = [f"{np.median(part):.1%}" for part in by_size] + [""] * (4 - len(by_size))
        rows.append([name, *both(errors), *medians])
    whole = np.concatenate(gated)
    rows.append(["**the five gated models**", *both(whole), "", "", "", ""])
    return table(
        "Sum of a layer's four products, each model predicted from the other five: median and P90 "
        "of the absolute error, and the median at each TP size.",
        ["model left out", "median", "P90", "TP1", "TP2", "TP4", "TP8"],
        rows,
    )


def step_table(times: LayerTimes, gemm: Gemm) -> str:
    rows = []
    for size in (1, 4):
        tokens, measured, predicted = layer_sums(times, gemm, size)
        for below in (128, 256, 384, 512, 640, 768):
            at, after = np.searchsorted(tokens, [below, below + 8])
            steps = [seconds[after] / seconds[at] - 1 for seconds in (measured, predicted)]
            rows.append([f"TP{size}", f"{below} to {below + 8}", *(f"+{s:.0%}" for s in steps)])
    return table(
        f"The tile step: what 8 tokens more cost {times.shape.name}, which the fit has not seen.",
        ["", "tokens", "measured", "predicted"],
        rows,
    )


# ---- whole iterations ---------------------------------------------------------------------------


def predicted_s(iteration: Iteration) -> float:
    """Device time of all layers and the head on one tensor-parallel group."""
    profile = "nc96ads-a100-v4" if iteration.source.startswith("Sarathi") else "a100-80gb-dgx"
    shape, tokens = load_shape(iteration.model), iteration.num_prefill_tokens
    plan, size = split_layers(shape.num_layers, 1), iteration.tensor_parallel_size
    work = Work(
        num_tokens=tokens + iteration.num_decodes,
        num_logits=iteration.num_decodes or 1,
        prefills=((0, tokens),) if tokens else (),
        num_decodes=iteration.num_decodes,
        context=iteration.context,
    )
    return PipelineCost(load_profile(profile), shape, plan, size).seconds(work)[0]


def known(iterations: Iterable[Iteration]) -> list[Iteration]:
    """Those with an all-reduce that was measured: not TP3."""
    return [iteration for iteration in iterations if iteration.tensor_parallel_size != 3]


def regime(iteration: Iteration) -> str:
    if not iteration.num_prefill_tokens:
        return "decode"
    return "prefill >= 512" if iteration.num_prefill_tokens >= 512 else "prefill < 512"


def iteration_table(iterations: Sequence[Iteration]) -> str:
    def row(name: str, chosen: Sequence[Iteration], source: str, model: str) -> list[str]:
        errors = np.array([predicted_s(i) / i.seconds - 1 for i in chosen])
        bias = f"{np.median(errors):+.1%}"
        return [name, source, model, str(len(chosen)), *both(np.abs(errors)), bias]

    rows = []
    for name in ("prefill >= 512", "prefill < 512", "decode"):
        chosen = [iteration for iteration in iterations if regime(iteration) == name]
        for where in dict.fromkeys((i.source, i.model) for i in chosen):
            rows.append(row(name, [i for i in chosen if (i.source, i.model) == where], *where))
        rows.append(row(f"**{name}**", chosen, "all", ""))
    return table(
        "Whole iterations, predicted (device time) against measured (with the engine's host time): "
        "absolute error, and bias of predicted over measured.",
        ["regime", "source", "model", "n", "median", "P90", "bias"],
        rows,
    )


# ---- Falcon-180B, which nobody measured ---------------------------------------------------------


def falcon_table() -> str:
    works = {
        "32 decodes, context 2k": Work(32, 32, (), 32, 32 * 2048),
        "128 decodes, context 2k": Work(128, 128, (), 128, 128 * 2048),
        "480 of a prompt after 1,536, 32 decodes": Work(512, 32, ((1536, 480),), 32, 32 * 2048),
        "512 of a prompt after 3,584, 32 decodes": Work(544, 32, ((3584, 512),), 32, 32 * 2048),
        "prefill of 512": Work(512, 1, ((0, 512),), 0, 0),
        "prefill of 2,048": Work(2048, 1, ((0, 2048),), 0, 0),
        "prefill of 4,096": Work(4096, 1, ((0, 4096),), 0, 0),
    }
    shape = load_shape("falcon-180b")
    setups = [("nc96ads-a100-v4", 4, 2), ("a100-80gb-dgx", 4, 2), ("a100-80gb-dgx", 1, 8)]
    costs = [
        PipelineCost(load_profile(name), shape, split_layers(shape.num_layers, num_stages), size)
        for name, size, num_stages in setups
    ]
    rows = []
    for name, work in works.items():
        parts = [(cost.seconds(work)[0] * 1e3, cost.breakdown(work)[0]) for cost in costs]
        cells = [
            f"{ms:.1f} ({(t.attention_prefill + t.attention_decode) * 1e3:.1f})" for ms, t in parts
        ]
        rows.append([name, *cells])
    return table(
        "Falcon-180B, ms on the first stage, attention in brackets. Extrapolated: see below.",
        ["microbatch", "TP4 x PP2, NC96ads", "TP4 x PP2, DGX", "TP1 x PP8, DGX"],
        rows,
    )


def learning_table() -> str:
    """Mixed microbatches, each predicted, run on simulated stages, and observed."""
    shape, profile = load_shape("falcon-180b"), load_profile("nc96ads-a100-v4")
    plan, errors = split_layers(shape.num_layers, 2), {"not corrected": [], "corrected": []}
    for seed in range(12):
        times = ProfiledTimes(profile, shape, plan, 4, seed)
        fixed, learning = (PipelineCost(profile, shape, plan, 4) for _ in range(2))
        rng = np.random.default_rng(seed)
        for index in range(1500):
            microbatch = mixed_microbatch(index, rng)
            seconds = times.compute_s(microbatch)
            costs = {"not corrected": fixed, "corrected": learning}
            for name, cost in costs.items():
                predicted = cost.predict(microbatch).seconds
                if index >= 500:
                    errors[name] += [
                        abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True)
                    ]
            for stage, observed in enumerate(seconds):
                learning.observe(index, stage, observed)
    return table(
        "Falcon-180B, TP4 x PP2, on simulated stages: absolute error after 500 microbatches of "
        "mixed sizes, 12 seeds. A run's own jitter has a median of "
        f"{0.6745 * profile.residuals.jitter:.1%}.",
        ["prediction", "median", "P90"],
        [[name, *both(np.array(found))] for name, found in errors.items()],
    )


def mixed_microbatch(index: int, rng: np.random.Generator) -> Microbatch:
    """8 to 64 decodes, seven times in ten beside a prefill chunk."""
    starts = [int(start) for start in rng.integers(100, 6000, rng.integers(8, 64))]
    chunks = [Chunk(RequestId(n), start, start + 1, (), None, 1) for n, start in enumerate(starts)]
    if rng.random() < 0.7:
        start, length = int(rng.integers(0, 3000)), int(rng.integers(16, 1500))
        chunks.append(Chunk(RequestId(len(chunks)), start, start + length, ()))
    return Microbatch(index, tuple(chunks))


# ---- writing ------------------------------------------------------------------------------------


def both(errors: np.ndarray) -> tuple[str, str]:
    return f"{np.median(errors):.1%}", f"{np.quantile(errors, 0.9):.1%}"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    script(main)
