"""The requests of DistServe's evaluation: ShareGPT lengths under 2,048 tokens, Poisson arrivals."""

import csv
import gzip
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeserve.profiling.simulation.simulator import Arrival

Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, output tokens)."""

SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
PROMPTS = (1, 8, 24, 90, 263, 394, 537, 695, 858, 1054, 1277, 1555, 1731, 1940, 2029)
OUTPUTS_BY_PROMPT = (
    (2, 3, 7, 10, 19, 38, 85, 143, 211, 282, 365, 517, 743, 1251, 1776),
    (1, 2, 6, 9, 14, 22, 39, 93, 189, 276, 353, 485, 637, 991, 1621),
    (2, 2, 5, 8, 15, 23, 46, 117, 229, 329, 436, 643, 791, 1101, 1430),
    (1, 2, 4, 9, 15, 23, 43, 110, 224, 313, 419, 617, 763, 959, 1141),
    (1, 2, 4, 7, 12, 16, 24, 37, 71, 153, 258, 369, 459, 618, 748),
)
"""Quantiles at SHARES of 12,088 requests (means 767 and 199 tokens; the paper's Figure 7: 756 and
200): the first 17,671 conversations of ShareGPT_V3_unfiltered_cleaned_split.json (Apache-2.0), by
the rules of DistServe's `prepare-dataset.py` (3 turns or more, a random number of them as the
prompt and the next as the output, under 2,048 tokens in total), in GPT-2 tokens and one more, as
OPT counts. Outputs by fifth of the prompts: a long prompt leaves room for a short output only."""


def sharegpt_lengths(num_requests: int = 12_088, seed: int = 0) -> list[tuple[int, int]]:
    """Drawn from the quantiles, linear between them; an output ends at 2,047 tokens in total."""
    rng = random.Random(f"{seed}/sharegpt-2048")
    lengths = []
    for _ in range(num_requests):
        share = rng.random()
        prompt = round(float(np.interp(share, SHARES, PROMPTS)))
        output = round(float(np.interp(rng.random(), SHARES, OUTPUTS_BY_PROMPT[int(share * 5)])))
        lengths.append((prompt, min(output, 2047 - prompt)))
    return lengths


def trace_lengths(path: Path) -> list[tuple[int, int]]:
    """The rows of a trace under 2,048 tokens in total."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = [
            (int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if sum(row) < 2048]


def finite_arrivals(lengths: Lengths, num: int, rate: float, seed: int) -> list[Arrival]:
    """As the published simulator draws them: `num` requests without repetition, the first at 0,
    exponential gaps. It counts the decodes after the first token, so ours has one token more."""
    chosen = random.Random(seed).sample(lengths, num)
    gaps = np.random.RandomState(seed).gamma(1, 1 / rate, num - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    return [Arrival(float(t), p, d + 1) for t, (p, d) in zip(times, chosen, strict=True)]
