"""How fast costs are learnt that were wrong at the start, or change: tokens/s, late tokens and the
error of predictions, minute by minute. For docs/cost-model.md.

    python bench/learnt_costs.py [--cells A100,CPU] [--only WORD,WORD]
                                 [--seeds 1 2] [--minutes 3] [--json FILE]
    python bench/learnt_costs.py --recordings FOLDER ...

`uniform` serves a Poisson load on simulated stages, with a limit between tokens, and predicts from
a profile that is right, wrong in one term, or none; or the stages change after a minute. All
figures are virtual time, so a busy machine does not move them. "Late": times between tokens over
the limit, of those that ended in the minute. "Off": absolute error of a stage's predicted time,
median and P90. A folder that `pipeserve bench --record` made is replayed: what it would have
predicted without a profile.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from report import plain_table
from schedule_cases import Case, setup_of
from schedule_search import ceiling_of, lengths_of

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.device import DeviceProfile, Residuals
from pipeserve.core.cost.kernels import AttentionCost, Tables
from pipeserve.core.cost.partition import split_explicitly, split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, PipelinePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Planned
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.search.capacity import poisson_arrivals
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import ProfiledTimes, StageTimes

MINUTE_S = 60.0


class Cell(NamedTuple):
    """A pipeline and its load."""

    profile: DeviceProfile
    shape: ModelShape
    plan: PipelinePlan
    size: int
    """Of a stage, in devices."""
    limits: Limits
    lengths: Sequence[tuple[int, int]]
    rate: float


def a100(layout: str, workload: str, load: float) -> Cell:
    knobs = (("max_num_batched_tokens", 2048),)
    setup = setup_of(Case(layout, workload, "uniform", knobs, 1.0, "sjf"))
    lengths = lengths_of(workload, None)
    rate = load * ceiling_of(setup, lengths, 1.0).rate
    size = setup.config.tensor_parallel_size
    return Cell(setup.profile, setup.shape, setup.plan, size, setup.limits, lengths, rate)


CPU = replace(
    load_profile("a100-80gb-dgx"),
    name="CPU",
    kernels=None,
    tables=Tables(
        model="smollm2-135m",
        dtype="bfloat16",
        threads=1,
        layer=((1, 1.3e-3), (8, 1.4e-3), (16, 1.7e-3), (64, 3.6e-3), (512, 2.1e-2), (2048, 8.4e-2)),
        head=((1, 2.0e-3), (16, 4.8e-3), (256, 5.0e-2)),
        embedding=((1, 1e-5), (512, 5e-4)),
    ),
    attention=AttentionCost(
        prefill_overhead_s=5e-5,
        prefill_values_per_s=2e9,
        prefix_flops_per_s=1e11,
        causal_flops_per_s=8e10,
        query_tile=1,
        decode_overhead_s=2e-5,
        decode_sequence_s=1e-5,
        decode_bytes_per_s=1.2e10,
    ),
    host_s=5e-4,
    residuals=Residuals(jitter=0.03),
)
"""About a core of a server with SmolLM2-135M in bf16: no steps, and times that scatter."""


def cpu() -> Cell:
    shape = load_shape("smollm2-135m")
    limits = Limits(
        num_blocks=6000,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=4096,
        max_tbt_s=0.5,
        enable_prefix_caching=False,
        order="sjf",
    )
    rng = Random(0)
    lengths = [(rng.randint(1, 1500), rng.randint(2, 120)) for _ in range(5000)]
    return Cell(CPU, shape, split_layers(shape.num_layers, 2), 1, limits, lengths, 1.1)


CELLS = {
    "A100s PP2, Azure": lambda: a100("TP4xPP2", "azure-conv", 0.85),
    "A100s PP8, arXiv": lambda: a100("TP1xPP8", "arxiv", 0.8),
    "CPU PP2": cpu,
}


# ---- what is wrong ------------------------------------------------------------------------------


class Wrong(NamedTuple):
    """Factors of the profile that costs are predicted from."""

    weights: float = 1.0
    tokens: float = 1.0
    own: float = 1.0
    prefix: float = 1.0
    context: float = 1.0
    head: float = 1.0
    has_steps: bool = True


class WrongProfile:
    """A profile with these factors."""

    def __init__(self, profile: DeviceProfile, wrong: Wrong) -> None:
        self._profile = profile
        self.linear = _Linear(profile.linear, wrong)
        self.attention = _Attention(profile.attention, wrong)
        self.host_s = wrong.weights * profile.host_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profile, name)


class _Linear:
    def __init__(self, linear: Any, wrong: Wrong) -> None:
        self._linear, self._wrong = linear, wrong

    def layer_s(self, shape: ModelShape, num_tokens: int) -> float:
        weights_s = self._linear.layer_s(shape, 1)
        seconds = self._linear.layer_s(shape, num_tokens)
        if not self._wrong.has_steps:
            low, high = num_tokens // 128 * 128, num_tokens // 128 * 128 + 128
            ends = [self._linear.layer_s(shape, max(end, 1)) for end in (low, high)]
            seconds = ends[0] + (num_tokens - low) / 128 * (ends[1] - ends[0])
        return self._wrong.weights * weights_s + self._wrong.tokens * (seconds - weights_s)

    def head_s(self, shape: ModelShape, num_logits: int) -> float:
        return self._wrong.head * self._linear.head_s(shape, num_logits)

    def embedding_s(self, shape: ModelShape, num_tokens: int) -> float:
        return self._linear.embedding_s(shape, num_tokens)


class _Attention:
    def __init__(self, attention: AttentionCost, wrong: Wrong) -> None:
        self._attention, self._wrong = attention, wrong

    def prefill_s(self, shape: ModelShape, start: int, num_tokens: int) -> float:
        own = self._attention.prefill_s(shape, 0, num_tokens)
        prefix = self._attention.prefill_s(shape, start, num_tokens) - own
        return self._wrong.own * own + self._wrong.prefix * prefix

    def decode_s(self, shape: ModelShape, num_decodes: int, context: int) -> float:
        return self._wrong.context * self._attention.decode_s(shape, num_decodes, context)


class Changing(StageTimes):
    """Stages that may become slower while they run."""

    def __init__(self, times: ProfiledTimes, num_stages: int) -> None:
        self._times = times
        self.control_s, self.feedback_s = times.control_s, times.feedback_s
        self.latency_s = times.latency_s
        self.hop_s = times.hop_s
        self.factors = [1.0] * num_stages

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        pairs = zip(self._times.compute_s(microbatch), self.factors, strict=True)
        return [seconds * factor for seconds, factor in pairs]


class Fault(NamedTuple):
    wrong: Wrong | None = Wrong()
    """None: no profile."""
    changes: tuple[tuple[float, float], ...] = ()
    """From then on the second stage takes so many times as long."""


FAULTS = {
    "the right profile": Fault(),
    "weights twice as dear": Fault(Wrong(weights=2.0)),
    "weights half as dear": Fault(Wrong(weights=0.5)),
    "tokens twice as dear": Fault(Wrong(tokens=2.0)),
    "tokens half as dear": Fault(Wrong(tokens=0.5)),
    "prefixes half as dear": Fault(Wrong(prefix=0.5)),
    "contexts half as dear": Fault(Wrong(context=0.5)),
    "contexts twice as dear": Fault(Wrong(context=2.0)),
    "head half as dear": Fault(Wrong(head=0.5)),
    "no steps of tiles": Fault(Wrong(has_steps=False)),
    "no profile": Fault(None),
    "right, a stage 1.5 times slower from 60 s on": Fault(changes=((60.0, 1.5),)),
    "right, a neighbour: 1.5 times every other 10 s": Fault(
        changes=tuple((60.0 + 10 * turn, (1.5, 1.0)[turn % 2]) for turn in range(12))
    ),
    "right, a stage 30 % slower by and by from 60 s on": Fault(
        changes=tuple((60.0 + 2 * step, 1 + 0.01 * step) for step in range(31))
    ),
    "no profile, a stage 1.5 times slower from 60 s on": Fault(None, ((60.0, 1.5),)),
}


# ---- a run --------------------------------------------------------------------------------------


def run(cell_name: str, fault_name: str, seed: int, minutes: int) -> list[list[float]]:
    """For each minute: output tokens/s, late share, median and P90 of errors."""
    os.nice(5)
    cell, fault = CELLS[cell_name](), FAULTS[fault_name]
    num_stages = len(cell.plan.stages)
    truth = ProfiledTimes(cell.profile, cell.shape, cell.plan, cell.size, seed)
    times = Changing(truth, num_stages)
    profile: Any = ROUGH if fault.wrong is None else WrongProfile(cell.profile, fault.wrong)
    cost = PipelineCost(profile, cell.shape, cell.plan, cell.size)
    engine = Engine(cell.plan, get_policy("uniform"), cell.limits, cost)
    predicted: list[Sequence[float]] = []
    plan = engine.plan

    def noted(now: float) -> Any:
        planned = plan(now)
        if isinstance(planned, Microbatch):
            predicted.append(engine.last.cost.seconds)
        return planned

    engine.plan = noted
    pipeline = SimulatedPipeline(engine, times)
    simulation = Simulation(pipeline, poisson_arrivals(cell.lengths, cell.rate, seed))
    for at_s, factor in fault.changes:
        if at_s < minutes * MINUTE_S:
            simulation.run_until(at_s)
            times.factors[1] = factor
    simulation.run_until(minutes * MINUTE_S)
    return _by_minute(simulation, predicted, cell.limits.max_tbt_s, minutes)


def _by_minute(
    simulation: Simulation, predicted: Sequence[Sequence[float]], slo_s: float, minutes: int
) -> list[list[float]]:
    tokens = [[0, 0, 0] for _ in range(minutes)]  # all, gaps, late ones
    for served in simulation.served:
        for at_s in served.token_times_s:
            tokens[int(at_s // MINUTE_S)][0] += 1
        for before_s, at_s in pairwise(served.token_times_s):
            minute = tokens[int(at_s // MINUTE_S)]
            minute[1] += 1
            minute[2] += at_s - before_s > slo_s
    errors: list[list[float]] = [[] for _ in range(minutes)]
    for seconds, flight in zip(predicted, simulation.pipeline.flights, strict=False):
        for p, start, end in zip(seconds, flight.starts_s, flight.ends_s, strict=True):
            if end < minutes * MINUTE_S:
                errors[int(flight.planned_s // MINUTE_S)].append(abs(p / (end - start) - 1))
    return [
        [count / MINUTE_S, late / max(gaps, 1), *np.quantile(off, (0.5, 0.9)).tolist()]
        for (count, gaps, late), off in zip(tokens, errors, strict=True)
    ]


# ---- a recorded run -----------------------------------------------------------------------------


def replay(folder: Path) -> list[list[float]]:
    """The errors that there would have been in a run of real stages without any profile: for each
    minute, median and P90."""
    recording = read_recording(folder)
    shape = ModelShape(**recording.meta["shape"])
    stages = recording.meta["plan"]["stages"]
    counts = [stage["stop_layer"] - stage["first_layer"] for stage in stages]
    plan = split_explicitly(shape.num_layers, len(counts), counts)
    cost = PipelineCost(ROUGH, shape, plan, recording.meta["config"]["tensor_parallel_size"])
    spans = [(span.end_s, span) for spans in recording.spans for span in spans]
    plans = [(planned.sent_s, planned) for planned in recording.planned]
    start_s, predicted = recording.planned[0].sent_s, {}
    errors: defaultdict[int, list[float]] = defaultdict(list)
    for at_s, what in sorted([*spans, *plans], key=lambda pair: pair[0]):
        if isinstance(what, Planned):
            found = cost.predict(Microbatch(what.index, what.chunks))
            predicted[what.index] = found.seconds
        elif what.index in predicted:
            seconds = what.end_s - what.start_s
            off = abs(predicted[what.index][what.stage] / seconds - 1)
            errors[int((at_s - start_s) // MINUTE_S)].append(off)
            cost.observe(what.index, what.stage, seconds)
    return [np.quantile(errors[minute], (0.5, 0.9)).tolist() for minute in sorted(errors)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", default="", help="those that have one of these words")
    parser.add_argument("--only", default="", help="faults that have one of these words")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--minutes", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--recordings", type=Path, nargs="*", help="of real runs: errors alone")
    parser.add_argument("--json", type=Path, help="the figures of each seed")
    given = parser.parse_args()
    for folder in given.recordings or ():
        minutes = [" ".join(f"{100 * each:.1f}" for each in minute) for minute in replay(folder)]
        print(f"{folder}: off by %, median and P90: {', '.join(minutes)}")
    if given.recordings:
        return
    words = given.cells.split(",")
    cells = [name for name in CELLS if any(word in name for word in words)]
    faults = [name for name in FAULTS if any(w in name for w in given.only.split(","))]
    rows, kept = [], {}
    with ProcessPoolExecutor(given.processes) as pool:
        tried = {
            what: [pool.submit(run, *what, seed, given.minutes) for seed in given.seeds]
            for what in product(cells, faults)
        }
        for (cell, fault), futures in tried.items():
            found = np.array([each.result() for each in futures])  # seed, minute, figure
            kept[f"{cell}: {fault}"] = found.tolist()
            rows.append([cell, fault, *[_cells(found[:, :, place], place) for place in range(4)]])
            print(*rows[-1], sep=" | ", flush=True)
    if given.json:
        given.json.write_text(json.dumps(kept))
    header = ["cell", "starts from", "output tokens/s", "late, %", "off, median %", "off, P90 %"]
    print(plain_table(header, rows))


def _cells(values: np.ndarray, place: int) -> str:
    """Means over seeds, minute by minute."""
    if place == 0:
        return ", ".join(f"{each:.0f}" for each in values.mean(axis=0))
    return ", ".join(f"{100 * fmean(each):.1f}" for each in values.T)


if __name__ == "__main__":
    main()
