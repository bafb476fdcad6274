"""How long a recorded run's stages, links and driver take: a simulation's truth without a profile.

A stage's layers are fitted over the run as

    factor of the stage x its layers x theta . counts(k)

theta is one layer's, so that layers can be moved; the factor is what the stage's device is slower
or faster than the others, and stays with it. (What each stage takes whatever its layers cannot be
told from either where stages are alike, and is left out.) What is left over is kept as ratios,
microbatch by microbatch, in classes of like size: their medians are what the form misses (tile
steps, the library's choice of kernels), their spread is the jitter. A replayed microbatch draws one
row of ratios from its class, of all stages together.

Head, links, messages and planning are what they took where somebody waited for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul

import numpy as np

from pipeserve.core.nouns import Microbatch
from pipeserve.core.records import Span
from pipeserve.core.work import Work, work_of
from pipeserve.errors import ConfigError
from pipeserve.profiling.advice.recorded_delays import Delays, delays_of
from pipeserve.profiling.calibration.fit_tables import solve_relative
from pipeserve.profiling.ledger.step_parts import counts_of, own_share
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.simulation.stage_times import StageTimes

_LEAST_ROWS = 8
"""Microbatches that a size class needs to be drawn from; else the nearest that has them answers."""
_MOST_FITTED = 1500
_ROUNDS = 5
_DRAWS = 8191
_TILE = 32

COUNTS = ("base", "prefill tokens", "prefill attention", "decodes", "context")
"""What theta is the cost of, in the order of `step_parts.counts_of`."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a recording says of times, in seconds."""

    num_layers: tuple[int, ...]
    """Of each stage, in the recorded run."""
    theta: tuple[float, ...]
    """Of one layer, for each of `COUNTS`."""
    factors: tuple[float, ...]
    """Of each stage's device; their median is 1."""
    head: tuple[float, float]
    """Of a microbatch that has logits, and of each."""
    mean_counts: tuple[float, ...]
    """`COUNTS` of a microbatch of the run."""
    mean_logits: float
    ratios: dict[tuple[int, bool], np.ndarray]
    """Measured over fitted, by size class: a row for each microbatch, of the stages' layers and,
    last, the head."""
    delays: Delays
    summed: tuple[float, ...]
    """Of each stage, the share of its layers' time that its ranks took to add up; and, below, that
    the first one waited for a slower one."""
    waited: tuple[float, ...]

    shares_head: bool = False
    """Both ends of the pipeline took turns with it."""

    @property
    def num_stages(self) -> int:
        return len(self.num_layers)

    @property
    def head_shares(self) -> list[float]:
        """What share of the heads each stage has."""
        shares = [0.0] * (self.num_stages - 1) + [1.0]
        if self.shares_head:
            shares[0] = shares[-1] = 0.5
        return shares

    def layer_s(self, counts: Sequence[float]) -> float:
        """Of one layer."""
        return sum(map(mul, self.theta, counts))

    def head_s(self, num_logits: float) -> float:
        return self.head[0] + self.head[1] * num_logits if num_logits else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tweak:
    """What is changed of the recorded times. The default changes nothing."""

    speed: dict[int, float] = field(default_factory=dict)
    """Stage -> how many times as fast it computes."""
    link: float = 1.0
    """Share of the links' time that is left; the others likewise."""
    feedback: float = 1.0
    control: float = 1.0
    planning: float = 1.0
    head: float = 1.0
    all_reduce: float = 1.0
    rank_wait: float = 1.0
    equal_stages: bool = False
    """Every stage takes the mean stage's time, the head apart."""
    jitter: bool = True
    even: frozenset[int] = frozenset()
    """Places in `COUNTS` of which every microbatch has what the mean one has."""


class RecordedTimes(StageTimes):
    """Times of microbatches on the recorded pipeline, with layers moved or a `Tweak`.

    Deterministic: what is drawn follows from the seed and a microbatch's index and size.
    """

    def __init__(
        self, fitted: Fitted, num_layers: Sequence[int], tweak: Tweak | None = None, seed: int = 0
    ) -> None:
        self._fitted, self._tweak, self._layers = fitted, tweak or Tweak(), tuple(num_layers)
        delays = fitted.delays
        self.control_s = delays.control_s * self._tweak.control
        self.feedback_s = delays.feedback_s * self._tweak.feedback
        self.planning_s = delays.planning_s * self._tweak.planning
        self.latency_s = [self._tweak.link * alpha for alpha, _ in delays.hops]
        self.own_s = delays.own_s if self._tweak.control else (0.0,) * fitted.num_stages
        """Of a stage between microbatches: in `compute_s`, though it is no compute."""
        self._kept = [
            1 - (1 - self._tweak.all_reduce) * summed - (1 - self._tweak.rank_wait) * waited
            for summed, waited in zip(fitted.summed, fitted.waited, strict=True)
        ]
        """Share of each stage's layers' time that is left of it."""
        self._draws = np.random.default_rng(seed).integers(1 << 30, size=_DRAWS).tolist()
        self._rows: dict[tuple[int, bool], list[list[float]]] = {}
        self._last: tuple[Microbatch | None, list[float]] = None, []

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        """Of each stage, with what it does between microbatches; the head in the last one's, unless
        the first stage has it, which is apart."""
        *layers, head = self._seconds(microbatch)
        found = [seconds + own for seconds, own in zip(layers, self.own_s, strict=True)]
        if not microbatch.head_at_first:
            found[-1] += head
        return found

    def head_s(self, microbatch: Microbatch) -> float:
        return self._seconds(microbatch)[-1]

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        num_tokens, share = microbatch.num_tokens, self._tweak.link
        return [share * (alpha + beta * num_tokens) for alpha, beta in self._fitted.delays.hops]

    def _seconds(self, microbatch: Microbatch) -> list[float]:
        """Of each stage's layers, and of the head."""
        if microbatch is not self._last[0]:
            self._last = microbatch, self._computed(microbatch)
        return self._last[1]

    def _computed(self, microbatch: Microbatch) -> list[float]:
        fitted, tweak = self._fitted, self._tweak
        work = work_of(microbatch)
        row = self._row(work, microbatch.index)
        head_at_first = microbatch.head_at_first
        counts = counts_of(work)
        if tweak.even:
            pairs = enumerate(zip(counts, fitted.mean_counts, strict=True))
            counts = [mean if place in tweak.even else own for place, (own, mean) in pairs]
        layer = fitted.layer_s(counts)
        stages = [
            factor * ratio * layers * layer * kept
            for layers, factor, kept, ratio in zip(
                self._layers, fitted.factors, self._kept, row, strict=False
            )
        ]
        if tweak.equal_stages:
            stages = [sum(stages) / len(stages)] * len(stages)
        head = tweak.head * row[-1] * fitted.head_s(work.num_logits)
        for stage, speed in tweak.speed.items():
            stages[stage] /= speed
            if stage == (0 if head_at_first else len(stages) - 1):
                head /= speed
        return [*stages, head]

    def _row(self, work: Work, index: int) -> list[float]:
        """One microbatch's ratios, drawn; the class's medians where there is to be no jitter."""
        size = size_class(work)
        rows = self._rows.get(size)
        if rows is None:
            ratios = nearest(self._fitted.ratios, size)
            if not self._tweak.jitter:
                ratios = np.median(ratios, axis=0, keepdims=True)
            rows = self._rows[size] = ratios.tolist()
        return rows[self._draws[index % _DRAWS] % len(rows)]


def fit(recording: Recording, num_layers: Sequence[int]) -> Fitted:
    """From the microbatches that every stage recorded; its spans are on the driver's clock.

    Raises ConfigError where there are too few of them.
    """
    works = {planned.index: work_of(planned) for planned in recording.planned}
    by_stage = [{span.index: span for span in spans} for spans in recording.spans]
    indices = sorted(set(works).intersection(*by_stage))
    if len(indices) < _LEAST_ROWS:
        raise ConfigError(
            f"the recording has {len(indices)} microbatches that every stage recorded; advice "
            f"takes {_LEAST_ROWS} at least: record a longer run"
        )
    spans = [[of_stage[index] for of_stage in by_stage] for index in indices]
    used = [works[index] for index in indices]
    seconds = np.array([[_layers_s(span) for span in row] for row in spans])
    apart_s = {head.index: head.end_s - head.start_s for head in recording.headed}
    heads = np.array([apart_s.get(r[-1].index, r[-1].end_s - r[-1].head_s) for r in spans])
    together = np.array([[(span.all_reduce_s, span.rank_wait_s) for span in row] for row in spans])
    summed, waited = (together.sum(axis=0).T / seconds.sum(axis=0)).tolist()
    logits = np.array([work.num_logits for work in used], dtype=float)
    scales = np.array(num_layers, dtype=float)
    undisturbed = np.array([[_undisturbed_s(span) for span in row] for row in spans])
    factors = _fit_factors(undisturbed, scales)
    of_layer = undisturbed[:, scales > 0] / (factors * scales)[scales > 0]
    theta = _fit_layer(used, np.median(of_layer, axis=1))
    head = _fit_head(logits, heads)
    counts = np.array([counts_of(work) for work in used])
    layers = np.outer(counts @ theta, factors * scales)
    expected = np.column_stack([layers, np.where(logits > 0, head[0] + head[1] * logits, 0.0)])
    ratios = _ratios(np.column_stack([seconds, heads]), expected)
    return Fitted(
        num_layers=tuple(num_layers),
        theta=tuple(theta.tolist()),
        factors=tuple(factors.tolist()),
        head=head,
        mean_counts=tuple(counts.mean(axis=0).tolist()),
        mean_logits=float(logits.mean()),
        ratios={size: ratios[places] for size, places in _by_class(used).items()},
        delays=delays_of(recording),
        summed=tuple(summed),
        waited=tuple(waited),
        shares_head=bool(recording.headed),
    )


def size_class(work: Work) -> tuple[int, bool]:
    """Octaves of tokens up to a tile, then tiles; with prefill or without."""
    tokens = work.num_tokens
    size = tokens.bit_length() if tokens <= _TILE else 5 + -(-tokens // _TILE)
    return size, bool(work.prefills)


def nearest(ratios: dict[tuple[int, bool], np.ndarray], size: tuple[int, bool]) -> np.ndarray:
    """Rows of the class, and where they are few of those next to it in size. Those with prefill
    and those without do not stand in for each other, unless there are no others."""
    alike = {key: rows for key, rows in ratios.items() if key[1] == size[1]} or ratios
    found = []
    for key in sorted(alike, key=lambda key: (abs(key[0] - size[0]), key)):
        found.append(alike[key])
        if sum(map(len, found)) >= _LEAST_ROWS:
            break
    return np.concatenate(found)


def _layers_s(span: Span) -> float:
    return max(span.head_s - span.start_s, 1e-9)


def _undisturbed_s(span: Span) -> float:
    """Without the time that others had the stage's core, which is no slow device but jitter."""
    return max(_layers_s(span) * own_share(span), 1e-9)


def _fit_factors(seconds: np.ndarray, num_layers: np.ndarray) -> np.ndarray:
    """Of each stage, from seconds [microbatches, stages]: what its layers take of a microbatch over
    what the median stage's do. 1 for a stage without layers."""
    with_layers = num_layers > 0
    by_layer = seconds[:, with_layers] / num_layers[with_layers]
    found = np.median(by_layer / np.median(by_layer, axis=1, keepdims=True), axis=0)
    factors = np.ones(len(num_layers))
    factors[with_layers] = found / np.median(found)
    return factors


def _fit_layer(works: Sequence[Work], seconds: np.ndarray) -> np.ndarray:
    """theta, of one layer's seconds in each microbatch.

    In turns with a factor for each size class, the median of what theta leaves (backfitting, as in
    `core.cost`): a step at some size is not put down to what happens to go with it.
    """
    step = -(-len(works) // _MOST_FITTED)
    works, seconds = works[::step], seconds[::step]
    counts = np.array([counts_of(work) for work in works])
    classes = [places for places in _by_class(works).values() if len(places) >= _LEAST_ROWS]
    by_size = np.ones(len(works))
    for _ in range(_ROUNDS):
        theta = solve_relative(counts * by_size[:, None], seconds)
        ratios = _ratios(seconds, counts @ theta)
        for places in classes:
            by_size[places] = np.median(ratios[places])
    return theta


def _fit_head(logits: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Of a microbatch with logits, and of each of them."""
    chosen = (logits > 0) & (seconds > 0)
    if not chosen.any():
        return 0.0, 0.0
    design = np.column_stack([np.ones(chosen.sum()), logits[chosen]])
    first, each = solve_relative(design, seconds[chosen])
    return float(first), float(each)


def _ratios(measured: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """1 where nothing is expected."""
    return np.divide(measured, expected, out=np.ones_like(measured), where=expected > 1e-9)


def _by_class(works: Sequence[Work]) -> dict[tuple[int, bool], list[int]]:
    """Size class -> places of its microbatches."""
    classes: dict[tuple[int, bool], list[int]] = {}
    for place, work in enumerate(works):
        classes.setdefault(size_class(work), []).append(place)
    return classes
