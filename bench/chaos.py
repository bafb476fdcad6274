"""Kills and stops stages of a pipeline under load, and compares every token with an undisturbed
run.

    python bench/chaos.py [MODEL] [--faults 20] [--seed 0]

Float32, three stages. A fault is a random stage's process, killed or stopped at a random moment.
What is printed: how long until the stage was named, and until the next token came.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import time

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.sampling_params import SamplingParams

STAGES = 3
RUNNING = 12
LONGEST_S = 120.0
"""Until a fault is over."""


class Load:
    """Requests without end, some greedy and some drawn, each a function of its number."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver, self.seed = driver, seed
        self.tokens: dict[int, list[int]] = {}
        self.gaps: dict[int, list[float]] = {}
        """Between the two likeliest tokens."""
        self.ended: set[int] = set()
        self.errors: dict[int, str] = {}

    def submit(self, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        vocab = self.driver.vocab_size
        prompt = tuple(draw.randrange(vocab) for _ in range(draw.choice([5, 40, 150])))
        params = SamplingParams(
            max_tokens=draw.choice([20, 60, 120]),
            temperature=1.0 * (number % 2),
            seed=number,
            ignore_eos=True,
            logprobs=2,
        )
        self.driver.submit([Request(id=RequestId(number), prompt=prompt, params=params)])
        self.tokens[number], self.gaps[number] = [], []

    def refill(self) -> None:
        while self.driver.engine.num_unfinished < RUNNING:
            self.submit(len(self.tokens))

    def step(self) -> int:
        """How many tokens came."""
        num_tokens = 0
        for output in self.driver.outputs(0.1):
            if output.token is not None:
                self.tokens[output.request_id].append(output.token)
                first, second, *_ = output.logprobs.top.values()
                self.gaps[output.request_id].append(first - second)
                num_tokens += 1
            if output.finish_reason is not None:
                self.ended.add(output.request_id)
            if output.error:
                self.errors[output.request_id] = output.error
        return num_tokens

    def drain(self) -> None:
        while self.driver.engine.num_unfinished:
            self.step()


def fault(load: Load, draw: random.Random) -> tuple[str, float, float]:
    """One, and the seconds until it was named, and until tokens came again."""
    until_s = time.monotonic() + draw.uniform(2.0, 6.0)
    while time.monotonic() < until_s:
        load.refill()
        load.step()
    driver = load.driver
    stage, kind = draw.randrange(STAGES), draw.choice([signal.SIGKILL, signal.SIGSTOP])
    num_losses = driver.losses.counts[stage]
    began_s = time.monotonic()
    os.kill(driver.stages[stage].pid, kind)
    named_s = None
    while True:
        load.refill()
        num_tokens = load.step()
        now = time.monotonic()
        if named_s is None and driver.losses.counts[stage] > num_losses:
            named_s = now - began_s
        if named_s is not None and not driver.losses.trouble and num_tokens:
            return f"{kind.name} of stage {stage}", named_s, now - began_s
        if now - began_s > LONGEST_S:
            raise SystemExit(f"{kind.name} of stage {stage}: not over after {LONGEST_S:g} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = make_config(
        {},
        {
            "model": options.model,
            "dtype": "float32",
            "pipeline_parallel_size": STAGES,
            "max_num_batched_tokens": 256,
            "max_model_len": 512,
            "num_gpu_blocks_override": 400,
            "max_restarts": 1000,
        },
    )
    draw = random.Random(options.seed)
    named, served = [], []
    with Driver(checkpoint_setup(config)) as driver:
        load = Load(driver, options.seed)
        for number in range(options.faults):
            what, named_s, served_s = fault(load, draw)
            named.append(named_s)
            served.append(served_s)
            print(
                f"{number + 1}: {what}: named {named_s:.2f} s, tokens {served_s:.2f} s", flush=True
            )
        load.drain()
        num_blocks_left = driver.limits.num_blocks - driver.engine.num_free_blocks
        num_losses = sum(driver.losses.counts)
    with Driver(checkpoint_setup(config)) as driver:
        undisturbed = Load(driver, options.seed)
        while len(undisturbed.tokens) < len(load.tokens):
            undisturbed.submit(len(undisturbed.tokens))
        undisturbed.drain()
    wrong = [each for each in load.tokens if load.tokens[each] != undisturbed.tokens[each]]
    for number in wrong:
        both = zip(load.tokens[number], undisturbed.tokens[number], strict=False)
        place = next((n for n, (one, other) in enumerate(both) if one != other), None)
        how = "is drawn" if number % 2 else "is greedy"
        gap = "" if place is None else f" at {place} (gap {undisturbed.gaps[number][place]:.1e})"
        print(f"request {number} {how} and parts{gap} {load.errors.get(number, '')}")
    print(
        f"{len(load.tokens)} requests, {sum(map(len, load.tokens.values()))} tokens; "
        f"{len(wrong)} differ from an undisturbed run {wrong[:5]}, {len(load.errors)} ended by an "
        f"error, {len(load.tokens) - len(load.ended)} not at all; {num_blocks_left} blocks leaked; "
        f"{num_losses - options.faults} losses beyond those of the faults"
    )
    for what, seconds in (("named", named), ("tokens again", served)):
        print(f"{what}: median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s")
    return 1 if wrong or load.errors or num_blocks_left else 0


if __name__ == "__main__":
    sys.exit(main())
