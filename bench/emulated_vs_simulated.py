"""What the runtime itself costs: the same requests through emulated stages and the simulator.

    python bench/emulated_vs_simulated.py [--cases PART,PART,...] [--policies NAME,...]
                                          [--repeat N] [--json FILE]

Each case runs a pipeline of emulated stages in real time: processes, control messages, link
headers and token feedback are real, computing and moving activations are waited for. The simulator
then serves the same requests, at the times at which they were added, on the same truth. What lies
between the two is the runtime: idle time by cause of the ledger less the simulator's, for each
microbatch. Of several repeats the median run counts.

Use an idle machine: processes that wait for a core are late.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from commands import script
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
from pipeserve.profiling.recording.request_times import records_of
from pipeserve.profiling.recording.summary import summarize
from pipeserve.profiling.simulation.simulator import Arrival, Simulation

OWN = ("planning", "control", "token_feedback", "link", "rank_wait", "jitter")
"""Causes of which the simulator has none, or less: the runtime's."""
_LLAMA = {"recipe": "llama2-70b-2x4xa100", "pipeline_parallel_size": 8, "tensor_parallel_size": 1}
_FALCON = {"recipe": "falcon-180b-8xa100"}
_TP4 = {"recipe": "falcon-180b-2x4xa100", "pipeline_window": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of eight ranks: as many stages, or two stages of four."""

    name: str
    """About how long a microbatch takes on a stage."""
    flags: Mapping[str, Any]
    """Of the run, and the recipe that they change."""
    prompt: int
    """Mean tokens of a prompt, and below of an output; drawn between half and one and a half."""
    output: int
    rate: float | None
    num_prompts: int

    def config(self, policy: str) -> RunConfig:
        flags = {"pipeline_window": 8, **self.flags, "policy": policy, "device": "emulated"}
        return make_config(load_recipe(flags.pop("recipe")), flags)

    def requests(self, seed: int) -> Workload:
        draw = Random(seed).randint
        lengths = [
            (
                draw(self.prompt // 2, self.prompt * 3 // 2),
                draw(self.output // 2, self.output * 3 // 2),
            )
            for _ in range(self.num_prompts)
        ]
        return Workload(name=self.name, lengths=tuple(lengths), rate=self.rate, seed=seed)


CASES = (
    Case(name="20 ms", flags=_LLAMA | {"max_num_batched_tokens": 224}, prompt=1500, output=12,
         rate=None, num_prompts=128),
    Case(name="30 ms", flags=_FALCON | {"max_num_batched_tokens": 48}, prompt=60, output=40,
         rate=None, num_prompts=128),
    Case(name="110 ms", flags=_FALCON | {"max_num_batched_tokens": 512}, prompt=2000, output=4,
         rate=None, num_prompts=64),
    Case(name="110 ms, Poisson", flags=_FALCON | {"max_num_batched_tokens": 512}, prompt=2000,
         output=4, rate=1.6, num_prompts=64),
    Case(name="TP4 x PP2, 50 ms", flags=_TP4 | {"max_num_batched_tokens": 48}, prompt=60,
         output=40, rate=None, num_prompts=128),
    Case(name="TP4 x PP2, 150 ms", flags=_TP4 | {"max_num_batched_tokens": 512}, prompt=2000,
         output=4, rate=None, num_prompts=64),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What came of one of the two runs, from the first arrival to the last token. Seconds."""

    seconds: float
    output_tokens_per_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    microbatches: int
    stage_ms: float
    """Mean time of a microbatch on a stage, in milliseconds."""
    idle: float
    """Share of wall time, mean over the stages; likewise below."""
    idle_us: dict[str, float]
    """By cause, microseconds for each microbatch."""
    all_reduce_us: float
    """Of a microbatch on a stage, as part of its time; likewise what its ranks waited for each
    other."""
    rank_wait_us: float

    @classmethod
    def of(cls, recording: Recording) -> "Side":
        ledger, summary = explain(recording), summarize(records_of(recording))
        stages, num = range(recording.num_stages), len(recording.planned)
        idle_s = [ledger.idle_s(stage) for stage in stages]
        spans = [span for of_stage in recording.spans for span in of_stage]
        return cls(
            seconds=ledger.seconds,
            output_tokens_per_s=summary.output_tokens_per_s,
            tbt_p50_s=summary.tbt_s.p50,
            tbt_p99_s=summary.tbt_s.p99,
            microbatches=num,
            stage_ms=1e3 * fmean([span.end_s - span.start_s for span in spans]),
            idle=1 - fmean(ledger.busy_s) / ledger.seconds,
            idle_us={
                cause: 1e6 * fmean([of_stage[cause] for of_stage in idle_s]) / num
                for cause in idle_s[0]
            },
            all_reduce_us=1e6 * fmean([span.all_reduce_s for span in spans]),
            rank_wait_us=1e6 * fmean([span.rank_wait_s for span in spans]),
        )


# ---- the two runs -------------------------------------------------------------------------------


def emulate(config: RunConfig, workload: Workload) -> Recording:
    """On stages that are started for it."""
    ring = Ring()
    with Driver(emulated_setup(config), record=ring.record) as driver:
        items = workload.with_ids(driver.shape.vocab_size)
        run_items(driver, items, "", map(RequestId, count()))
        driver.settle()
        return recording_of(ring, len(driver.stages), meta_of_driver(driver))


def simulate(config: RunConfig, emulated: Recording) -> Recording:
    """The same requests, at the times at which they were added."""
    setup = simulated_run(config, find_shape(config.model, config.dtype))
    start_s = emulated.arrived[0].at_s
    arrivals = [
        Arrival(arrived.at_s - start_s, arrived.num_prompt_tokens, arrived.max_tokens)
        for arrived in emulated.arrived
    ]
    if all(arrival.arrival_s < 0.05 for arrival in arrivals):  # all at once, as was meant
        arrivals = [arrival._replace(arrival_s=0.0) for arrival in arrivals]
    ring = Ring()
    Simulation(setup.make_pipeline(ring.record), arrivals).run_until()
    return recording_of(ring, len(setup.plan.stages), setup.meta())


def num_alike(first: Recording, second: Recording) -> int:
    """Microbatches before the first whose chunks differ."""
    pairs = zip(first.planned, second.planned, strict=False)
    for number, (one, other) in enumerate(pairs):
        if [c[:3] for c in one.chunks] != [c[:3] for c in other.chunks]:
            return number
    return min(len(first.planned), len(second.planned))


def run(case: Case, policy: str, repeat: int) -> dict[str, Any]:
    """The figures of the run of median duration."""
    found = []
    for seed in range(repeat):
        config = case.config(policy)
        emulated = emulate(config, case.requests(seed))
        simulated = simulate(config, emulated)
        sides = Side.of(emulated), Side.of(simulated)
        found.append(
            (sides[0].seconds / sides[1].seconds, seed, sides, num_alike(emulated, simulated))
        )
    _, seed, (real, ideal), alike = sorted(found, key=lambda one: one[:2])[(repeat - 1) // 2]
    own_us = {cause: real.idle_us[cause] - ideal.idle_us[cause] for cause in OWN}
    return {
        "case": case.name,
        "policy": policy,
        "seed": seed,
        "load": os.getloadavg()[0],
        "emulated": asdict(real),
        "simulated": asdict(ideal),
        "microbatches_alike": alike,
        "own_us": own_us,
        "longer_us": 1e6 * (real.seconds - ideal.seconds) / ideal.microbatches,
    }


# ---- printing -----------------------------------------------------------------------------------


def figures_table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        real, ideal = result["emulated"], result["simulated"]
        name = f"{result['case']}, {result['policy']}"
        for what, key, unit in (
            ("output tokens/s", "output_tokens_per_s", 1),
            ("P50 TBT, ms", "tbt_p50_s", 1e3),
            ("P99 TBT, ms", "tbt_p99_s", 1e3),
        ):
            difference = f"{real[key] / ideal[key] - 1:+.2%}"
            values = (f"{unit * side[key]:.1f}" for side in (real, ideal))
            rows.append([name, what, *values, difference])
        points = f"{100 * (real['idle'] - ideal['idle']):+.2f} points"
        rows.append([name, "idle", f"{real['idle']:.2%}", f"{ideal['idle']:.2%}", points])
        counts = [str(side["microbatches"]) for side in (real, ideal)]
        rows.append([name, "microbatches", *counts, f"{result['microbatches_alike']} alike"])
        if ideal["all_reduce_us"]:
            for what in ("all_reduce", "rank_wait"):
                values = [f"{side[f'{what}_us']:.0f}" for side in (real, ideal)]
                rows.append([name, f"{what}, us a microbatch", *values, ""])
    return plain_table(["run", "figure", "emulated", "simulated", "difference"], rows)


def own_table(results: Sequence[dict[str, Any]]) -> str:
    """Microseconds for each microbatch, of a stage in the mean."""
    causes = list(results[0]["own_us"])
    header = ["run", "a stage's ms", *causes, "sum", "wall time longer by"]
    rows = []
    for result in results:
        own = result["own_us"]
        cells = [*own.values(), sum(own.values()), result["longer_us"]]
        name = f"{result['case']}, {result['policy']}"
        stage_ms = f"{result['emulated']['stage_ms']:.1f}"
        rows.append([name, stage_ms, *(f"{value:.0f}" for value in cells)])
    return plain_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="parts of names, with commas; all by default")
    parser.add_argument("--policies", default="sarathi_serve,uniform")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.cases.split(",")
    cases = [case for case in CASES if any(part in case.name for part in wanted)]
    if not cases:
        names = "; ".join(case.name for case in CASES)
        parser.error(f"no case has {arguments.cases} in its name; there are {names}")
    results = [
        run(case, policy, arguments.repeat)
        for case in cases
        for policy in arguments.policies.split(",")
    ]
    print(figures_table(results))
    print()
    print(own_table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    script(main)
