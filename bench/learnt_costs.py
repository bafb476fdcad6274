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
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from commands import script
from learnt_cost_cases import CELLS, FAULTS, Changing, WrongProfile, guess_of
from report import plain_table

from pipeserve.core.cost.partition import split_explicitly
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import rough_profile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Planned
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.search.capacity import poisson_arrivals
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import ProfiledTimes

MINUTE_S = 60.0


# ---- a run --------------------------------------------------------------------------------------


def run(cell_name: str, fault_name: str, seed: int, minutes: int) -> list[list[float]]:
    """For each minute: output tokens/s, those with the prompts', late share, median and P90 of
    errors."""
    os.nice(5)
    cell, fault = CELLS[cell_name](), FAULTS[fault_name]
    num_stages = len(cell.plan.stages)
    truth = ProfiledTimes(cell.profile, cell.shape, cell.plan, cell.size, seed)
    times = Changing(truth, num_stages)
    guess = guess_of(cell.profile)
    profile: Any = guess if fault.wrong is None else WrongProfile(cell.profile, fault.wrong)
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
    tokens = [[0, 0, 0, 0] for _ in range(minutes)]  # of outputs, and of prompts; gaps, late ones
    for served in simulation.served:
        for at_s in served.token_times_s:
            tokens[int(at_s // MINUTE_S)][0] += 1
        for first_s in served.token_times_s[:1]:
            tokens[int(first_s // MINUTE_S)][1] += served.num_prompt_tokens
        for before_s, at_s in pairwise(served.token_times_s):
            minute = tokens[int(at_s // MINUTE_S)]
            minute[2] += 1
            minute[3] += at_s - before_s > slo_s
    errors: list[list[float]] = [[] for _ in range(minutes)]
    for seconds, flight in zip(predicted, simulation.pipeline.flights, strict=False):
        for p, start, end in zip(seconds, flight.starts_s, flight.ends_s, strict=True):
            if end < minutes * MINUTE_S:
                errors[int(flight.planned_s // MINUTE_S)].append(abs(p / (end - start) - 1))
    return [
        [
            outputs / MINUTE_S,
            (outputs + prompts) / MINUTE_S,
            late / max(gaps, 1),
            *np.quantile(off, (0.5, 0.9)).tolist(),
        ]
        for (outputs, prompts, gaps, late), off in zip(tokens, errors, strict=True)
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
    config = recording.meta["config"]
    guess = rough_profile(config["device"])
    cost = PipelineCost(guess, shape, plan, config["tensor_parallel_size"])
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
            rows.append([cell, fault, *[_cells(found[:, :, place], place) for place in range(5)]])
            print(*rows[-1], sep=" | ", flush=True)
    if given.json:
        given.json.write_text(json.dumps(kept))
    header = ["cell", "starts from", "output tokens/s", "with prompts'", "late, %", "off, median %",
              "off, P90 %"]  # fmt: skip
    print(plain_table(header, rows))


def _cells(values: np.ndarray, place: int) -> str:
    """Means over seeds, minute by minute."""
    if place < 2:
        return ", ".join(f"{each:.0f}" for each in values.mean(axis=0))
    return ", ".join(f"{100 * fmean(each):.1f}" for each in values.T)


if __name__ == "__main__":
    script(main)
