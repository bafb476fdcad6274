"""A cost profile of one model on the machine at hand, from what its stages took.

A stage's seconds are linear in what is looked for: the value of each table at its points, and each
rate's inverse. So one least-squares problem finds them all, from microbatches of any mixture: no
operation is timed alone, and what is measured is what serving does. Weights are those of relative
errors, and observations that lie far off (a stage robbed of its core) are weighted down.

Source of the weighting: Huber's M-estimator by iteratively reweighted least squares (Huber and
Ronchetti, Robust Statistics, 2nd ed., section 7.8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeserve.core.cost.kernels import AttentionCost, Points, Tables
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.errors import ConfigError
from pipeserve.profiling.calibration.samples import Sample

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Points of the layer's table, as far as the samples reach."""
ROWS = (1, 8, 32, 128, 512)
"""Points of the head's."""
_HUBER = 0.05
"""Relative error from which an observation counts less than its square."""
_ROUNDS = 20
_LEAST_SEEN = 3
"""Observations that a point of a table needs around it."""
_NO_COST = 1e30
"""A rate so high that its term vanishes: what was not told apart from the layer's table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What calibration found."""

    tables: Tables
    attention: AttentionCost
    host_s: float
    median_error: float
    """Of held-out observations, the median of |predicted / observed - 1|."""
    jitter: float
    """Standard deviation of log(observed / predicted) of the middle of them (1.48 MAD)."""


def fit_tables(
    samples: Sequence[Sample],
    plan: PipelinePlan,
    shape: ModelShape,
    *,
    dtype: str,
    threads: int,
    tensor_parallel_size: int = 1,
) -> Fit:
    """Fits on half of the samples, drawn at random, and judges by the rest. Where several ranks
    share a stage, samples are of one of them, without the sums (`all_reduces.py`). Raises
    ConfigError for too few samples."""
    shape = shape.shard(tensor_parallel_size)
    columns = _Columns(samples, shape)
    if len(samples) < 4 * len(columns.names):
        raise ConfigError(
            f"{len(samples)} observations are too few to fit {len(columns.names)} numbers; "
            "calibrate with more requests"
        )
    design = columns.design(samples, plan)
    seconds = np.array([sample.seconds for sample in samples])
    seen, held_out = np.array_split(np.random.default_rng(0).permutation(len(samples)), 2)
    found = solve_relative(design[seen], seconds[seen])
    log_errors = np.log(seconds[held_out] / (design[held_out] @ found))
    centre = np.median(log_errors)
    return Fit(
        tables=columns.tables(found, shape.name, dtype, threads, tensor_parallel_size),
        attention=columns.attention(found),
        host_s=float(columns.value(found, "host")),
        median_error=float(np.median(np.abs(np.expm1(-log_errors)))),
        jitter=float(1.48 * np.median(np.abs(log_errors - centre))),
    )


class _Columns:
    """The columns of the design matrix, by name, and what a solution says of each part."""

    def __init__(self, samples: Sequence[Sample], shape: ModelShape) -> None:
        self._width = shape.num_heads * shape.head_dim
        self._kv_bytes = shape.kv_bytes_per_token_per_layer
        self.tokens = _seen_points(TOKENS, [sample.work.num_tokens for sample in samples])
        self.rows = _seen_points(ROWS, [sample.work.num_logits for sample in samples])
        self.names = [
            *(f"layer {size}" for size in self.tokens),
            *(f"head {size}" for size in self.rows),
            "embedding",
            "host",
            "chunk",
            "prefix",
            "causal",
            "decode",
            "context",
        ]

    def design(self, samples: Sequence[Sample], plan: PipelinePlan) -> np.ndarray:
        """[samples, unknowns]: the seconds that each unknown adds, where it is 1."""
        works = [sample.work for sample in samples]
        stages = [plan.stages[sample.stage] for sample in samples]
        layers = np.array([stage.num_layers for stage in stages])
        tokens = np.array([work.num_tokens for work in works])
        rows = np.array([work.num_logits for work in works])
        has_head = np.array([stage.has_head for stage in stages]) & (rows > 0)
        prefix = np.array([sum([start * size for start, size in w.prefills]) for w in works])
        causal = np.array([sum([size * size for _, size in w.prefills]) for w in works])
        by_layer = (
            np.array([len(work.prefills) for work in works]),
            4.0 * self._width * prefix,
            2.0 * self._width * causal,
            np.array([work.num_decodes for work in works]),
            self._kv_bytes * np.array([work.context for work in works]),
        )
        return np.column_stack(
            [
                layers[:, None] * _hat(self.tokens, tokens),
                has_head[:, None] * _hat(self.rows, rows),
                tokens * [stage.has_embedding for stage in stages],
                np.ones(len(samples)),
                *(layers * column for column in by_layer),
            ]
        )

    def value(self, found: np.ndarray, name: str) -> float:
        return float(found[self.names.index(name)])

    def tables(
        self, found: np.ndarray, model: str, dtype: str, threads: int, tensor_parallel_size: int
    ) -> Tables:
        def points(name: str, sizes: Sequence[int]) -> Points:
            return tuple((size, self.value(found, f"{name} {size}")) for size in sizes)

        per_token = self.value(found, "embedding")
        most = self.tokens[-1]
        return Tables(
            model=model,
            dtype=dtype,
            threads=threads,
            tensor_parallel_size=tensor_parallel_size,
            layer=points("layer", self.tokens),
            head=points("head", self.rows),
            embedding=((1, per_token), (most, most * per_token)),
        )

    def attention(self, found: np.ndarray) -> AttentionCost:
        def rate(name: str) -> float:
            seconds = self.value(found, name)
            return 1 / seconds if seconds > 0 else _NO_COST

        return AttentionCost(
            prefill_overhead_s=self.value(found, "chunk"),
            prefill_values_per_s=_NO_COST,
            prefix_flops_per_s=rate("prefix"),
            causal_flops_per_s=rate("causal"),
            query_tile=1,
            decode_overhead_s=0.0,
            decode_sequence_s=self.value(found, "decode"),
            decode_bytes_per_s=rate("context"),
        )


def solve_relative(design: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative weighted least squares of relative errors; far observations count less."""
    weights, found = np.ones(len(seconds)), np.zeros(design.shape[1])
    for _ in range(_ROUNDS):
        before = found
        found = _non_negative(design * (weights / seconds)[:, None], weights)
        if np.allclose(found, before, rtol=1e-4, atol=0):
            break
        errors = np.abs(design @ found / seconds - 1)
        weights = np.sqrt(np.minimum(1.0, _HUBER / np.maximum(errors, 1e-12)))
    return found


def _non_negative(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares without negative unknowns: those that come out negative are left at 0, the
    worst first, until none does."""
    scale = np.maximum(np.linalg.norm(design, axis=0), 1e-300)
    kept = list(np.flatnonzero(scale > 1e-300))
    found = np.zeros(design.shape[1])
    while kept:
        solution = np.linalg.lstsq(design[:, kept] / scale[kept], target, rcond=None)[0]
        if solution.min() >= 0:
            found[kept] = solution / scale[kept]
            break
        kept.pop(int(solution.argmin()))
    return found


def _seen_points(points: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Of `points` and the largest size, those that sizes were seen around: the rest would be
    fitted to nothing."""
    most = max(sizes)
    kept = [point for point in points if point < most] + [max(most, 1)]
    while len(kept) > 1:
        seen = _hat(kept, np.array(sizes)).sum(axis=0)
        if seen.min() >= _LEAST_SEEN:
            break
        kept.pop(int(seen.argmin()))
    return kept


def _hat(points: Sequence[int], sizes: np.ndarray) -> np.ndarray:
    """[sizes, points]: the share of each point in a value interpolated linearly at a size."""
    return np.column_stack([np.interp(sizes, points, unit) for unit in np.eye(len(points))])
