"""Simulated runs with known causes of idle time, recorded: what ledger and report are tried on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from random import Random

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Record, Span
from pipeserve.profiling.recording.recording import Recording, recording_of
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes

STEP_S = 0.010
"""Of a microbatch of 4 decodes by `PlantedTimes`, about."""


class PlantedTimes(StageTimes):
    """Equal stages, linear in what a microbatch holds; and what is planted."""

    def __init__(
        self,
        num_stages: int = 4,
        *,
        base_s: float = 0.009,
        per_prefill_s: float = 20e-6,
        per_decode_s: float = 250e-6,
        per_context_s: float = 0.0,
        hop_s: float = 20e-6,
        control_s: float = 20e-6,
        feedback_s: float = 20e-6,
        planning_s: float = 0.0,
        slow: Mapping[int, float] | None = None,
        slow_hops: Mapping[int, float] | None = None,
        head_s: float = 0.0,
        all_reduces: Mapping[int, float] | None = None,
        waits: Callable[[int, int], float] = lambda stage, index: 0.0,
        burnt: Callable[[int, int], float] = lambda stage, index: 0.0,
        pauses_s: Callable[[int], float] = lambda plan: 0.0,
        noise: float = 0.0,
    ) -> None:
        """`slow`: stage -> factor; `slow_hops`: seam -> seconds; `all_reduces`: stage -> seconds;
        `waits`: (stage, index) -> seconds that its rank waited for another one; `burnt`: likewise,
        that others took of its core; `pauses_s`: of the n-th plan, beside `planning_s`."""
        self.num_stages = num_stages
        self.control_s = control_s
        self.feedback_s = feedback_s
        self.burnt, self.waits = burnt, waits
        self._all_reduces = all_reduces or {}
        self._terms = base_s, per_prefill_s, per_decode_s, per_context_s
        self._slow = slow or {}
        self._hops = [hop_s] * (num_stages - 1)
        for seam, seconds in (slow_hops or {}).items():
            self._hops[seam] = seconds
        self._planning_s, self._pauses_s, self._num_plans = planning_s, pauses_s, 0
        self._head_s, self._noise = head_s, noise

    @property
    def planning_s(self) -> float:
        """Asked for once for each plan, after the pipeline was made."""
        self._num_plans += 1
        return self._planning_s + self._pauses_s(self._num_plans)

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        base, per_prefill, per_decode, per_context = self._terms
        chunks = microbatch.chunks
        decodes = [c.stop for c in chunks if c.stop - c.start == 1]
        prefill = sum(c.stop - c.start for c in chunks) - len(decodes)
        layers = base + per_prefill * prefill
        layers += per_decode * len(decodes) + per_context * sum(decodes)
        seconds = []
        for stage in range(self.num_stages):
            noise = Random(f"{microbatch.index}/{stage}").gauss(0.0, self._noise)
            own = layers * self._slow.get(stage, 1.0) * exp(noise)
            own += self._all_reduces.get(stage, 0.0) + self.waits(stage, microbatch.index)
            seconds.append(own + self.burnt(stage, microbatch.index))
        seconds[-1] += self._head_s
        return seconds

    def head_s(self, microbatch: Microbatch) -> float:
        return self._head_s

    def all_reduce_s(self, microbatch: Microbatch) -> list[float]:
        return [self._all_reduces.get(stage, 0.0) for stage in range(self.num_stages)]

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return self._hops


def all_at_once(count: int, num_prompt_tokens: int = 16, max_tokens: int = 200) -> list[Arrival]:
    """A closed loop: what is running is all that will come."""
    return [Arrival(0.0, num_prompt_tokens, max_tokens)] * count


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One run to record."""

    times: PlantedTimes = field(default_factory=PlantedTimes)
    arrivals: Sequence[Arrival] = tuple(all_at_once(16))
    policy: str = "uniform"
    window: int | None = None
    """None: the number of stages."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """What differs from room enough for all, in microbatches of 64 tokens."""
    faults: Sequence[tuple[int, float, float]] = ()
    """Stage, when, outage."""
    stop_s: float = inf


def record(scene: Scene) -> Recording:
    """Runs it to its end. Thread CPU times are known: wall time, less what was burnt or waited."""
    times = scene.times
    records: list[Record] = []

    def keep(record: Record) -> None:
        if type(record) is Span:
            wall = record.end_s - record.start_s
            wait = times.waits(record.stage, record.index)
            cpu = wall - times.burnt(record.stage, record.index) - record.all_reduce_s - wait
            record = record._replace(cpu_s=cpu, between_cpu_s=0.0, rank_wait_s=wait)
        records.append(record)

    pipeline = SimulatedPipeline(make_engine(scene), times, keep)
    for fault in scene.faults:
        pipeline.fail(*fault)
    Simulation(pipeline, scene.arrivals).run_until(scene.stop_s)
    return recording_of(records, times.num_stages, {})


def make_engine(scene: Scene) -> Engine:
    limits = {
        "num_blocks": 100_000,
        "block_size": 16,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 64,
        "max_model_len": 8192,
        "enable_prefix_caching": False,
    }
    limits.update(scene.limits)
    policy = get_policy(scene.policy)
    if policy.traits.whole_prompts:
        limits["max_model_len"] = min(limits["max_model_len"], limits["max_num_batched_tokens"])
    plan = split_layers(scene.times.num_stages, scene.times.num_stages)
    if scene.window is not None:
        plan = type(plan)(plan.stages, scene.window)
    return Engine(plan, policy, Limits(**limits))
