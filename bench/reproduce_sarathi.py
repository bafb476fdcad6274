"""SARATHI's simulated GPT-3 on 64 A100 (arXiv 2308.16369, section 5.3), on our simulator.

    python bench/reproduce_sarathi.py [--requests 10000]

10,000 requests that are all there at the start, 1K to 4K tokens (Zipf, theta 0.4), ten prompt tokens
for each output token. Three ways to use 64 GPUs: one pipeline of TP8 x PP8 under Orca's best case
(one whole prompt beside the decodes), the same under SARATHI (chunks of 256), and eight replicas of
TP8 under Orca's best case. The section that it writes goes into docs/reproduction.md.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from statistics import median

from report import Row, table

from pipeserve.configs import load_recipe, make_config
from pipeserve.launch.simulate import Setup, make_setup
from pipeserve.profiling.simulator import Arrival, SimulatedPipeline, Simulation

RECIPE = "gpt3-64xa100"
NUM_REQUESTS = 10_000
PROMPT_SHARE = 10 / 11
CHUNK, CONTEXT = 256, 4096


@dataclass(frozen=True)
class Result:
    """One way to use the GPUs."""

    seconds: float
    bubble_s: float
    """Median over requests: idle time before each of its microbatches, all stages together."""


def zipf_arrivals(num_requests: int, seed: int = 0, theta: float = 0.4) -> list[Arrival]:
    """1,024 to 4,096 tokens, the n-th length with probability in proportion to n ** -theta."""
    lengths = range(1024, CONTEXT + 1)
    weights = list(accumulate((rank + 1) ** -theta for rank in range(len(lengths))))
    drawn = Random(seed).choices(lengths, cum_weights=weights, k=num_requests)
    prompts = [round(total * PROMPT_SHARE) for total in drawn]
    return [Arrival(0.0, p, total - p) for p, total in zip(prompts, drawn, strict=True)]


def make(num_stages: int, budget: int, batch: int, **more: object) -> Setup:
    """`batch` requests in each of the microbatches in flight, one chunk of `budget` in each."""
    overrides = {
        "policy": "sarathi",
        "pipeline_parallel_size": num_stages,
        "max_num_batched_tokens": budget,
        "max_num_seqs": batch * num_stages,
    }
    return make_setup(make_config(load_recipe(RECIPE), {**overrides, **more}))


def run(setup: Setup, arrivals: list[Arrival]) -> Result:
    bubbles: defaultdict[int, float] = defaultdict(float)
    free = [0.0] * len(setup.plan.stages)

    def count(microbatch, flight):
        gap = sum(start - end for start, end in zip(flight.starts_s, free, strict=True))
        free[:] = flight.ends_s
        for chunk in microbatch.chunks:
            bubbles[chunk.request_id] += gap

    pipeline = SimulatedPipeline(setup.make_engine(), setup.times, count)
    Simulation(pipeline, arrivals).run_until()
    return Result(pipeline.flights[-1].known_s, median(bubbles.values()))


def largest_batch(num_stages: int) -> int:
    """Requests of full length whose KV fits beside the weights, for each microbatch in flight."""
    setup = make(num_stages, CHUNK, 1)
    tokens = setup.limits.num_blocks * setup.limits.block_size
    return tokens // CONTEXT // num_stages


def section(num_requests: int) -> str:
    arrivals = zipf_arrivals(num_requests)
    alone, piped = largest_batch(1), largest_batch(8)
    orca = run(make(8, CONTEXT, piped), arrivals)
    sarathi = run(make(8, CHUNK, piped), arrivals)
    # One of eight replicas: every eighth request.
    replica = run(make(1, CONTEXT, alone), arrivals[::8])
    rows = [
        Row("largest batch, TP8", 11, alone, within=0),
        Row("largest batch of a microbatch, TP8 x PP8", 27, piped, within=0),
        Row("bubble time of a request, Orca / SARATHI", 6.29, orca.bubble_s / sarathi.bubble_s),
        Row("throughput, SARATHI / Orca (TP8 x PP8)", 1.91, orca.seconds / sarathi.seconds),
        Row("throughput, SARATHI (TP8 x PP8) / TP8 alone", 1.48, replica.seconds / sarathi.seconds),
        Row("throughput, TP8 alone / Orca (TP8 x PP8)", 1.28, orca.seconds / replica.seconds),
    ]
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    print(section(parser.parse_args().requests))


if __name__ == "__main__":
    main()
