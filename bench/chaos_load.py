"""The load that `chaos.py` runs: requests without end, each a function of its number, so that what
came of each can be compared with an undisturbed run."""

import random

from pipeserve.core.nouns import Request, RequestId
from pipeserve.driver.driver import Driver
from pipeserve.sampling_params import SamplingParams

RUNNING = 12
NEAR = 1e-3
"""Logits that differ by less are as good as equal: their order is one of last bits."""


class Load:
    """Some greedy and some drawn."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver, self.seed = driver, seed
        self.tokens: dict[int, list[int]] = {}
        self.gaps: dict[int, list[float]] = {}
        """Between the two likeliest tokens."""
        self.ended: set[int] = set()
        self.errors: dict[int, str] = {}

    def submit(self, number: int, prompt: tuple[int, ...] = ()) -> None:
        """By default a prompt of its own."""
        draw = random.Random(f"{self.seed} {number}")
        vocab = self.driver.vocab_size
        prompt = prompt or tuple(draw.randrange(vocab) for _ in range(draw.choice([5, 40, 150])))
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

    @property
    def num_blocks_leaked(self) -> int:
        """Once all have ended."""
        return self.driver.limits.num_blocks - self.driver.engine.num_free_blocks


def compare(load: Load, undisturbed: Load) -> int:
    """Prints where they part; how many requests do so but for a gap under NEAR, or have ended by an
    error, or not at all."""
    num_near, num_wrong = 0, 0
    for number, tokens in load.tokens.items():
        expected = undisturbed.tokens[number]
        if tokens == expected and number not in load.errors:
            continue
        both = zip(tokens, expected, strict=False)
        place = next((n for n, (one, other) in enumerate(both) if one != other), None)
        gap = None if place is None else undisturbed.gaps[number][place]
        is_near = gap is not None and gap < NEAR and not number % 2
        num_near, num_wrong = num_near + is_near, num_wrong + (not is_near)
        how = "is drawn" if number % 2 else "is greedy"
        at = "" if gap is None else f" at {place} (gap {gap:.1e})"
        print(f"request {number} {how} and parts{at} {load.errors.get(number, '')}")
    print(
        f"{len(load.tokens)} requests, {sum(map(len, load.tokens.values()))} tokens: {num_wrong} "
        f"differ from an undisturbed run, {num_near} more at a logit gap under {NEAR:g}; "
        f"{len(load.errors)} ended by an error, {len(load.tokens) - len(load.ended)} not at all"
    )
    return num_wrong
