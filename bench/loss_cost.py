"""What the loss of a stage costs those who wait: emulated Falcon-180B over eight stages, under a
part of the load that it can carry.

    python bench/loss_cost.py [--loads 0.5,0.9] [--seconds 150] [--kill-after 40] [--load-s 0]

Requests come by a Poisson process; after a while a stage in the middle is killed, and the run goes
on. The simulator serves the same requests at the same times without a loss; a request is late if
its first token comes over a second later than there. --load-s: how long a stage that is started
again takes to load its weights, of which an emulated one has none.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from random import Random

from emulated_vs_simulated import simulate
from report import plain_table

from pipeserve.configs import RunConfig, load_recipe, make_config
from pipeserve.core.nouns import RequestId
from pipeserve.driver.driver import Driver
from pipeserve.driver.shapes import find_shape
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.run.record import meta_of_driver
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.recording.recording import Recording, Ring, recording_of
from pipeserve.profiling.recording.request_times import request_records
from pipeserve.profiling.simulation.simulator import Arrival, Simulation

LOST = 4
"""The stage."""
PROMPT, OUTPUT = 1000, 30
"""Mean tokens; drawn between half and one and a half."""
LATE_S = 1.0
NORMAL = 10
"""Requests in a row that are not late."""


def lengths_of(num_prompts: int, seed: int) -> tuple[tuple[int, int], ...]:
    draw = Random(seed).randint
    return tuple(
        [
            (draw(PROMPT // 2, PROMPT * 3 // 2), draw(OUTPUT // 2, OUTPUT * 3 // 2))
            for _ in range(num_prompts)
        ]
    )


def capacity_of(config: RunConfig) -> float:
    """Requests a second that the simulator serves when all are there at once."""
    setup = simulated_run(config, find_shape(config.model, config.dtype))
    arrivals = [Arrival(0.0, *lengths) for lengths in lengths_of(400, seed=1)]
    simulation = Simulation(setup.make_pipeline(), arrivals)
    simulation.run_until()
    return len(arrivals) / max(served.token_times_s[-1] for served in simulation.served)


def emulate(config: RunConfig, workload: Workload, kill_after_s: float, load_s: float) -> Recording:
    """With a stage that is killed."""
    os.environ["LOAD_S"] = str(load_s)
    folder = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    ring = Ring()
    setup = replace(emulated_setup(config), module="loading_stage")
    with Driver(setup, record=ring.record) as driver:
        pid = driver.stages[LOST].pid
        threading.Timer(kill_after_s, os.kill, (pid, signal.SIGKILL)).start()
        items = workload.with_ids(driver.shape.vocab_size)
        run_items(driver, items, "", map(RequestId, count()))
        driver.settle()
        return recording_of(ring, len(driver.stages), meta_of_driver(driver))


def first_tokens(recording: Recording) -> list[tuple[float, float]]:
    """Of each request, when it came and how long it waited for its first token."""
    records = request_records(recording).values()
    return [(each.arrival_s, each.token_times_s[0] - each.arrival_s) for each in records]


def cost_of(disturbed: Recording, undisturbed: Recording) -> dict[str, float]:
    """Figures of one run."""
    [fault], [cost] = disturbed.faults, explain(disturbed).faults
    waits = zip(first_tokens(disturbed), first_tokens(undisturbed), strict=True)
    later = [(at_s, wait - usual) for (at_s, wait), (_, usual) in waits]
    late = [more for at_s, more in later if more > LATE_S and at_s + more > fault.at_s]
    ended = {entry.request_id: entry.at_s for entry in disturbed.ended}
    running = [
        arrived
        for arrived in disturbed.arrived
        if arrived.at_s < fault.at_s < ended[arrived.request_id]
    ]
    return {
        "requests": len(disturbed.arrived),
        "under way": len(running),
        "until computing again, s": cost.idle_s,
        "tokens computed again": cost.num_tokens,
        "in s of each stage": sum(cost.again_s) / len(cost.again_s),
        "late": len(late),
        "latest, s": max(late, default=0.0),
        "until TTFT is normal, s": normal_s(later, fault.at_s) - fault.at_s,
    }


def normal_s(later: Sequence[tuple[float, float]], fault_s: float) -> float:
    """When the first request came from which on TTFT is what it was, after a fault; never: inf."""
    behind = [(at_s, more) for at_s, more in later if at_s > fault_s]
    for place, (at_s, _) in enumerate(behind[: -NORMAL + 1]):
        if all(more <= LATE_S for _, more in behind[place : place + NORMAL]):
            return at_s
    return inf


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loads", type=numbers, default=[0.5, 0.9], help="shares of capacity: 0.5,0.9"
    )
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--kill-after", type=float, default=40.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = make_config(load_recipe("falcon-180b-8xa100"), {"device": "emulated"})
    capacity = capacity_of(config)
    print(f"all at once: {capacity:.2f} requests/s", flush=True)
    found = {}
    for load in options.loads:
        rate = load * capacity
        workload = Workload(
            name=f"{load:.0%}",
            lengths=lengths_of(round(rate * options.seconds), seed=0),
            rate=rate,
            seed=0,
        )
        disturbed = emulate(config, workload, options.kill_after, options.load_s)
        found[f"{load:.0%}"] = cost_of(disturbed, simulate(config, disturbed))
    rows = [[load, *(f"{value:,.4g}" for value in cost.values())] for load, cost in found.items()]
    print(plain_table(["load", *next(iter(found.values()))], rows))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
