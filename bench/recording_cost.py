"""What recording costs: throughput with it, without it, and with its calls removed.

    python bench/recording_cost.py smollm2-135m --rounds 10

One driver of two stages serves the same short workload again and again, each round once with
recording to files and to the ring as `--record` does, once with the recorder that ignores, and once
with a journal that does nothing, in a random order. Ratios are of rounds, so that what the machine
does meanwhile mostly cancels. What a stage does for its record is timed apart, since no stage runs
without: it has to tell the cost model how long it took.
"""

import argparse
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace

import msgspec
from commands import script

from pipeserve.configs import make_config
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Chunk, Microbatch, Output, Request, RequestId
from pipeserve.core.records import Completed, Recorder, Span, ignore
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.record import meta_of_driver, tee
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.recording.recording import Ring
from pipeserve.profiling.recording.summary import summarize
from pipeserve.profiling.recording.writer import RecordingWriter
from pipeserve.profiling.simulation.workloads import random_items
from pipeserve.wire import control
from pipeserve.wire.step_messages import Timing

MODES = ("recorded", "ignored", "removed")


class NoJournal(Journal):
    """The recorder's calls removed: each returns at once."""

    def _nothing(self, *_: object) -> None:
        pass

    arrived = finished = waits = planned = completed = computed = pinged = lost = _nothing


class Runs:
    """Passes over one workload on one driver."""

    def __init__(self, driver: Driver, requests: int, prompt: int, output: int) -> None:
        self.driver = driver
        lengths = [(prompt, output)] * requests
        vocab_size = driver.shape.vocab_size
        self.items = random_items(lengths, 1, vocab_size, Random("recording cost"))
        self.ids = map(RequestId, count())

    def tokens_per_s(self, record: Recorder | None) -> float:
        """None: with the journal's calls removed. The driver's parts hold its journal, too, so that
        becomes what is wanted, as new."""
        journal = self.driver.journal
        journal.__class__ = NoJournal if record is None else Journal
        journal.__init__(self.driver.engine, record or ignore)
        salt = f"pass {next(self.ids)}"
        served = run_items(self.driver, self.items, salt, self.ids)
        self.driver.settle()
        return summarize(served).total_tokens_per_s


def measure(runs: Runs, rounds: int, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Tokens/s of each mode, round by round, and bytes of files for each microbatch."""
    rng = Random("order")
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    num_bytes = num_microbatches = 0
    runs.tokens_per_s(None)  # warm-up
    for number in range(rounds):
        for mode in rng.sample(MODES, len(MODES)):
            if mode == "removed":
                rate = runs.tokens_per_s(None)
            elif mode == "ignored":
                rate = runs.tokens_per_s(ignore)
            else:
                ring, part = Ring(), folder / str(number)
                with closing(RecordingWriter(part, meta_of_driver(runs.driver))) as writer:
                    rate = runs.tokens_per_s(tee(ring.record, writer.record))
                num_bytes += sum(path.stat().st_size for path in part.glob("*.jsonl"))
                num_microbatches += len({span.index for span in ring.spans()})
            found[mode].append(rate)
        print(number, *(f"{mode} {found[mode][-1]:,.1f} tokens/s" for mode in MODES), flush=True)
    return found, num_bytes / num_microbatches


def report(found: dict[str, list[float]]) -> None:
    """Medians, and the ratios of rounds with their spread."""
    for mode in MODES:
        print(f"{mode:9} median {statistics.median(found[mode]):,.1f} tokens/s")
    for mode in MODES[:2]:
        ratios = sorted(a / b for a, b in zip(found[mode], found["removed"], strict=True))
        middle = statistics.median(ratios)
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        print(
            f"{mode} / removed: median {middle:.4f}, mean {statistics.mean(ratios):.4f} "
            f"+- {error:.4f} (standard error), {ratios[0]:.4f} to {ratios[-1]:.4f}"
        )


def driver_cost_s(folder: Path, num_chunks: int) -> float:
    """CPU time of one microbatch of two stages and so many decodes, in the driver's loop: telling
    all of it to a ring and to files, writing included."""
    chunks = tuple(Chunk(n, 345, 346, (), 4, 1) for n in range(num_chunks))
    outputs, counts = [Output(n, 17) for n in range(num_chunks)], bytes([1] * num_chunks)
    engine = SimpleNamespace(
        last=SimpleNamespace(cost=None),
        num_waiting=0,
        num_running=16,
        num_free_blocks=999,
        window=2,
    )
    meta = {"plan": {"stages": [{}, {}]}}
    span = Span(0, 9, num_chunks, *[time.monotonic()] * 6, 0.0123456789, 0.000123456789, 4096)
    number = 20_000
    with closing(RecordingWriter(folder / "driver", meta)) as writer:
        journal = Journal(engine, tee(Ring().record, writer.record))
        for n in range(num_chunks):
            journal.arrived(Request(id=n, prompt=(1,)), 1.0)
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        for index in range(number):
            now = start_s + index * 0.02
            journal.waits("window")
            journal.planned(Microbatch(index, chunks), now, now)
            journal.computed(span)
            journal.computed(span)
            journal.completed(Completed(index, now, now, now, tuple(counts)), outputs)
        writer.flush()
        return (time.thread_time() - start_cpu_s) / number


def stage_cost_s() -> float:
    """Of one microbatch on one stage: the clocks that are read, the record and its message."""

    class OldTiming(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=True):
        """What a stage told before there were recordings."""

        stage: int
        index: int
        num_tokens: int
        start_s: float
        end_s: float
        cpu_s: float

    def now() -> None:
        clocks = [time.monotonic() for _ in range(6)]
        cpu = [time.thread_time() for _ in range(2)]
        span = Span(0, 99, 33, *clocks, cpu[0], cpu[1], 4096)
        control.encode(Timing(span), 0)

    def before() -> None:
        clocks = [time.monotonic() for _ in range(2)]
        cpu = [time.thread_time() for _ in range(2)]
        control.encode(OldTiming(0, 99, 33, *clocks, cpu[1] - cpu[0]), 0)

    def best_s(call: Callable[[], None]) -> float:
        return min(timeit.repeat(call, number=1000, repeat=20)) / 1000

    return best_s(now) - best_s(before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each")
    parser.add_argument("--output", type=int, default=32, help="tokens of each")
    args = parser.parse_args()
    config = make_config({}, {"model": args.model, "pipeline_parallel_size": args.stages})
    with Driver(checkpoint_setup(config)) as driver, tempfile.TemporaryDirectory() as folder:
        runs = Runs(driver, args.requests, args.prompt, args.output)
        found, bytes_each = measure(runs, args.rounds, Path(folder))
        report(found)
        cost_s = driver_cost_s(Path(folder), args.requests)
    print(f"{bytes_each:,.0f} bytes of files a microbatch, of {args.stages} stages")
    print(f"the driver: {cost_s * 1e6:.1f} us a microbatch of {args.requests} decodes")
    print(f"a stage: {stage_cost_s() * 1e6:.1f} us a microbatch more than without its record")


if __name__ == "__main__":
    script(main)
