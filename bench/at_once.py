"""What requests that come all at once meet without a limit between tokens, by `uniform`, simulated.

    python bench/at_once.py [--stages 2 4] [--only WORD]

Times of a line fitted to one core of a server, SmolLM2-135M in bf16 (AVX512, 30 November 2026);
they scatter by 3 %, and costs are learnt from nothing. With another version of the project in
PYTHONPATH the same loads meet that version. A minute of one core for each number of stages.
"""

import argparse
from dataclasses import replace
from itertools import pairwise
from random import Random
from statistics import fmean

import numpy as np
from commands import script
from learnt_cost_cases import CPU, cpu
from report import plain_table

from pipeserve.core.cost.kernels import Tables
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH_CPU
from pipeserve.core.engine import Engine
from pipeserve.core.policies import get_policy
from pipeserve.profiling.search.capacity import Arrival, Lengths
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS, draw_lengths

LINE = replace(
    CPU,
    tables=Tables(
        model="smollm2-135m",
        dtype="bfloat16",
        threads=1,
        layer=((1, 4e-4), (8, 6e-4), (16, 7.7e-4), (64, 2.4e-3), (512, 1.8e-2), (2048, 7.2e-2)),
        head=((1, 1.3e-3), (16, 2.5e-3), (256, 4e-2)),
        embedding=((1, 1e-5), (512, 5e-4)),
    ),
)
SEEDS = (1, 2)
GAP_S = 0.003
"""Between one request and the next, behind the first eight: a client submits them in turn."""


def loads() -> dict[str, tuple[int, Lengths]]:
    """Seats (`max_num_seqs`), and the requests' tokens."""
    rng = Random(0)

    def drawn(count: int, prompt: float, output: float, spread: float) -> Lengths:
        return [
            (
                min(1500, int(rng.lognormvariate(prompt, spread)) + 1),
                min(500, int(rng.lognormvariate(output, 0.7)) + 2),
            )
            for _ in range(count)
        ]

    chats = [
        (prompt // 8 + 1, output // 8 + 2)
        for prompt, output in draw_lengths(DISTRIBUTIONS["sharegpt"], 64, Random(1))
    ]
    return {
        "ShareGPT/8, 64 requests, a seat each": (64, chats),
        "ShareGPT/8, 64 requests, 32 seats": (32, chats),
        "32 prompts of 64, outputs of 256": (32, [(64, 256)] * 32),
        "32 prompts of 1,500, outputs of 16": (32, [(1500, 16)] * 32),
        "200 mixed, 32 seats": (32, drawn(200, 5.2, 3.8, 1.0)),
        "200 mixed, a seat each": (200, drawn(200, 5.2, 3.8, 1.0)),
        "short prompts, long outputs, 32 seats": (32, drawn(100, 4.0, 4.8, 0.8)),
    }


def met(num_stages: int, seats: int, lengths: Lengths, seed: int) -> tuple[float, ...]:
    """Total tokens/s; P50 and P99 of the time to first token; P99 between tokens; mean latency."""
    cell = cpu()
    limits = replace(
        cell.limits,
        max_tbt_s=None,
        max_num_seqs=seats,
        max_num_batched_tokens=2048,
        num_blocks=20_000,
    )
    plan = split_layers(cell.shape.num_layers, num_stages)
    cost = PipelineCost(ROUGH_CPU, cell.shape, plan, 1)
    engine = Engine(plan, get_policy("uniform"), limits, cost)
    pipeline = SimulatedPipeline(engine, ProfiledTimes(LINE, cell.shape, plan, 1, seed))
    arrivals = [Arrival(GAP_S * max(0, n - 7), *each) for n, each in enumerate(lengths)]
    simulation = Simulation(pipeline, arrivals)
    simulation.run_until()
    served = simulation.served
    ends_s = [each.token_times_s[-1] for each in served]
    gaps = [b - a for each in served for a, b in pairwise(each.token_times_s)]
    first_s = [each.token_times_s[0] - each.arrival_s for each in served]
    return (
        sum(map(sum, lengths)) / max(ends_s),
        *np.percentile(first_s, (50, 99)).tolist(),
        float(np.percentile(gaps, 99)),
        fmean(end_s - each.arrival_s for end_s, each in zip(ends_s, served, strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--only", default="", help="loads that have this in their names")
    given = parser.parse_args()
    rows = []
    for num_stages in given.stages:
        for name, (seats, lengths) in loads().items():
            if given.only in name:
                seeds = [met(num_stages, seats, lengths, seed) for seed in SEEDS]
                rows.append([f"{num_stages}", name, *map(_shown, zip(*seeds, strict=True))])
    header = ["stages", "load", "total tokens/s", "TTFT P50, s", "TTFT P99, s", "TBT P99, s",
              "mean latency, s"]  # fmt: skip
    print(plain_table(header, rows))


def _shown(seeds: tuple[float, ...]) -> str:
    places = 0 if seeds[0] > 100 else 2
    return ", ".join(f"{each:,.{places}f}" for each in seeds)


if __name__ == "__main__":
    script(main)
