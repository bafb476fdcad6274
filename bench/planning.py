"""What planning costs: microseconds of `Engine.plan` and `Engine.complete`, by load and stages.

    python bench/planning.py [--policy uniform|sarathi_serve] [--microbatches 200]

No stage is behind it: the engine is driven by hand with invented tokens, always with its window
full, so the figures are the engine's alone. Each cell starts R requests with prompts of 100..500
tokens, prefills them, and then times a steady load: R requests decode, and every fourth microbatch
one of them is ended and a new prompt takes its place. The first tenth is warm-up. Garbage
collection stays on, as in a run. Columns: decodes and prefill tokens in a microbatch (means), then
microseconds. Compare the growth down a column with the growth of the microbatch: `plan` has to
follow the second, not the number of requests that run.
"""

import argparse
import random
import statistics
import time
from collections import deque

from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, Request, RequestId, SamplingParams, StepResult
from pipeserve.core.partition import split_layers
from pipeserve.core.policies import POLICIES, get_policy

RUNNING = (10, 100, 1_000, 10_000)
STAGES = (1, 8, 64)
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096


class Load:
    """One engine under a steady load; its clock is the count of microbatches."""

    def __init__(self, policy: str, num_running: int, num_stages: int):
        budget = max(2048, -(-num_running // num_stages) + 512)
        limits = Limits(
            num_blocks=num_running * 1500 // BLOCK_SIZE + 1000,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
        )
        plan = split_layers(num_stages, num_stages)
        self.engine = Engine(plan, get_policy(policy), limits)
        self.random = random.Random(0)
        self.flying: deque[Microbatch] = deque()
        self.started: set[RequestId] = set()
        self.next_id = 0
        for _ in range(num_running):
            self.add()

    def add(self) -> None:
        length = self.random.randint(100, 500)
        prompt = tuple(self.random.randrange(50_000) for _ in range(length))
        params = SamplingParams(max_tokens=MAX_MODEL_LEN)
        self.engine.add(Request(id=RequestId(self.next_id), prompt=prompt, params=params), 0.0)
        self.next_id += 1

    def replace_one(self) -> None:
        """The oldest request ends, and another arrives."""
        self.engine.finish(RequestId(self.next_id - self.engine.num_unfinished), "abort", 0.0)
        self.add()

    def plan(self) -> Microbatch | None:
        planned = self.engine.plan(0.0)
        if not isinstance(planned, Microbatch):
            return None
        self.flying.append(planned)
        return planned

    def complete(self) -> float:
        """Completes the oldest microbatch with invented tokens; microseconds of the call."""
        microbatch = self.flying.popleft()
        sampled = sum(chunk.num_logits for chunk in microbatch.chunks)
        tokens = tuple(self.random.randrange(50_000) for _ in range(sampled))
        result = StepResult(microbatch.index, tokens)
        elapsed, outputs = timed_us(lambda: self.engine.complete(result, 0.0))
        self.started.update(output.request_id for output in outputs)
        return elapsed

    def warm_up(self) -> None:
        """Until every request has a token and the window is full."""
        while len(self.started) < self.next_id:
            while self.plan():
                pass
            self.complete()
        while self.plan():
            pass


def timed_us(call):
    start = time.perf_counter_ns()
    value = call()
    return (time.perf_counter_ns() - start) / 1000, value


def measure(policy: str, num_running: int, num_stages: int, num_microbatches: int) -> str:
    """One row of the table."""
    load = Load(policy, num_running, num_stages)
    load.warm_up()
    plan_us, complete_us, decodes, prefill = [], [], [], []
    for step in range(num_microbatches):
        if step % 4 == 0:
            load.replace_one()
        complete_us.append(load.complete())
        elapsed, microbatch = timed_us(load.plan)
        if microbatch is None:
            continue  # nothing plannable: a few requests on many stages
        plan_us.append(elapsed)
        sizes = [chunk.num_tokens for chunk in microbatch.chunks]
        decodes.append(sum(size == 1 for size in sizes))
        prefill.append(sum(size for size in sizes if size > 1))
    skip = num_microbatches // 10
    cells = [f"{statistics.mean(decodes):8.0f} {statistics.mean(prefill):8.0f}"]
    for values in (plan_us[skip:], complete_us[skip:]):
        cells.append(f"{statistics.median(values):9.0f} {quantile(values, 0.99):9.0f}")
    return " |".join(cells)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", choices=sorted(POLICIES), default="uniform")
    parser.add_argument("--microbatches", type=int, default=200)
    args = parser.parse_args()
    print(f"policy {args.policy}; microseconds of plan and complete: median, 99th percentile")
    print(" running   P | decodes  prefill |     plan       p99 | complete       p99")
    for num_running in RUNNING:
        for num_stages in STAGES:
            row = measure(args.policy, num_running, num_stages, args.microbatches)
            print(f"{num_running:8} {num_stages:3} |{row}", flush=True)


if __name__ == "__main__":
    main()
