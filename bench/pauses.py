"""How long the driver is away from its messages: a long emulated run, recorded as by default.

    nice python bench/pauses.py [--microbatches 25000] [--seqs 384] [--policy uniform]

LLaMA2-70B on emulated A100s, five stages of about 10 ms, some 64 decodes in a microbatch. Between
two looks at what the stages said the driver takes up results, tells its records, hands out tokens
and plans. Columns: milliseconds of its thread's CPU time from one look to the next, planning left
out, and planning alone (wall time beside each: the machine's other work is in that), then the
garbage collections by generation. What comes before the first microbatch or after the last is not
counted: nothing waits for the driver then. The stages only wait, so a run takes microbatches x
10 ms. CPU time hardly depends on what else the machine does, but what a hypervisor takes of a
virtual core is in it. How much that is, the control says: one short loop again and again, in a
process beside it.
"""

import argparse
import gc
import resource
import select
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from statistics import fmean
from typing import Any

from commands import script
from report import plain_table

from pipeserve.configs import load_recipe, make_config
from pipeserve.core.nouns import RequestId
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.starting import recorded_driver
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.simulation.workloads import random_items

_TURN = 5.25
"""Microbatches that the requests which run are spread over: five stages, and some planned ahead."""
_OUTPUT = (100, 300)
_PROMPT = (8, 24)
_CONTROL = 30_000
"""Numbers to add up: half a millisecond, about."""


class Clock:
    """Wall and CPU seconds of what happened again and again, in storage that the garbage collector
    does not walk."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = array("d"), array("d")

    def add(self, wall_s: float, cpu_s: float) -> None:
        self.wall_s.append(wall_s)
        self.cpu_s.append(cpu_s)


class Collections:
    """Each garbage collection, while it is entered."""

    def __init__(self) -> None:
        self.clocks = [Clock() for _ in range(3)]
        self._began = 0.0, 0.0

    def _tell(self, phase: str, info: dict[str, Any]) -> None:
        now = time.perf_counter(), time.thread_time()
        if phase == "start":
            self._began = now
        else:
            spent = [there - here for here, there in zip(self._began, now, strict=True)]
            self.clocks[info["generation"]].add(*spent)

    def __enter__(self) -> "Collections":
        gc.callbacks.append(self._tell)
        return self

    def __exit__(self, *exc: object) -> None:
        gc.callbacks.remove(self._tell)


class Watch:
    """Stands between a driver and its sources and engine, and reads the clocks."""

    def __init__(self, driver: Driver) -> None:
        self.between, self.planning = Clock(), Clock()
        self.at_s = array("d")
        """Of each look, when it was, and how many results were taken up before it."""
        self.num_results = array("i")
        self._num_results = 0
        self._has_begun = False
        self.began = self._now()
        self._left = self.began
        self._planned = (0.0, 0.0)
        sources = driver.fleet._port._sources
        sources.ready = self._looking(driver, sources.ready)
        driver.engine.plan = self._timed(driver.engine.plan)
        driver.engine.complete = self._counted(driver.engine.complete)

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.thread_time()

    def _looking(self, driver: Driver, ready: Callable) -> Callable:
        def look(*how_long: Any) -> list:
            (wall_s, cpu_s), (left_s, left_cpu_s) = self._now(), self._left
            planned_s, planned_cpu_s = self._planned
            if self._has_begun and driver.engine.num_unfinished:
                self.between.add(wall_s - left_s - planned_s, cpu_s - left_cpu_s - planned_cpu_s)
                self.at_s.append(wall_s - self.began[0])
                self.num_results.append(self._num_results)
            self._has_begun = bool(self.planning.cpu_s)
            self._planned, self._num_results = (0.0, 0.0), 0
            found = ready(*how_long)
            self._left = self._now()
            return found

        return look

    def _counted(self, complete: Callable) -> Callable:
        def counted(*args: Any) -> Any:
            self._num_results += 1
            return complete(*args)

        return counted

    def _timed(self, plan: Callable) -> Callable:
        def timed(now: float) -> Any:
            before = self._now()
            planned = plan(now)
            spent = tuple(a - b for a, b in zip(self._now(), before, strict=True))
            self.planning.add(*spent)
            self._planned = tuple(map(sum, zip(self._planned, spent, strict=True)))
            return planned

        return timed


@contextmanager
def control() -> Iterator[Clock]:
    """Holds, at the end, how long a piece of plain computing took, again and again meanwhile."""
    clock, command = Clock(), [sys.executable, __file__, "--control"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield clock
        seconds, _ = process.communicate()
    half = len(seconds) // 2
    clock.wall_s.frombytes(seconds[:half])
    clock.cpu_s.frombytes(seconds[half:])


def run_control() -> None:
    """Until standard input closes; then says what it took."""
    clock = Clock()
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        sum(range(_CONTROL))
        clock.add(time.perf_counter() - wall_s, time.thread_time() - cpu_s)
    sys.stdout.buffer.write(clock.wall_s.tobytes() + clock.cpu_s.tobytes())


def quantiles(seconds: Sequence[float]) -> list[str]:
    """P50, P99, P99.9 and the longest, in milliseconds."""
    ordered = sorted(seconds)
    places = [min(int(q * len(ordered)), len(ordered) - 1) for q in (0.5, 0.99, 0.999, 1.0)]
    return [f"{1e3 * ordered[place]:.3f}" if ordered else "" for place in places]


def rows(name: str, clock: Clock) -> list[list[str]]:
    number = f"{len(clock.cpu_s):,}"
    return [
        [name, "CPU", number, *quantiles(clock.cpu_s)],
        ["", "wall", "", *quantiles(clock.wall_s)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--microbatches", type=int, default=25_000)
    parser.add_argument("--seqs", type=int, default=336, help="requests that run at a time")
    parser.add_argument("--policy", default="uniform")
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.control:
        return run_control()
    flags = {
        "pipeline_parallel_size": 5,
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": int(args.seqs / _TURN) + 32,
        "max_num_seqs": args.seqs,
        "policy": args.policy,
        "device": "emulated",
    }
    config = make_config(load_recipe("llama2-70b-2x4xa100"), flags)
    draw = Random(0).randint
    number = int(args.microbatches * args.seqs / _TURN / fmean(_OUTPUT)) + args.seqs // 2
    lengths = [(draw(*_PROMPT), draw(*_OUTPUT)) for _ in range(number)]
    with recorded_driver(config, None, may_emulate=True) as (driver, records):
        items = random_items(lengths, 1, driver.shape.vocab_size, Random(1))
        gc.collect()
        watch, start_s = Watch(driver), time.monotonic()
        with Collections() as collections, control() as plain:
            run_items(driver, items, "", map(RequestId, range(number)))
            seconds = time.monotonic() - start_s
            driver.settle()
        num_microbatches = driver.engine.last.index + 1
        tracked, frozen = len(gc.get_objects()), gc.get_freeze_count()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    stage_ms = 1e3 * seconds / num_microbatches
    print(f"{num_microbatches:,} microbatches, one in {stage_ms:.1f} ms; {number:,} requests")
    table = rows("between looks, without planning", watch.between)
    table += rows("planning", watch.planning)
    for generation, clock in enumerate(collections.clocks):
        if clock.cpu_s:
            table += rows(f"collections of generation {generation}", clock)
    table += rows("control", plain)
    print(plain_table(["ms", "", "number", "P50", "P99", "P99.9", "most"], table))
    clocks = ("looks", watch.between), ("plans", watch.planning), ("of the control", plain)
    for name, clock in clocks:
        print(f"{sum(s > 2e-3 for s in clock.cpu_s):,} {name} over 2 ms of CPU time")
    clock = watch.between
    looks = zip(clock.cpu_s, clock.wall_s, watch.num_results, watch.at_s, strict=True)
    for cpu_s, wall_s, num_results, at_s in sorted(looks, reverse=True)[:8]:
        print(
            f"{1e3 * cpu_s:.1f} ms of CPU time in {1e3 * wall_s:.1f} ms, {num_results} results, "
            f"at {at_s:.0f} s"
        )
    print(
        f"at the end: {tracked:,} tracked objects, {frozen:,} frozen; peak memory {peak:,} MiB; "
        f"the ring holds {len(records.ring):,} records"
    )


if __name__ == "__main__":
    script(main)
