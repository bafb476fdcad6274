"""What planning costs: microseconds of `Engine.plan` and `Engine.complete`, by load and stages.

    python bench/planning.py [--policy uniform|sarathi_serve] [--microbatches 200]

No stage is behind it: the engine is driven by hand with invented tokens, always with its window
full, so the figures are the engine's alone; its clock is when each result would come by a cost
model of Falcon-180B on A100s, with which `uniform` plans. Each cell starts R requests with prompts
of 100..500 tokens, whose KV is there, and times a steady load: R requests decode, 300 wait, and
every fourth microbatch one of them is ended and a new prompt arrives. The limit between tokens is
what a turn of full microbatches takes, so that it binds. The first tenth is warm-up. Columns:
decodes and prefill tokens in a microbatch (means); microseconds of this thread's CPU time, which
hardly depends on what else the machine does; garbage collections, as in a run of a command, and
the longest of them. Compare the growth down a column with the growth of the
microbatch: `plan` has to follow the second, not the number of requests that run.
"""

import argparse
import random
import statistics
import time
from collections import deque

from pauses import Collections

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.forecast import Forecast
from pipeserve.core.nouns import Microbatch, Request, RequestId, StepResult, one_each
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.work import Work
from pipeserve.launch.run.collector import no_pauses
from pipeserve.sampling_params import SamplingParams

RUNNING = (10, 100, 1_000, 10_000)
STAGES = (2, 4, 8, 16, 32, 64)
WAITING = 300
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096


class Load:
    """One engine under a steady load; its clock is what the cost model predicts."""

    def __init__(self, policy: str, num_running: int, num_stages: int):
        shape = load_shape("falcon-180b")
        plan = split_layers(shape.num_layers, num_stages)
        self.cost = PipelineCost(load_profile("a100-80gb-dgx"), shape, plan)
        num_decodes = -(-num_running // num_stages)
        full = Work(num_decodes + 512, num_decodes, ((0, 512),), num_decodes, 400 * num_decodes)
        limits = Limits(
            num_blocks=num_running * 1500 // BLOCK_SIZE + 1000,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=max(2048, num_decodes + 512),
            max_model_len=MAX_MODEL_LEN,
            max_tbt_s=num_stages * max(self.cost.seconds(full)),
        )
        self.engine = Engine(plan, get_policy(policy), limits, self.cost)
        self.forecast = Forecast(num_stages)
        self.now = 0.0
        self.num_running = num_running
        self.random = random.Random(0)
        self.flying: deque[Microbatch] = deque()
        self.started: deque[RequestId] = deque()
        self.begun: set[RequestId] = set()
        self.next_id = 0
        for number in range(num_running + WAITING):
            self.add(imports=number < num_running)

    def add(self, imports: bool = False) -> None:
        """`imports`: all but the last position, so that a load is there at once."""
        length = self.random.randint(100, 500)
        prompt = tuple(self.random.randrange(50_000) for _ in range(length))
        params = SamplingParams(max_tokens=MAX_MODEL_LEN)
        request = Request(
            id=RequestId(self.next_id),
            prompt=prompt,
            params=params,
            num_imported=imports * (length - 1),
        )
        self.engine.add(request, self.now)
        self.next_id += 1

    def replace_one(self) -> None:
        """The request that got its first token first ends, and another arrives."""
        self.engine.finish(self.started.popleft(), "abort", self.now)
        self.add()

    def plan(self) -> Microbatch | None:
        planned = self.engine.plan(self.now)
        return planned if isinstance(planned, Microbatch) else None

    def send(self, planned: Microbatch) -> None:
        self.flying.append(planned)
        seconds = self.cost.predict(planned).seconds
        sources = {c.token_from for c in planned.chunks if c.token_from is not None}
        ready_s = max([self.now, *map(self.forecast.known_s, sources)])
        self.forecast.planned(planned.index, seconds, ready_s)

    def complete(self) -> float:
        """Completes the oldest microbatch with invented tokens; microseconds of the call."""
        microbatch = self.flying.popleft()
        self.now = self.forecast.known_s(microbatch.index)
        self.forecast.completed(microbatch.index, self.now)
        counts = one_each(microbatch.chunks)
        tokens = tuple(self.random.randrange(50_000) for _ in range(sum(counts)))
        result = StepResult(microbatch.index, tokens, counts)
        elapsed, outputs = timed_us(lambda: self.engine.complete(result, self.now))
        new = [o.request_id for o in outputs if o.request_id not in self.begun]
        self.begun.update(new)
        self.started.extend(new)
        return elapsed

    def warm_up(self) -> None:
        """Until as many requests as may run have a token, and the window is full."""
        while len(self.started) < self.num_running:
            self.fill()
            self.complete()
        self.fill()

    def fill(self) -> None:
        while (planned := self.plan()) is not None:
            self.send(planned)


def timed_us(call):
    start = time.thread_time_ns()
    value = call()
    return (time.thread_time_ns() - start) / 1000, value


def measure(policy: str, num_running: int, num_stages: int, num_microbatches: int) -> str:
    """One row of the table."""
    plan_us, complete_us, decodes, prefill = [], [], [], []
    with no_pauses() as collect, Collections() as collections:
        load = Load(policy, num_running, num_stages)
        load.warm_up()
        collect()
        for step in range(num_microbatches):
            if step % 4 == 0:
                load.replace_one()
            complete_us.append(load.complete())
            elapsed, microbatch = timed_us(load.plan)
            if microbatch is None:
                continue  # nothing plannable: a few requests on many stages
            load.send(microbatch)
            collect()
            plan_us.append(elapsed)
            sizes = [chunk.num_tokens for chunk in microbatch.chunks]
            decodes.append(sum(size == 1 for size in sizes))
            prefill.append(sum(size for size in sizes if size > 1))
    skip = num_microbatches // 10
    cells = [f"{statistics.mean(decodes):8.0f} {statistics.mean(prefill):8.0f}"]
    for values in (plan_us[skip:], complete_us[skip:]):
        figures = statistics.median(values), quantile(values, 0.99), max(values)
        cells.append("".join(f"{figure:9.0f}" for figure in figures))
    cpu_s = [s for clock in collections.clocks for s in clock.cpu_s]
    cells.append(f"{len(cpu_s):6} {1e6 * max(cpu_s, default=0.0):8.0f}")
    return " |".join(cells)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=sorted(POLICIES), default="uniform")
    parser.add_argument("--microbatches", type=int, default=200)
    parser.add_argument("--running", type=int, nargs="*", help="requests; all sizes by default")
    parser.add_argument("--stages", type=int, nargs="*", help="likewise")
    args = parser.parse_args()
    print(f"policy {args.policy}; microseconds of plan, complete and the longest collection")
    print(
        " running   P | decodes  prefill |     plan      P99     most | complete      P99     most"
        " | collections"
    )
    for num_running in args.running or RUNNING:
        for num_stages in args.stages or STAGES:
            row = measure(args.policy, num_running, num_stages, args.microbatches)
            print(f"{num_running:8} {num_stages:3} |{row}", flush=True)


if __name__ == "__main__":
    main()
