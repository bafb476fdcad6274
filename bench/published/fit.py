"""Fits the formulae of a device profile to measurements.

Every formula is the one of `core/cost/kernels.py` and `core/cost/device.py`, evaluated on arrays.
All parameters are positive; they are found on a logarithmic scale, for the least mean absolute
error of log(measured / predicted), so that a decode's microseconds count as much as a prefill's
milliseconds, and outliers little.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pipeserve.core.cost.device import AllReduce, Link
from pipeserve.core.cost.kernels import (
    AttentionCost,
    Elementwise,
    Gemm,
    elementwise_bytes,
    products,
)
from published.measurements import (
    Array,
    AttentionTimes,
    LayerTimes,
    MessageTimes,
)


def least_error(
    predict: Callable[[Array], Array], start: Sequence[float], measured: Array
) -> Array:
    """Positive parameters with the least mean |log(measured / predict(parameters))|.

    Levenberg-Marquardt on the logarithms of the parameters, with the weights of iteratively
    reweighted least squares for the absolute error (Lawson 1961; Holland and Welsch 1977).
    """
    logs = np.log(np.asarray(start, dtype=float))
    target = np.log(measured)

    def errors(logs: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.nan_to_num(target - np.log(predict(np.exp(logs))), nan=1e3, posinf=1e3)

    error, damping, step = errors(logs), 1e-2, 1e-4
    for _ in range(100):
        slopes = [(errors(logs + step * axis) - error) / step for axis in np.eye(len(logs))]
        jacobian = np.stack(slopes, axis=1)
        weights = 1 / np.maximum(np.abs(error), 0.02)
        curvature = jacobian.T @ (weights[:, None] * jacobian)
        gradient = jacobian.T @ (weights * error)
        for _ in range(10):
            damped = curvature + damping * np.diag(np.diag(curvature) + 1e-9)
            moved = logs - np.clip(np.linalg.solve(damped, gradient), -1, 1)
            trial = errors(moved)
            if np.abs(trial).mean() < np.abs(error).mean() - 1e-7:
                logs, error, damping = moved, trial, damping / 3
                break
            damping *= 4
        else:
            break
    return np.exp(logs)


def product_columns(layers: Sequence[LayerTimes]) -> tuple[Array, Array, Array, Array]:
    """Rows, columns, inner dimension and seconds of every product measured."""
    found = []
    for times in layers:
        for size in np.unique(times.tensor_parallel_size):
            chosen = times.tensor_parallel_size == size
            tokens = times.num_tokens[chosen]
            for name, columns, inner in products(times.shape.shard(int(size))):
                full = np.full_like(tokens, 1)
                seconds = times.products[name][chosen]
                found.append((tokens, full * columns, full * inner, seconds))
    rows, columns, inner, seconds = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, columns, inner, seconds


def fit_gemm(layers: Sequence[LayerTimes], num_processors: int) -> Gemm:
    """Of a GPU with so many multiprocessors.

    Tried on models left out, where a layer's products are off by 3.04 % (median): without the ramp
    3.2 %; the best of two to four tile shapes 3.2 to 3.4 %; tiles of 256 rows for more than 256, an
    efficiency that grows with the waves, smaller tiles where there are few: no better.
    """
    *sizes, seconds = product_columns(layers)
    names = ("flops_per_s", "bytes_per_s", "overhead_s", "norm", "wave_share", "ramp")
    start = (2.3e14, 1.6e12, 5e-6, 2.8, 0.1, 80.0)

    def model(values: Sequence[float]) -> Gemm:
        named = dict(zip(names, map(float, values), strict=True))
        return Gemm(**named, num_processors=num_processors)

    return model(least_error(lambda values: model(values).seconds(*sizes), start, seconds))


def fit_elementwise(layers: Sequence[LayerTimes], name: str) -> Elementwise:
    """Of one of the operations of `elementwise_bytes`."""
    moved, seconds = [], []
    for times in layers:
        for size in np.unique(times.tensor_parallel_size):
            chosen = (times.tensor_parallel_size == size) & (times.elementwise[name] > 0)
            tokens = times.num_tokens[chosen]
            moved.append(elementwise_bytes(times.shape.shard(int(size)), tokens)[name])
            seconds.append(times.elementwise[name][chosen])
    sizes = np.concatenate(moved)

    def model(values: Sequence[float]) -> Elementwise:
        return Elementwise(overhead_s=float(values[0]), bytes_per_s=float(values[1]))

    measured = np.concatenate(seconds)
    return model(least_error(lambda values: model(values).seconds(sizes), (2e-6, 1e12), measured))


_PREFILL = (
    "prefill_overhead_s",
    "prefill_values_per_s",
    "prefix_flops_per_s",
    "causal_flops_per_s",
)
_DECODE = ("decode_overhead_s", "decode_sequence_s", "decode_bytes_per_s")
_ATTENTION_START = AttentionCost(
    prefill_overhead_s=1.5e-5,
    prefill_values_per_s=5e10,
    prefix_flops_per_s=1.5e14,
    causal_flops_per_s=7e13,
    query_tile=128,
    decode_overhead_s=1.5e-5,
    decode_sequence_s=1e-8,
    decode_bytes_per_s=1.6e12,
)


def fit_attention(times: AttentionTimes, prefill: Array, decode: Array) -> AttentionCost:
    """On the rows of each that the two masks choose."""
    shard = times.shape.shard(times.tensor_parallel_size)

    def fitted(names: tuple[str, ...], predict: Callable[[AttentionCost], Array], seconds: Array):
        def model(values: Sequence[float]) -> AttentionCost:
            return replace(_ATTENTION_START, **dict(zip(names, map(float, values), strict=True)))

        start = [getattr(_ATTENTION_START, name) for name in names]
        values = least_error(lambda values: predict(model(values)), start, seconds)
        return dict(zip(names, map(float, values), strict=True))

    chunks = times.start[prefill], times.num_tokens[prefill]
    batches = times.num_decodes[decode], times.context[decode]
    return replace(
        _ATTENTION_START,
        **fitted(_PREFILL, lambda a: a.prefill_s(shard, *chunks), times.prefill_s[prefill]),
        **fitted(_DECODE, lambda a: a.decode_s(shard, *batches), times.decode_s[decode]),
    )


def smaller_sizes(times: AttentionTimes) -> tuple[Array, Array]:
    """Masks of the prefill and decode rows to predict the larger ones from: chunks to 1,024 after
    at most 2,048 positions, and batches to 48 of at most 2,048 each."""
    prefill = (times.num_tokens <= 1024) & (times.start <= 2048)
    return prefill, (times.num_decodes <= 48) & (times.context <= 2049 * times.num_decodes)


def fit_link(times: MessageTimes) -> Link:
    """Latency and bandwidth."""

    def model(values: Sequence[float]) -> Link:
        return Link(alpha_s=float(values[0]), bytes_per_s=float(values[1]))

    sizes, measured = times.num_bytes, times.seconds
    return model(least_error(lambda values: model(values).seconds(sizes), (2e-5, 1e10), measured))


def make_all_reduce(group: int, nodes: int, times: MessageTimes, per_octave: int = 2) -> AllReduce:
    """A table of medians over windows that are even on a logarithmic scale: below 1 MB, where the
    measurements jump between algorithms, no formula fits. Made not to fall with the size."""
    octaves = np.log2(times.num_bytes)
    count = round(per_octave * (octaves[-1] - octaves[0]))
    window = np.digitize(octaves, np.linspace(octaves[0], octaves[-1], count + 1)[1:-1])
    windows = [window == index for index in np.unique(window)]
    sizes = [int(2 ** octaves[inside].mean()) for inside in windows]
    logs = rising([float(np.log(np.median(times.seconds[inside]))) for inside in windows])
    points = zip(sizes, map(float, np.exp(logs)), strict=True)
    return AllReduce(group=group, nodes=nodes, points=tuple(points))


def ring_link(tables: Sequence[AllReduce]) -> Link:
    """What a ring would have to have to take as long as the widest group inside a node: the
    shortest message's time, and the longest one's bandwidth."""
    widest = max((table for table in tables if table.nodes == 1), key=lambda table: table.group)
    (_, alpha_s), (num_bytes, seconds) = widest.points[0], widest.points[-1]
    sent = 2 * (widest.group - 1) / widest.group * num_bytes
    return Link(alpha_s=alpha_s, bytes_per_s=sent / (seconds - alpha_s))


def rising(values: Sequence[float]) -> list[float]:
    """The non-decreasing series with the least squared error: pool adjacent violators (Ayer et al.
    1955). Does not modify `values`."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, m), (high, n) = pools.pop(), pools.pop()
            pools.append(((low * m + high * n) / (m + n), m + n))
    return [mean for mean, count in pools for _ in range(count)]


def log_errors(measured: Array, predicted: Array) -> Array:
    """log(measured / predicted): 0.1 is 10 % slower than predicted."""
    return np.log(measured / predicted)
