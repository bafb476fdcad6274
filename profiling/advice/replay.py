"""A recorded run once more, on virtual time: its requests through the same engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import PipelinePlan, Request, RequestId, StagePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.view import CostModel
from pipeserve.errors import ConfigError
from pipeserve.profiling.advice.recorded_times import Fitted, RecordedTimes, Tweak
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.request_times import records_of
from pipeserve.profiling.recording.summary import RequestRecord, percentiles
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a user sets of a run."""

    plan: PipelinePlan
    policy: str
    limits: Limits
    make_cost: Callable[[PipelinePlan], CostModel] | None = None
    """Of what a policy that goes by predictions has; None: nothing, as where the run had none."""

    @property
    def num_layers(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(stage.num_layers for stage in self.plan.stages)

    def with_layers(self, num_layers: Sequence[int]) -> "Setting":
        """Other layers on the same stages."""
        stages, first = [], 0
        for stage, count in zip(self.plan.stages, num_layers, strict=True):
            stages.append(replace(stage, first_layer=first, stop_layer=first + count))
            first += count
        return replace(self, plan=replace(self.plan, stages=tuple(stages)))


def setting_of(
    meta: Mapping[str, Any], make_cost: Callable[[PipelinePlan], CostModel] | None = None
) -> Setting:
    """What a recording's meta says of its run. Raises ConfigError where it does not."""
    try:
        stages = [
            StagePlan(**{**stage, "ranks": tuple(stage["ranks"])})
            for stage in meta["plan"]["stages"]
        ]
        return Setting(
            plan=PipelinePlan(**{**meta["plan"], "stages": tuple(stages)}),
            policy=meta["policy"],
            limits=Limits(**meta["limits"]),
            make_cost=make_cost,
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the recording does not say how it was run ({error}): advice takes its plan, its "
            "policy and its limits from run.json; record it again"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a run, recorded or replayed."""

    output_tokens_per_s: float
    tbt_p99_s: float | None
    """None where no request has two tokens."""
    idle: tuple[float, ...]
    """Share of wall time in which each stage did not compute."""
    most_tokens: int = 0
    """Of the largest microbatch."""


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """The requests of a recording, as far as they are replayed. Times in seconds of its clock."""

    arrivals: tuple[Arrival, ...]
    """With the output tokens that each reached."""
    num_cached: tuple[int, ...]
    """Of each, leading positions that the prefix cache had: they are there in a replay too."""
    stop_s: float
    """What comes later is counted neither in the recording nor in a replay; inf: all is."""

    def at_once(self) -> "RecordedLoad":
        """Every request comes with the first."""
        start_s = self.arrivals[0].arrival_s
        arrivals = [arrival._replace(arrival_s=start_s) for arrival in self.arrivals]
        return replace(self, arrivals=tuple(arrivals))


def load_of(recording: Recording, most_chunks: int) -> RecordedLoad:
    """The first requests of a recording, up to `most_chunks` planned chunks.

    Raises ConfigError when none of them reached a token.
    """
    stop_s = _stop_s(recording, most_chunks)
    num_outputs = {end.request_id: end.num_output_tokens for end in recording.ended}
    starts: dict[RequestId, int] = {}
    for plan in recording.planned:
        for chunk in plan.chunks:
            starts.setdefault(chunk.request_id, chunk.start)
    arrivals, cached = [], []
    for arrived in sorted(recording.arrived, key=lambda arrived: arrived.at_s):
        reached = num_outputs.get(arrived.request_id, arrived.max_tokens)
        if arrived.at_s <= stop_s and reached:
            prompt = arrived.num_prompt_tokens
            arrivals.append(Arrival(arrived.at_s, prompt, reached, arrived.priority))
            cached.append(min(starts.get(arrived.request_id, 0), prompt - 1))
    if not arrivals:
        raise ConfigError("no request of the recording reached a token: nothing can be replayed")
    return RecordedLoad(tuple(arrivals), tuple(cached), stop_s)


def _stop_s(recording: Recording, most_chunks: int) -> float:
    """inf where every request ended and all of the run is replayed."""
    num_chunks = 0
    for plan in recording.planned:
        num_chunks += len(plan.chunks)
        if num_chunks > most_chunks:
            return plan.sent_s
    if len(recording.ended) < len(recording.arrived) and recording.completed:
        return recording.completed[-1].done_s
    return inf


def replay(
    setting: Setting, fitted: Fitted, load: RecordedLoad, tweak: Tweak | None = None, seed: int = 0
) -> Figures:
    """Serves the load. Raises ConfigError and CapacityError for a setting that cannot."""
    times = RecordedTimes(fitted, setting.num_layers, tweak, seed)
    limits = replace(setting.limits, enable_prefix_caching=False)  # lengths have no content
    policy, cost = get_policy(setting.policy), None
    if setting.make_cost is not None and policy.traits.reads_cost:
        cost = setting.make_cost(setting.plan)
    pipeline = _Replayed(Engine(setting.plan, policy, limits, cost), times)
    pipeline.num_cached = load.num_cached
    simulation = Simulation(pipeline, load.arrivals)
    simulation.run_until(load.stop_s)
    records = [served.record() for served in simulation.served if served.token_times_s]
    own_s = times.own_s
    spans = [
        [
            (start, end - own)
            for start, end in ((f.starts_s[stage], f.ends_s[stage]) for f in pipeline.flights)
        ]
        for stage, own in enumerate(own_s)
    ]
    most_tokens = max([flight.num_tokens for flight in pipeline.flights], default=0)
    return replace(figures(records, spans, load), most_tokens=most_tokens)


class _Replayed(SimulatedPipeline):
    """Requests have what the prefix cache had for them in the recorded run."""

    num_cached: tuple[int, ...] = ()

    def add(self, request: Request, now: float) -> None:
        SimulatedPipeline.add(self, replace(request, num_imported=self.num_cached[request.id]), now)


def figures(
    records: Sequence[RequestRecord],
    spans: Sequence[Sequence[tuple[float, float]]],
    load: RecordedLoad,
) -> Figures:
    """Of requests with a token each and of each stage's computes (start, end), up to the load's
    stop."""
    start_s = load.arrivals[0].arrival_s
    times = [[t for t in record.token_times_s if t <= load.stop_s] for record in records]
    stop_s = min(load.stop_s, max([of[-1] for of in times if of], default=start_s))
    seconds = max(stop_s - start_s, 1e-9)
    gaps = [later - before for of in times for before, later in pairwise(of)]
    return Figures(
        output_tokens_per_s=sum(map(len, times)) / seconds,
        tbt_p99_s=percentiles(gaps).p99 if gaps else None,
        idle=tuple(
            1 - sum([max(min(end, stop_s) - start, 0.0) for start, end in of_stage]) / seconds
            for of_stage in spans
        ),
    )


def recorded_figures(recording: Recording, load: RecordedLoad) -> Figures:
    """What was recorded of the load."""
    spans = [[(span.start_s, span.end_s) for span in of_stage] for of_stage in recording.spans]
    spans[0] += [(head.start_s, head.end_s) for head in recording.headed]
    most_tokens = max([span.num_tokens for span in recording.spans[0]], default=0)
    return replace(figures(records_of(recording), spans, load), most_tokens=most_tokens)
