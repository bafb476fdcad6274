"""The plots of docs/cost-model.md; `bench/cost_model.py` runs them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from published.fit import fit_attention, smaller_sizes
from published.measurements import AttentionTimes, Iteration, LayerTimes

from pipeserve.core.cost.kernels import Gemm, products

PLOTS = Path("docs/cost-model")
BLUE, ORANGE, GREY = "#1f6fb4", "#d95f0e", "#777777"


def plot_tiles(times: LayerTimes, gemm: Gemm) -> None:
    """A layer's products over tokens; `gemm` has not seen the model."""
    figure, axes = subplots(1, 2, (11, 4))
    for axis, size in zip(axes, (1, 4), strict=True):
        shown = (times.tensor_parallel_size == size) & (times.num_tokens <= 1024)
        measured = sum(seconds[shown] for seconds in times.products.values())
        axis.plot(times.num_tokens[shown], measured * 1e3, ".", color=BLUE, label="measured")
        every = np.arange(1, 1025)
        predicted = sum(gemm.seconds(every, n, k) for _, n, k in products(times.shape.shard(size)))
        axis.plot(every, predicted * 1e3, color=ORANGE, linewidth=1.3, label="predicted")
        axis.set_xticks(range(0, 1025, 128))
        axis.set(
            xlabel="tokens", ylabel="ms", title=f"{times.shape.name} left out of the fit, TP{size}"
        )
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left")
    figure.suptitle("A layer's four matrix products on an A100")
    save(figure, "tiles.png")


def plot_attention(times: AttentionTimes) -> None:
    """Measured, and predicted from the smaller sizes alone."""
    fitted = fit_attention(times, *smaller_sizes(times))
    shard = times.shape.shard(times.tensor_parallel_size)
    figure, (left, right) = subplots(1, 2, (11, 4))
    for start, shade in ((0, "#7fb3d9"), (1024, BLUE), (2048, "#08306b")):
        chosen = times.start == start
        order = np.argsort(times.num_tokens[chosen])
        tokens = times.num_tokens[chosen][order]
        measured = times.prefill_s[chosen][order]
        left.plot(tokens, measured * 1e3, ".", color=shade, label=f"measured, after {start:,}")
        predicted = fitted.prefill_s(shard, start, tokens) * 1e3
        left.plot(tokens, predicted, color=ORANGE, linewidth=1)
    left.set(xlabel="tokens of the chunk", ylabel="ms", title="Prefill chunk after a prefix")
    left.axvline(1024, color=GREY, linestyle=":")
    for batch, shade in ((16, "#7fb3d9"), (64, BLUE), (128, "#08306b")):
        chosen = times.num_decodes == batch
        order = np.argsort(times.context[chosen])
        context = times.context[chosen][order]
        measured = times.decode_s[chosen][order]
        right.plot(context / batch, measured * 1e3, ".", color=shade, label=f"measured, {batch}")
        right.plot(context / batch, fitted.decode_s(shard, batch, context) * 1e3, color=ORANGE)
    right.set(xlabel="context of each", ylabel="ms", title="Batch of decodes")
    right.axvline(2048, color=GREY, linestyle=":")
    for axis in (left, right):
        axis.plot([], [], color=ORANGE, label="predicted from sizes left of the line")
        axis.legend(loc="upper left", fontsize=9, framealpha=1)
        axis.set_ylim(bottom=0)
    figure.suptitle("Attention of one layer: 32 query heads, 4 KV heads, head_dim 128")
    save(figure, "attention.png")


def plot_prefill(iterations: Sequence[Iteration], predicted_s: Sequence[float]) -> None:
    """Whole prefills, predicted against measured."""
    figure, axis = subplots(1, 1, (6.2, 5.4))
    styles = {"yi-34b": (BLUE, "o"), "opt-13b": (ORANGE, "s"), "opt-66b": ("#5b8c2a", "^")}
    for model, (colour, marker) in styles.items():
        pairs = zip(iterations, predicted_s, strict=True)
        chosen = [(i, s) for i, s in pairs if i.model == model and i.num_prefill_tokens]
        measured = [i.seconds * 1e3 for i, _ in chosen]
        predicted = [seconds * 1e3 for _, seconds in chosen]
        filled = [colour if i.num_prefill_tokens >= 512 else "none" for i, _ in chosen]
        axis.scatter(measured, predicted, c=filled, edgecolors=colour, marker=marker, label=model)
    ends = np.array([10, 6000])
    axis.plot(ends, ends, color=GREY, linewidth=1)
    axis.fill_between(ends, ends * 0.93, ends * 1.07, color=GREY, alpha=0.2, label="within 7 %")
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set(xlabel="measured, ms", ylabel="predicted, ms")
    axis.set_title("Whole prefills (hollow: fewer than 512 tokens)", fontsize=11)
    axis.legend(loc="upper left")
    save(figure, "prefill.png")


def pyplot():
    """Only a script that draws has it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("error: plots take matplotlib, which is not installed; pip install .[bench]")
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def subplots(rows: int, columns: int, inches: tuple[float, float]):
    plt = pyplot()
    with plt.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.25}):
        return plt.subplots(rows, columns, figsize=inches, layout="constrained")


def save(figure: Any, name: str) -> None:
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / name, dpi=100)
    pyplot().close(figure)
