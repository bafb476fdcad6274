"""What the time of a microbatch on a stage was spent on, by the run's own measurements.

A stage's layers take `theta_s . x(k)` for a microbatch with counts x(k): prefill tokens, pairs of
positions in prefill attention, decodes, positions that the decodes read, and 1. theta is fitted to
the recording, so no device profile is needed and a slow device is its own. Of microbatch k on stage
s, with the mean stage's theta:

    theta . x(k)            by count: prefill, decodes, their context, and the base that each has
    (theta_s - theta).x(k)  the stage is not the mean one: imbalance
    end - head              vocabulary head and sampling, measured; by itself where the first
                            stage has it between two microbatches (`Headed`)
    all-reduces, rank wait  of the ranks of a stage with each other, measured
    wall - thread CPU       the stage's core was taken: jitter, off layers and head alike
    the rest                jitter

What the linear form misses at a number of tokens on all stages alike (tile steps, the library's
choice of kernels) is part of the first line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan

import numpy as np

from pipeserve.core.records import Headed, Planned, Span
from pipeserve.core.work import Work, work_of
from pipeserve.profiling.recording.recording import Recording

BASE, PREFILL, DECODES, CONTEXT, IMBALANCE, HEAD, ALL_REDUCE, RANK_WAIT, JITTER = range(9)
NUM_PARTS = 9

_TILE = 16  # tokens of a size class
_OUTLIER = 3.0  # scaled median absolute deviations
_NEVER_OUTLIER = 0.2  # of the time: the form is only linear
_MEASURED = (0.0,) * (NUM_PARTS - HEAD)
_LEAST_S = 1e-12  # what is shorter took no time: no clock tells it, and its inverse may be infinite


def counts_of(work: Work) -> tuple[float, float, float, float, float]:
    """x(k): 1, prefill tokens, attention pairs of prefills, decodes, context of decodes."""
    prefills = work.prefills
    return (
        1.0,
        sum([tokens for _, tokens in prefills]),
        sum([tokens * (start + 0.5 * tokens) for start, tokens in prefills]),
        work.num_decodes,
        work.context,
    )


@dataclass(frozen=True, slots=True)
class StepParts:
    """Fitted to one recording."""

    mean_theta: np.ndarray
    """Seconds per count, of the mean stage; shape (5,)."""
    factor_of: dict[tuple[int, bool], float]
    """Measured over linear, by size class."""
    stage_theta: np.ndarray
    """Shape (stages, 5)."""

    @classmethod
    def fit(cls, recording: Recording) -> "StepParts":
        """Takes what is there; a stage without spans is a mean one."""
        works = {planned.index: work_of(planned) for planned in recording.planned}
        counts = {index: counts_of(work) for index, work in works.items()}
        sizes = {index: _size_class(work) for index, work in works.items()}
        thetas, ratios = [], {}
        for spans in recording.spans:
            known = [span for span in spans if span.index in counts]
            if not known:
                thetas.append(None)
                continue
            design = np.array([counts[span.index] for span in known])
            measured = np.array([_layers_s(span) for span in known])
            theta = _fit(design, measured)
            thetas.append(theta)
            fitted = design @ theta
            fitted = np.where(fitted > _LEAST_S, fitted, measured)  # counts that no other step had
            over_fitted = np.ones_like(fitted)
            np.divide(measured, fitted, out=over_fitted, where=fitted > _LEAST_S)
            for span, ratio in zip(known, over_fitted.tolist(), strict=True):
                ratios.setdefault(sizes[span.index], []).append(ratio)
        found = [theta for theta in thetas if theta is not None]
        mean = np.mean(found, axis=0) if found else np.zeros(5)
        stages = np.array([mean if theta is None else theta for theta in thetas])
        factors = {size: float(np.median(values)) for size, values in ratios.items()}
        return cls(mean, factors, stages)

    def parts(self, work: Work) -> list[list[float]]:
        """Of a microbatch on each stage: seconds by part, of those that are not measured 0."""
        counts = np.array(counts_of(work))
        base, tokens, pairs, decodes, context = (self.mean_theta * counts).tolist()
        linear = base + tokens + pairs + decodes + context
        factor = self.factor_of.get(_size_class(work), 1.0)
        prefill, missed = tokens + pairs, (factor - 1.0) * linear
        if work.prefills:
            prefill += missed
        else:
            decodes += missed
        totals = (factor * (self.stage_theta @ counts)).tolist()
        return [
            [base, prefill, decodes, context, total - factor * linear, *_MEASURED]
            for total in totals
        ]


def measured_parts(predicted: Sequence[float], span: Span) -> list[float]:
    """`predicted` (one of `parts`) with what is measured: sums to the span's time."""
    parts = list(predicted)
    parts[HEAD] = head = (span.end_s - span.head_s) * own_share(span)
    parts[ALL_REDUCE], parts[RANK_WAIT] = span.all_reduce_s, span.rank_wait_s
    rest = span.end_s - span.start_s - head - sum(predicted)
    parts[JITTER] = rest - span.all_reduce_s - span.rank_wait_s
    return parts


def head_parts(head: Headed) -> list[float]:
    """Of one at the first stage: sums to its time."""
    seconds, parts = head.end_s - head.start_s, [0.0] * NUM_PARTS
    own = 1.0 if isnan(head.cpu_s) or seconds <= 0 else min(max(head.cpu_s / seconds, 0.0), 1.0)
    parts[HEAD], parts[JITTER] = own * seconds, (1.0 - own) * seconds
    return parts


def own_share(span: Span) -> float:
    """Of its time, but for what the stage's ranks did together, what it had its core for. Where in
    the span others took it, nobody knows: so layers and head lose alike."""
    seconds = span.end_s - span.start_s - span.all_reduce_s - span.rank_wait_s
    if isnan(span.cpu_s) or seconds <= 0:
        return 1.0
    return min(max(span.cpu_s / seconds, 0.0), 1.0)


def _layers_s(span: Span) -> float:
    """The layers' own time: what others took of the core is not theirs, nor are the ranks' sums."""
    return (span.head_s - span.start_s - span.all_reduce_s - span.rank_wait_s) * own_share(span)


def _size_class(work: Work) -> tuple[int, bool]:
    return -(-work.num_tokens // _TILE), bool(work.prefills)


def _fit(design: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Non-negative least squares of relative errors, again without the outliers; of the steps that
    took any time."""
    some = measured > _LEAST_S
    if not some.any():
        return np.zeros(design.shape[1])
    rows = design[some] / measured[some, None]
    theta = _nnls(rows)
    errors = np.abs(rows @ theta - 1.0)
    kept = errors <= max(_OUTLIER * 1.4826 * float(np.median(errors)), _NEVER_OUTLIER)
    return _nnls(rows[kept])


def _nnls(rows: np.ndarray) -> np.ndarray:
    """theta >= 0 that brings `rows @ theta` nearest to 1: the best of what least squares gives for
    each of the 31 choices of columns."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    rows = rows / scale
    gram, target = rows.T @ rows, rows.sum(axis=0)
    best, best_gain = np.zeros(rows.shape[1]), 0.0
    for size in range(1, rows.shape[1] + 1):
        for columns in map(list, combinations(range(rows.shape[1]), size)):
            theta = np.linalg.lstsq(gram[np.ix_(columns, columns)], target[columns], rcond=1e-10)[0]
            gain = target[columns] @ theta  # what it takes off the sum of squares
            if (theta >= 0).all() and gain > best_gain * (1 + 1e-12):
                best = np.zeros(rows.shape[1])
                best[columns], best_gain = theta, gain
    return best / scale


def has_prefill(planned: Planned | None) -> bool:
    """Whether a microbatch runs a chunk of more than one position."""
    return planned is not None and any(c.stop - c.start > 1 for c in planned.chunks)
