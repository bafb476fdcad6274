"""What metrics cost: the driver that tells of its stages, and the server that counts and is asked.

    python bench/metrics_cost.py [--pairs 200] [--seqs 320] [--seconds 0.5]

LLaMA2-70B on emulated A100s, five stages of about 10 ms; so many requests run at a time, all of
them decoding. One driver serves on and on as `pipeserve serve`'s does (what comes is encoded for a
client, and the figures are asked for twice a second), for a while with the figures and for a while
without, in turn. What else the machine does moves both; so it is the neighbours that are compared,
and the median of their ratios is told with the interval that has it in 95 of 100 such runs. CPU
time is the driver's thread; that of the figures' process is told apart. Last, timed by themselves:
what one microbatch costs the driver to tell, and what a token costs the server to count and a
scrape of `/metrics` to answer. It takes 4 minutes.
"""

import argparse
import gc
import math
import os
import statistics
import time
from itertools import count
from pathlib import Path
from random import Random

from pipeserve.configs import load_recipe, make_config
from pipeserve.core.nouns import Begun, Output, Request, RequestId
from pipeserve.core.records import Record, ignore
from pipeserve.driver.driver import Driver
from pipeserve.driver.serving import _figures
from pipeserve.frontend.completion import Delta, Generation
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.run.figures import RunningFigures
from pipeserve.profiling.recording.packed import pack
from pipeserve.sampling_params import SamplingParams
from pipeserve.server.metrics import Metrics
from pipeserve.wire import client

_STATUS_S = 0.5
_TURN = 5.25
"""Microbatches that the requests which run are spread over: five stages, and some planned ahead."""
_MAX_TOKENS = 12_000


class Serving:
    """Requests that decode on and on, on one driver."""

    def __init__(self, driver: Driver, figures: RunningFigures) -> None:
        self._driver, self._figures = driver, figures
        self._numbers = map(RequestId, count())
        self._draw = Random(0).randint
        self._told_s = 0.0

    def begin(self, num_seqs: int) -> None:
        self._driver.submit([self._request() for _ in range(num_seqs)])
        self.run(2.0, is_watched=True)  # until all decode

    def _request(self) -> Request:
        prompt = tuple(self._draw(0, 1000) for _ in range(16))
        params = SamplingParams(max_tokens=_MAX_TOKENS, ignore_eos=True, seed=0)
        return Request(id=next(self._numbers), prompt=prompt, params=params)

    def run(self, seconds: float, is_watched: bool) -> tuple[float, int]:
        """CPU seconds of this thread, and microbatches."""
        driver = self._driver
        driver.journal._record = self._figures.record if is_watched else ignore
        first, start_s = _index(driver), time.thread_time()
        stop_s = time.monotonic() + seconds
        while (now := time.monotonic()) < stop_s:
            outputs = driver.outputs(_STATUS_S)
            if outputs:
                client.encode(client.Came(outputs))
            if now - self._told_s > _STATUS_S:
                self._told_s = now
                stages = self._figures.latest() if is_watched else []
                client.encode(client.Status(0.0, "", [], {}, stages))
        return time.thread_time() - start_s, _index(driver) - first

    def records(self, seconds: float) -> list[Record]:
        """What is told in so many seconds."""
        told: list[Record] = []
        self._driver.journal._record = told.append
        stop_s = time.monotonic() + seconds
        while time.monotonic() < stop_s:
            self._driver.outputs(_STATUS_S)
        self._driver.journal._record = ignore
        return told


def _index(driver: Driver) -> int:
    """Of the microbatch planned last."""
    last = driver.engine.last
    return -1 if last is None else last.index


def packing_s(records: list[Record]) -> float:
    """CPU seconds of packing them."""
    start_s, page = time.thread_time(), bytearray()
    for record in records:
        pack(record, page)
    return time.thread_time() - start_s


def server_costs(driver: Driver, stages: list[client.StageFigures]) -> tuple[float, float]:
    """CPU seconds of the server: of counting a token, and of answering a scrape."""
    num_requests, num_tokens, num_scrapes = 200, 50, 20
    metrics = Metrics("bench")
    metrics.opened(client.Opened(driver.config, driver.limits, "", driver.vocab_size, ()))
    metrics.pipeline.status = client.Status(0.0, "", [], _figures(driver), stages)
    params = SamplingParams(max_tokens=num_tokens)
    requests = [Request(id=RequestId(each), prompt=(1,), params=params) for each in range(200)]
    metrics.requests.submitted([Generation(0, 0, {0}, each, None) for each in requests])
    came = []
    for place in range(num_tokens):
        reason = "length" if place == num_tokens - 1 else None
        begun = None if place else Begun(num_cached=0, queued_s=0.01, prefill_s=0.02)
        for each in requests:
            output = Output(each.id, 1, reason, begun=begun)
            delta = Delta(0, 0, each.prompt, (1,), "a", reason, reason is not None, None, None)
            came.append((output, delta))
    start_s = time.thread_time()
    for output, delta in came:
        metrics.requests.came(output, delta)
    token_s = (time.thread_time() - start_s) / (num_requests * num_tokens)
    start_s = time.thread_time()
    for _ in range(num_scrapes):
        metrics.text()
    return token_s, (time.thread_time() - start_s) / num_scrapes


def median_with_interval(values: list[float]) -> tuple[float, float, float]:
    """And the values between which it is in 95 of 100 cases, however they are distributed."""
    ordered, middle = sorted(values), len(values) / 2
    reach = 0.98 * math.sqrt(len(values))
    low, high = max(0, math.floor(middle - reach)), min(len(values) - 1, math.ceil(middle + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    return (
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seqs", type=int, default=320, help="requests that run at a time")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each part of a pair")
    args = parser.parse_args()
    flags = {
        "pipeline_parallel_size": 5,
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": int(args.seqs / _TURN) + 32,
        "max_num_seqs": args.seqs,
        "device": "emulated",
    }
    config = make_config(load_recipe("llama2-70b-2x4xa100"), flags)
    with RunningFigures(5) as figures, Driver(emulated_setup(config)) as driver:
        gc.collect()
        gc.freeze()
        serving, pid = Serving(driver, figures), figures._process.pid
        serving.begin(args.seqs)
        before_s, cost_s, num_watched = cpu_s_of(pid), {True: [], False: []}, 0
        for number in range(args.pairs):
            for is_watched in (True, False) if number % 2 else (False, True):
                cpu_s, num_microbatches = serving.run(args.seconds, is_watched)
                cost_s[is_watched].append(cpu_s / num_microbatches)
                num_watched += num_microbatches * is_watched
        beside_s, memory = cpu_s_of(pid) - before_s, resident_mib(pid)
        records = serving.records(4.0)
        num_told = sum(type(record).__name__ == "Planned" for record in records)
        alone_s = min(packing_s(records) for _ in range(5)) / num_told
        token_s, scrape_s = server_costs(driver, figures.latest())
    ratio, low, high = median_with_interval(
        [a / b for a, b in zip(cost_s[True], cost_s[False], strict=True)]
    )
    print(
        f"the driver: without {1e6 * statistics.median(cost_s[False]):.0f} us a microbatch, with "
        f"{1e6 * statistics.median(cost_s[True]):.0f} us (medians); ratio of neighbours: median "
        f"{ratio:.4f} ({low:.4f} to {high:.4f})"
    )
    print(
        f"the figures' process: {1e6 * beside_s / num_watched:.0f} us a microbatch that it was "
        f"told of, {memory:.0f} MiB"
    )
    print(f"packing what is told of a microbatch, alone: {1e6 * alone_s:.1f} us")
    print(f"the server: {1e6 * token_s:.1f} us to count a token, {1e3 * scrape_s:.1f} ms a scrape")


if __name__ == "__main__":
    main()
