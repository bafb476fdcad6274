"""Random loads of the kinds that people send, each made from its seed alone.

A load is a pipeline (policy, stages, window, KV pool, limits, what it predicts with, how long
stages really take, how its clock runs) and what happens to it: requests, aborts, stop strings that
the host finds, requests that fail, faults. `load_runs.py` runs one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from model_stages import VOCAB, Story

from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.order import ORDERS
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Limits
from pipeserve.sampling_params import SamplingParams

COSTS = (
    *("none", "rough", "right", "tiled", "gpu"),
    *("learning", "dear", "cheap", "one slow stage", "garbage"),
)
"""What the policy predicts with. `rough` is what a run without a profile has; `right` and `tiled`
are the truth, which goes by whole tiles in the second; `gpu` and `learning` start from the true
profile, `dear` and `cheap` from one 30 % off; with `one slow stage` the truth has one that the
profile knows nothing of; `garbage` is told nonsense by its stages."""
CLOCKS = ("runs", "runs", "runs", "runs", "far on", "coarse", "stands still")


class Finish(NamedTuple):
    """The host ends a request: a client goes away, a stop string is there, text cannot be made."""

    reason: str
    at_s: float | None
    """None: as soon as so many of its tokens are known."""
    num_tokens: int = 0


class Fault(NamedTuple):
    stage: int
    at_s: float
    outage_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    seed: int
    policy: str
    num_stages: int
    window: int
    limits: Limits
    cost: str
    clock: str
    slow: float
    """How many times as long as predicted the true stages take."""
    arrivals: list[tuple[float, Request]]
    """By time."""
    finishes: dict[RequestId, Finish] = field(default_factory=dict)
    fails: dict[RequestId, int] = field(default_factory=dict)
    """Positions from which on a request's logits are not finite."""
    faults: list[Fault] = field(default_factory=list)
    kinds: tuple[str, ...] = ()

    def __str__(self) -> str:
        limits = self.limits
        return (
            f"load {self.seed}: {self.policy} P={self.num_stages} window={self.window} "
            f"cost={self.cost} clock={self.clock} {'+'.join(self.kinds)}, "
            f"{len(self.arrivals)} requests, {len(self.finishes)} ended, {len(self.fails)} fail, "
            f"{len(self.faults)} faults, {limits.num_blocks} blocks of {limits.block_size}, "
            f"{limits.max_num_seqs} seqs, {limits.max_num_batched_tokens} tokens, "
            f"SLO {limits.max_tbt_s}, caching {limits.enable_prefix_caching}, {limits.order}"
        )


# ---- what is sent -------------------------------------------------------------------------------

Lengths = tuple[int, int]


class Sender:
    """Makes requests: numbers them, spreads them in time, and gives some of them odd wishes."""

    def __init__(self, rng: random.Random, longest: int):
        self.rng = rng
        self.longest = longest
        """Tokens of a request, prompt and output."""
        self.now = 0.0
        self.sent: list[tuple[float, Request]] = []
        self.stop_share = rng.choice((0.0, 0.0, 0.3))
        self.score_share = rng.choice((0.0, 0.0, 0.0, 0.2))

    def tokens(self, length: int) -> tuple[int, ...]:
        return tuple(self.rng.choices(range(VOCAB), k=length))

    def send(self, prompt: tuple[int, ...], max_tokens: int, **fields) -> Request:
        rng = self.rng
        prompt = prompt[: self.longest - 1]
        if "num_imported" in fields:
            fields["num_imported"] = min(fields["num_imported"], len(prompt) - 1)
        scored = rng.random() < self.score_share and not fields.get("num_imported")
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, 2)),
            seed=len(self.sent),
            prompt_logprobs=0 if scored else None,
        )
        stops = rng.random() < self.stop_share
        request = Request(
            id=RequestId(len(self.sent)),
            prompt=prompt,
            params=params,
            stop_ids=frozenset({rng.randrange(VOCAB)} if stops else ()),
            **fields,
        )
        self.sent.append((self.now, request))
        return request

    def pause(self, mean_s: float) -> None:
        if mean_s:
            self.now += self.rng.expovariate(1 / mean_s)


def one_token_jobs(sender: Sender, num: int) -> None:
    """A classification: one token of each prompt."""
    head = sender.tokens(sender.rng.choice((0, 3, 20)))
    for _ in range(num):
        sender.send(head + sender.tokens(sender.rng.randint(1, 12)), 1)


def chat(sender: Sender, num: int) -> None:
    """Prompts and answers of all lengths, as they come."""
    mean_s = sender.rng.choice((0.0, 0.01, 0.1))
    for _ in range(num):
        sender.send(sender.tokens(sender.rng.randint(1, 80)), sender.rng.randint(1, 40))
        sender.pause(mean_s)


def equal_prompts(sender: Sender, num: int) -> None:
    """Bursts of the same prompt, some with a tail or a salt of their own."""
    rng = sender.rng
    prompt = sender.tokens(rng.randint(1, 64))
    for _ in range(num):
        tail = sender.tokens(rng.choice((0, 0, 0, 1, 5)))
        salt, there = rng.choice(("", "", "", "own")), rng.choice((0, 0, 0, len(prompt) - 1))
        sender.send(prompt + tail, rng.randint(1, 10), cache_salt=salt, num_imported=there)
        if rng.random() < 0.1:
            sender.pause(0.3)


def document(sender: Sender, num: int) -> None:
    """Decodes that go on, and one prompt as long as can be among them."""
    for _ in range(min(num, 30)):
        sender.send(sender.tokens(sender.rng.randint(1, 6)), sender.rng.randint(20, 60))
    sender.pause(0.2)
    sender.send(sender.tokens(sender.longest - sender.rng.randint(1, 4)), sender.rng.randint(1, 4))


def long_prompts(sender: Sender, num: int) -> None:
    """As long as their answers are, or longer: they come one after another, in many chunks."""
    for _ in range(min(num, 20)):
        length = sender.rng.randint(sender.longest // 3, sender.longest)
        sender.send(sender.tokens(length), sender.rng.randint(1, sender.longest // 3))
        sender.pause(0.03)


def samples(sender: Sender, num: int) -> None:
    """Several answers to each prompt."""
    while num > 0:
        prompt = sender.tokens(sender.rng.randint(1, 50))
        n, max_tokens = sender.rng.randint(2, 6), sender.rng.randint(1, 16)
        first = sender.send(prompt, max_tokens)
        for _ in range(n - 1):
            sender.send(prompt, max_tokens, sample_of=first.id)
        sender.pause(0.05)
        num -= n


def turns(sender: Sender, num: int) -> None:
    """Conversations: the next prompt is the last one with its answer and a new question."""
    said: list[Request] = []
    for _ in range(num):
        prompt = sender.tokens(sender.rng.randint(1, 20))
        if said and sender.rng.random() < 0.7:
            before = said.pop(sender.rng.randrange(len(said)))
            prompt = tuple(Story(before, sender.longest).tokens) + prompt
        said.append(sender.send(prompt, sender.rng.randint(1, 10)))
        sender.pause(sender.rng.choice((0.0, 0.1)))


def imports(sender: Sender, num: int) -> None:
    """Prompts whose KV comes from elsewhere, all of it but the last or a part."""
    for _ in range(num):
        length = sender.rng.randint(1, 60)
        there = sender.rng.choice((length - 1, sender.rng.randrange(length)))
        sender.send(sender.tokens(length), sender.rng.randint(1, 20), num_imported=there)
        sender.pause(0.02)


def as_long_as_can_be(sender: Sender, num: int) -> None:
    """Each would fill what it may."""
    for _ in range(min(num, 8)):
        length = sender.rng.choice((1, sender.longest // 2, sender.longest - 1))
        sender.send(sender.tokens(max(1, length)), sender.longest)
        sender.pause(sender.rng.choice((0.0, 0.5)))


KINDS: dict[str, Callable[[Sender, int], None]] = {
    "one-token jobs": one_token_jobs,
    "chat": chat,
    "equal prompts": equal_prompts,
    "document": document,
    "long prompts": long_prompts,
    "samples": samples,
    "turns": turns,
    "imports": imports,
    "as long as can be": as_long_as_can_be,
}


# ---- loads --------------------------------------------------------------------------------------


OTHERS = [name for name in POLICIES if name != "uniform"]


def policy_of(seed: int) -> str:
    """Every fourth load is of the default, which has most to go wrong; the others take turns."""
    turn, place = divmod(seed, 4)
    return OTHERS[(3 * turn + place - 1) % len(OTHERS)] if place else "uniform"


def make_load(seed: int) -> Load:
    rng = random.Random(f"load {seed}")
    policy = policy_of(seed)
    longest = rng.choice((24, 100, 100, 256))
    sender = Sender(rng, longest)
    kinds = tuple(rng.choices(list(KINDS), k=rng.choice((1, 2, 2, 3))))
    if rng.random() < 0.2:
        kinds = ("one-token jobs", *rng.choices(("chat", "turns", "document")))
    most = rng.choice((4, 15, 40, 40, 100, 200, 200))
    for kind in kinds:
        KINDS[kind](sender, -(-most // len(kinds)))
        sender.pause(rng.choice((0.0, 0.1, 3.0)))
    num_stages = rng.choice((1, 2, *range(1, 9)))
    max_num_seqs = rng.choice((1, 2, 8, 32, 256, 256))
    budget = rng.choice((1, 2, 7, 32, 64, 512, 512, 2048))
    arrivals = sender.sent[: 20 if min(max_num_seqs, budget) < 8 else 200]
    order, arrivals = _ordered(seed, arrivals)
    return Load(
        seed=seed,
        policy=policy,
        num_stages=num_stages,
        window=rng.choice((num_stages, num_stages, rng.randint(1, num_stages + 2))),
        limits=_limits(rng, policy, order, arrivals, longest, max_num_seqs, budget),
        cost=rng.choice(COSTS),
        clock=rng.choice(CLOCKS),
        slow=rng.choice((1.0, 1.0, 0.1, 5.0, 0.0)),
        arrivals=arrivals,
        finishes=_finishes(rng, arrivals),
        fails=_fails(rng, arrivals),
        faults=_faults(rng, num_stages, sender.now),
        kinds=kinds,
    )


def _ordered(seed: int, arrivals: list) -> tuple[str, list]:
    """As many under each order."""
    rng = random.Random(f"order {seed}")
    order = rng.choice(tuple(ORDERS))
    most = rng.choice((1, 3, 1000))
    return order, [(at_s, replace(r, priority=rng.randint(-most, most))) for at_s, r in arrivals]


def _limits(
    rng: random.Random,
    policy: str,
    order: str,
    arrivals: list,
    longest: int,
    max_num_seqs: int,
    budget: int,
) -> Limits:
    """A pool of what the largest request can reach, upward."""
    block_size = rng.choice((1, 4, 16, 16))
    reach = max([min(len(r.prompt) + r.params.max_tokens, longest) - 1 for _, r in arrivals])
    extra = rng.choice((0, 1, *[rng.randint(0, times * reach) for times in (1, 3, 30)]))
    if get_policy(policy).traits.whole_prompts:
        budget += longest
    return Limits(
        num_blocks=-(-reach // block_size) + -(-extra // block_size),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=longest,
        enable_prefix_caching=rng.random() < 0.7,
        max_tbt_s=rng.choice((None, None, 1e-6, 0.05, 0.3, 100.0)),
        order=order,
    )


def _finishes(rng: random.Random, arrivals: list) -> dict[RequestId, Finish]:
    share = rng.choice((0.0, 0.0, 0.1, 0.5))
    everyone_leaves_s = rng.uniform(0, 2) if rng.random() < 0.05 else None
    finishes = {}
    for at_s, request in arrivals:
        if everyone_leaves_s is not None:
            finishes[request.id] = Finish("abort", max(at_s, everyone_leaves_s))
        elif rng.random() < share:
            reason = rng.choice(("abort", "stop", "error"))
            later_s = at_s + rng.choice((0.0, rng.expovariate(1.0)))
            finishes[request.id] = (
                Finish(reason, later_s)
                if reason == "abort"
                else Finish(reason, None, rng.randint(1, 6))
            )
    return finishes


def _fails(rng: random.Random, arrivals: list) -> dict[RequestId, int]:
    share = rng.choice((0.0, 0.0, 0.1, 0.4))
    return {
        request.id: rng.randrange(len(request.prompt) + rng.choice((1, 10)))
        for _, request in arrivals
        if rng.random() < share
    }


def _faults(rng: random.Random, num_stages: int, until_s: float) -> list[Fault]:
    times = sorted([rng.uniform(0, until_s + 1) for _ in range(rng.choice((0, 0, 0, 1, 3)))])
    return [Fault(rng.randrange(num_stages), at, rng.choice((0.0, 0.5))) for at in times]
