"""How throughput grows with requests at a time and their context, on 1 and 2 stages.

    python bench/batch_and_context.py MODEL [--stages 1,2] [--batches 1,2,4,8,16,32,64]
                                      [--contexts 128,512,2048,8192] [--most-tokens 32768]
                                      [--rounds 1] [--within S] [--json FILE]

For each number of stages one pipeline with default settings, on all cores that this process may run
on. A cell is so many requests of one length. First those of their prompts run that no smaller cell
of the same context had, submitted at once, each for one token: prefill tokens/s are prompt tokens
over the time until the last of those tokens. Then all come again, find their prompts in the prefix
cache and make `--outputs` tokens up to their context: decode tokens/s are the tokens that became
known while all of them were decoding. Of several rounds the median. Cells of over `--most-tokens`
(requests times context), which would take too long, and those that `--within` seconds, shared by
the numbers of stages, left no time for are empty.

`--json FILE` is written context by context, and what an earlier run of the same settings has put
there is not measured again: so a run that was ended, or whose time was up, goes on. SmolLM2-135M
takes some six minutes on two cores. `growth.py` simulates what a pipeline itself costs at far more
stages and requests.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, groupby, product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from report import plain_table

from pipeserve.configs import make_config
from pipeserve.core.nouns import RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError, PipeserveError
from pipeserve.launch.run.starting import exit_on_signals
from pipeserve.launch.verbs.bench import run_items
from pipeserve.machine import device_name
from pipeserve.profiling.recording.summary import RequestRecord
from pipeserve.profiling.simulation.workloads import WorkItem, random_items

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


class Prompts:
    """Of one context: the same ones for every cell, as many as it has requests."""

    def __init__(self, driver: Driver, context: int, outputs: int, most: int, salt: str) -> None:
        self.driver, self.outputs, self.salt = driver, outputs, salt
        lengths = [(context - outputs, outputs)] * most
        self.items = random_items(lengths, 1, driver.shape.vocab_size, Random(salt))
        self.num_filled = 0
        """Of them, those that the prefix cache has."""

    def measure(self, batch: int, ids: Iterator[int]) -> Rates:
        new = [replace(item, max_tokens=1) for item in self.items[self.num_filled : batch]]
        prefilled = self._run(new, ids)
        self.num_filled = batch
        decoded = self._run(self.items[:batch], ids)
        return Rates(prefill_rate(prefilled), decode_rate(decoded))

    def _run(self, items: Sequence[WorkItem], ids: Iterator[int]) -> list[RequestRecord]:
        records = run_items(self.driver, items, self.salt, ids)
        self.driver.settle()
        return records


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


def measure_all(args: argparse.Namespace, found: dict[Cell, Rates]) -> None:
    """What is not `found`, into it; short contexts first."""
    for stages in args.stages:
        ends_s = time.monotonic() + args.within / len(args.stages)
        cells = [
            cell
            for context, batch in product(args.contexts, args.batches)
            if (cell := Cell(stages, batch, context)).tokens <= args.most_tokens
        ]
        if all(cell in found for cell in cells):
            continue
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
        with Driver(checkpoint_setup(config)) as driver:
            _measure_cells(args, driver, cells, found, ends_s)


def _measure_cells(
    args: argparse.Namespace,
    driver: Driver,
    cells: Sequence[Cell],
    found: dict[Cell, Rates],
    ends_s: float,
) -> None:
    ids = map(RequestId, count())
    Prompts(driver, args.contexts[0], args.outputs, 1, "warm-up").measure(1, ids)
    for context, of_context in groupby(cells, lambda cell: cell.context):
        wanted = [cell for cell in of_context if cell not in found]
        most = max((cell.batch for cell in wanted), default=0)
        rounds = [
            Prompts(driver, context, args.outputs, most, f"{context}/{number}")
            for number in range(args.rounds)
        ]
        measured: dict[Cell, list[Rates]] = {cell: [] for cell in wanted}
        for prompts, cell in product(rounds, wanted):
            if time.monotonic() > ends_s:
                break
            measured[cell].append(prompts.measure(cell.batch, ids))
        for cell, rates in measured.items():
            if rates:
                found[cell] = Rates(*map(statistics.median, zip(*rates, strict=True)))
                print(cell, found[cell], file=sys.stderr, flush=True)
        write(args, found)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What cells have to have in common to stand in one table."""
    return {"cpu": device_name(), "model": args.model, "outputs": args.outputs}


def read(args: argparse.Namespace) -> dict[Cell, Rates]:
    """What an earlier run has written. Raises ConfigError where its settings were others."""
    if args.json is None or not args.json.exists():
        return {}
    earlier = json.loads(args.json.read_text())
    rows = earlier.pop("cells")
    if earlier != _settings(args):
        raise ConfigError(f"{args.json} is of a run with {earlier}; give another file")
    return {
        Cell(*(row[name] for name in Cell._fields)): Rates(*(row[name] for name in Rates._fields))
        for row in rows
    }


def write(args: argparse.Namespace, found: Mapping[Cell, Rates]) -> None:
    if args.json is not None:
        rows = [{**cell._asdict(), **rates._asdict()} for cell, rates in found.items()]
        args.json.write_text(json.dumps({**_settings(args), "cells": rows}, indent=2) + "\n")


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
        found = read(args)
        measure_all(args, found)
    except PipeserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for what in Rates._fields:
        print(f"\n{what} tokens/s, {device_name()}, {len(os.sched_getaffinity(0))} cores\n")
        print(table(found, args, what))
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
    parser.add_argument("--most-tokens", type=int, default=32_768, help="of a cell")
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
