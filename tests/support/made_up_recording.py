"""A run on made-up stages, recorded: what the tests of the report look at."""

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from random import Random

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.policies import get_policy
from pipeserve.profiling.recording.recording import Recording, recording_of
from pipeserve.profiling.recording.writer import RecordingWriter
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes


class Times(StageTimes):
    """Seconds by counts of tokens and contexts, with a jitter; the last stage has a head."""

    planning_s = 2e-4

    def __init__(self, num_stages: int, seed: int, slow: dict[int, float], hop: float):
        self.control_s, self.feedback_s = 3e-4, 4e-4
        self._num_stages, self._rng, self._slow, self._hop = num_stages, Random(seed), slow, hop

    def compute_s(self, microbatch):
        lengths = [(chunk.stop - chunk.start, chunk.stop) for chunk in microbatch.chunks]
        seconds = 4e-3 + sum(2e-5 * tokens + 2e-7 * stop for tokens, stop in lengths)
        times = []
        for stage in range(self._num_stages):
            noise = 1 + 0.02 * self._rng.random() + (self._rng.random() < 0.01) * 0.6
            times.append(seconds * noise * self._slow.get(stage, 1.0))
        times[-1] += self.head_s(microbatch)
        return times

    def head_s(self, microbatch):
        return 2e-4 + 1e-5 * len(microbatch.chunks)

    def hop_s(self, microbatch):
        return [self._hop] * (self._num_stages - 1)


def made_up_recording(
    num_stages: int = 2,
    num_requests: int = 20,
    *,
    rate: float = 20.0,
    policy: str = "sarathi_serve",
    seed: int = 0,
    slow: dict[int, float] | None = None,
    hop: float = 2e-4,
    num_blocks: int = 900,
    longest: int = 600,
) -> Recording:
    """Requests come at random, `rate` of them a second, with prompts of very different lengths."""
    rng = Random(seed)
    plan = split_layers(num_stages, num_stages)
    limits = Limits(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        max_model_len=4096,
        enable_prefix_caching=False,
    )
    records = []
    pipeline = SimulatedPipeline(
        Engine(plan, get_policy(policy), limits),
        Times(num_stages, seed, slow or {}, hop),
        records.append,
    )
    arrivals, at = [], 1.0
    for _ in range(num_requests):
        arrivals.append(Arrival(at, rng.randint(8, longest), rng.randint(4, 60)))
        at += rng.expovariate(rate)
    Simulation(pipeline, arrivals).run_until()
    meta = {
        "kind": "simulated",
        "policy": policy,
        "config": {"model": "made-up"},
        "plan": asdict(plan),
        "limits": asdict(limits),
        "started": "2026-01-02T03:04:05+00:00",
    }
    return recording_of(records, num_stages, meta)


def write(folder: Path, recording: Recording) -> None:
    """As `--record` writes it."""
    records = [*recording.arrived, *recording.planned, *recording.completed, *recording.ended]
    with RecordingWriter(folder, recording.meta) as writer:
        for record in [*records, *recording.faults, *recording.pings, *chain(*recording.spans)]:
            writer.record(record)
