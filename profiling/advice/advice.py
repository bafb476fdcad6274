"""What to change of a recorded run: each change is tried on the run's own requests and times.

The requests are replayed through the same engine on virtual time, once as it was and then with one
change at a time. A replay without a change says how far the simulator is off on this run; gains are
between two replays, so that what it is off by cancels as far as it can.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.view import CostModel
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.profiling.advice.changes import Change, choices, wishes
from pipeserve.profiling.advice.recorded_times import Fitted, fit
from pipeserve.profiling.advice.replay import (
    Figures,
    RecordedLoad,
    Setting,
    load_of,
    recorded_figures,
    replay,
    setting_of,
)
from pipeserve.profiling.recording.recording import Recording

MOST_CHUNKS = 50_000
_SCREENING = (0,)
_JUDGING = (1, 2)
"""Seeds of the jitter: what looks best by one draw is judged by others."""
_LEAST_GAIN = 0.01
_LEAST_TBT_GAIN = 0.05
_MOST_TBT_LOSS = 1.0
"""A change that more than doubles P99 TBT is no advice, whatever it gives."""
_FAR = 2.0
"""Microbatches over so many times the largest recorded one: their times are guesses."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A change and what it would give."""

    change: Change
    tokens_gain: float
    """Share by which output tokens/s grow: 0.1 is 10 % more."""
    tbt_gain: float | None
    """Share by which P99 of the time between tokens grows: less is better."""
    output_tokens_per_s: float
    """The recorded figures with these gains."""
    tbt_p99_s: float | None
    is_far: bool = False
    """Whether it runs microbatches far larger than any that was recorded."""

    @property
    def rank(self) -> tuple[float, float]:
        """Most tokens/s first; where those are within a point, the shortest P99 TBT."""
        return -round(self.tokens_gain, 2), self.tbt_gain or 0.0

    @property
    def is_worthwhile(self) -> bool:
        if self.is_far or (self.tbt_gain or 0.0) > _MOST_TBT_LOSS:
            return False
        if self.tokens_gain >= _LEAST_GAIN:
            return True
        return self.tokens_gain > -_LEAST_GAIN and (self.tbt_gain or 0.0) <= -_LEAST_TBT_GAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What `advise` found."""

    recorded: Figures
    replayed: Figures
    """Without a change."""
    spread: float
    """Of replays without a change that draw other jitter: greatest over least tokens/s, less 1."""
    suggestions: tuple[Prediction, ...]
    """What a user can set, the best of each kind, ranked; only what is worth it."""
    tried: tuple[Prediction, ...]
    """All that a user can set, ranked by one draw of the jitter."""
    worths: tuple[Prediction, ...]
    """What nobody can set: causes taken away, parts made faster. Ranked."""
    notes: tuple[str, ...]

    @property
    def tokens_error(self) -> float:
        """How far the replay is off: 0.02 is 2 % too many tokens/s."""
        return self.replayed.output_tokens_per_s / self.recorded.output_tokens_per_s - 1

    @property
    def tbt_error(self) -> float | None:
        """Likewise of P99 TBT."""
        if not self.recorded.tbt_p99_s or self.replayed.tbt_p99_s is None:
            return None
        return self.replayed.tbt_p99_s / self.recorded.tbt_p99_s - 1

    @property
    def idle_errors(self) -> tuple[float, ...]:
        """Of each stage's idle share: 0.02 is two points too many."""
        pairs = zip(self.replayed.idle, self.recorded.idle, strict=True)
        return tuple(replayed - recorded for replayed, recorded in pairs)


def advise(
    recording: Recording,
    most_chunks: int = MOST_CHUNKS,
    make_cost: Callable[[PipelinePlan], CostModel] | None = None,
) -> Advice:
    """Tries every change on the recording, whose spans are on the driver's clock.

    Of a long run the beginning is replayed, up to `most_chunks` planned chunks. `make_cost`: of
    what the run's policy predicted with, for any plan.

    Raises ConfigError for a recording that is too short or does not say how it was run.
    """
    setting = setting_of(recording.meta, make_cost)
    fitted = fit(recording, setting.num_layers)
    load = load_of(recording, most_chunks)
    recorded = recorded_figures(recording, load)
    trials = _Trials(setting, fitted, load, recorded)
    tried = trials.predict(choices(setting, fitted, _blocks_are_given(recording)), _SCREENING)
    best = {prediction.change.kind: prediction.change for prediction in reversed(tried)}
    judged = trials.predict(list(best.values()), _JUDGING)
    drawn = [trials.unchanged(seed) for seed in (*_SCREENING, *_JUDGING)]
    rates = [figures.output_tokens_per_s for figures in drawn]
    return Advice(
        recorded=recorded,
        replayed=_mean(drawn[len(_SCREENING) :]),
        spread=max(rates) / min(rates) - 1,
        suggestions=tuple(prediction for prediction in judged if prediction.is_worthwhile),
        tried=tuple(tried),
        worths=tuple(trials.predict(wishes(setting, fitted), _SCREENING)),
        notes=tuple(_notes(recording, load)),
    )


class _Trials:
    """Replays of one recording. Those without a change are kept."""

    def __init__(
        self, setting: Setting, fitted: Fitted, load: RecordedLoad, recorded: Figures
    ) -> None:
        self._setting, self._fitted, self._load = setting, fitted, load
        self._recorded = recorded
        self._unchanged: dict[int, Figures] = {}

    def unchanged(self, seed: int) -> Figures:
        if seed not in self._unchanged:
            self._unchanged[seed] = replay(self._setting, self._fitted, self._load, seed=seed)
        return self._unchanged[seed]

    def predict(self, changes: Sequence[Change], seeds: Sequence[int]) -> list[Prediction]:
        """Of those that can run, ranked."""
        found = []
        before = _mean([self.unchanged(seed) for seed in seeds])
        for change in changes:
            try:
                after = _mean([self._changed(change, seed) for seed in seeds])
            except (ConfigError, CapacityError):
                continue  # not with these limits, or not these requests
            found.append(_prediction(change, before, after, self._recorded))
        return sorted(found, key=lambda prediction: prediction.rank)

    def _changed(self, change: Change, seed: int) -> Figures:
        load = self._load.at_once() if change.at_once else self._load
        return replay(change.setting, self._fitted, load, change.tweak, seed)


def _prediction(change: Change, before: Figures, after: Figures, recorded: Figures) -> Prediction:
    tokens = after.output_tokens_per_s / before.output_tokens_per_s
    tbt = None
    if before.tbt_p99_s and after.tbt_p99_s is not None:
        tbt = after.tbt_p99_s / before.tbt_p99_s
    return Prediction(
        change=change,
        tokens_gain=tokens - 1,
        tbt_gain=None if tbt is None else tbt - 1,
        output_tokens_per_s=recorded.output_tokens_per_s * tokens,
        tbt_p99_s=None if tbt is None or recorded.tbt_p99_s is None else recorded.tbt_p99_s * tbt,
        is_far=after.most_tokens > _FAR * recorded.most_tokens,
    )


def _mean(drawn: Sequence[Figures]) -> Figures:
    tbts = [figures.tbt_p99_s for figures in drawn if figures.tbt_p99_s is not None]
    return Figures(
        output_tokens_per_s=fmean(figures.output_tokens_per_s for figures in drawn),
        tbt_p99_s=fmean(tbts) if tbts else None,
        idle=tuple(map(fmean, zip(*(figures.idle for figures in drawn), strict=True))),
        most_tokens=max(figures.most_tokens for figures in drawn),
    )


def _blocks_are_given(recording: Recording) -> bool:
    return recording.meta.get("config", {}).get("num_gpu_blocks_override") is not None


def _notes(recording: Recording, load: RecordedLoad) -> Iterator[str]:
    if load.stop_s < inf:
        seconds = load.stop_s - load.arrivals[0].arrival_s
        yield (
            f"replayed are the first {seconds:.1f} s and the {len(load.arrivals)} requests that "
            "came in them"
        )
    if recording.faults:
        yield f"faults are not replayed; the recording has {len(recording.faults)}"
    early = len(recording.arrived) - len(load.arrivals)
    if early and load.stop_s == inf:
        yield f"{early} requests that reached no token are left out"
