"""How throughput grows with requests at a time and their context, on 1 and 2 stages.

    python bench/batch_and_context.py MODEL [--stages 1,2] [--batches 1,2,4,8,16,32,64]
                                      [--contexts 128,512,2048,8192] [--most-tokens 65536]
                                      [--rounds 1] [--within S] [--json FILE]

For each number of stages one pipeline with default settings, on all cores that this process may run
on. A cell is so many requests of one length. First all their prompts run, submitted at once, each
for one token: prefill tokens/s are prompt tokens over the time until the last of those tokens.
Then they come again, find their prompts in the prefix cache and make `--outputs` tokens up to their
context: decode tokens/s are the tokens that became known while all of them were decoding. Of
several rounds the median. Cells of over `--most-tokens` (requests times context), which would not
fit the memory, and those that `--within` seconds, shared by the numbers of stages, left no time for
are empty. `growth.py` simulates what a pipeline itself costs at far more stages and requests.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, product
from pathlib import Path
from random import Random
from typing import NamedTuple

from report import plain_table

from pipeserve.configs import make_config
from pipeserve.core.nouns import RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import PipeserveError
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.launch.verbs.bench import run_items
from pipeserve.machine import device_name
from pipeserve.profiling.recording.summary import RequestRecord
from pipeserve.profiling.simulation.workloads import random_items

BLOCK_SIZE = 16


class Cell(NamedTuple):
    """A load, and its place in the tables."""

    stages: int
    batch: int
    context: int
    """Tokens of a request at its end."""

    @property
    def tokens(self) -> int:
        return self.batch * self.context


class Rates(NamedTuple):
    """Tokens a second."""

    prefill: float
    decode: float


def measure(driver: Driver, cell: Cell, outputs: int, salt: str, ids: Iterator[int]) -> Rates:
    prompt = cell.context - outputs
    prompts, decodes = (
        random_items([(prompt, length)] * cell.batch, 1, driver.shape.vocab_size, Random(salt))
        for length in (1, outputs)
    )
    prefilled = run_items(driver, prompts, salt, ids)
    driver.settle()
    decoded = run_items(driver, decodes, salt, ids)
    driver.settle()
    return Rates(prefill_rate(prefilled), decode_rate(decoded))


def prefill_rate(records: Sequence[RequestRecord]) -> float:
    start_s = min(record.arrival_s for record in records)
    stop_s = max(record.token_times_s[0] for record in records)
    return sum(record.num_prompt_tokens for record in records) / (stop_s - start_s)


def decode_rate(records: Sequence[RequestRecord]) -> float:
    """Of the time in which every request is between its first token and its last."""
    start_s = max(record.token_times_s[0] for record in records)
    stop_s = min(record.token_times_s[-1] for record in records)
    times_s = chain.from_iterable(record.token_times_s for record in records)
    return sum(start_s < time_s <= stop_s for time_s in times_s) / (stop_s - start_s)


def measure_all(args: argparse.Namespace) -> dict[Cell, Rates]:
    """The small cells first."""
    found: dict[Cell, Rates] = {}
    for stages in args.stages:
        ends_s = time.monotonic() + args.within / len(args.stages)
        grid = (Cell(stages, *pair) for pair in product(args.batches, args.contexts))
        cells = sorted((c for c in grid if c.tokens <= args.most_tokens), key=lambda c: c.tokens)
        num_blocks = max(cell.batch * (-(-cell.context // BLOCK_SIZE) + 1) for cell in cells)
        config = make_config(
            {},
            {
                "model": args.model,
                "pipeline_parallel_size": stages,
                "block_size": BLOCK_SIZE,
                "num_gpu_blocks_override": num_blocks,
            },
        )
        ids = map(RequestId, count())
        with Driver(checkpoint_setup(config)) as driver:
            measure(driver, cells[0], args.outputs, "warm-up", ids)
            for cell in cells:
                rounds = []
                for number in range(args.rounds):
                    if time.monotonic() > ends_s:
                        break
                    salt = f"{cell}/{number}"
                    rounds.append(measure(driver, cell, args.outputs, salt, ids))
                if rounds:
                    found[cell] = Rates(*map(statistics.median, zip(*rounds, strict=True)))
                    print(cell, found[cell], file=sys.stderr, flush=True)
    return found


def table(found: Mapping[Cell, Rates], args: argparse.Namespace, what: str) -> str:
    """Rows by stages and context, columns by batch."""
    rows = [
        [
            f"{stages}",
            f"{context:,}",
            *(_shown(found.get(Cell(stages, batch, context)), what) for batch in args.batches),
        ]
        for stages, context in product(args.stages, args.contexts)
    ]
    return plain_table(["P", "context", *(f"{batch} at a time" for batch in args.batches)], rows)


def _shown(rates: Rates | None, what: str) -> str:
    return "" if rates is None else f"{getattr(rates, what):,.0f}"


def main() -> int:
    args = _arguments()
    exit_on_signals()
    try:
        found = measure_all(args)
    except PipeserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for what in Rates._fields:
        print(f"\n{what} tokens/s, {device_name()}, {len(os.sched_getaffinity(0))} cores\n")
        print(table(found, args, what))
    if args.json is not None:
        rows = [{**cell._asdict(), **rates._asdict()} for cell, rates in found.items()]
        args.json.write_text(json.dumps({"cpu": device_name(), "cells": rows}, indent=2) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--stages", type=_numbers, default=[1, 2])
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=_numbers, default=[128, 512, 2048, 8192])
    parser.add_argument("--outputs", type=int, default=32, help="tokens of each request")
    parser.add_argument("--most-tokens", type=int, default=65_536, help="of a cell")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--within", type=float, default=3600, help="seconds to begin cells in")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not 2 <= args.outputs < min(args.contexts):
        parser.error(f"--outputs {args.outputs}: give 2 or more, and less than every context")
    if min(args.batches) * min(args.contexts) > args.most_tokens:
        parser.error(f"--most-tokens {args.most_tokens}: not one cell is as small; give more")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
