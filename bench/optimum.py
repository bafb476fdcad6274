"""How far `uniform` is from the best schedule: instances small enough to search.

    python bench/optimum.py [--tries 300] [--no-limit] [--page docs/schedules.md]

P stages alike (`TIMES`), up to 12 requests. Either all come at once and the figure is the makespan,
or they arrive and it is the mean normalised latency (seconds from arrival to end, for each output
token) with no more tokens over the limit between tokens than `uniform` has (who is told of it, but
with `--no-limit`, which is the default of real stages). The best schedule is
found by hill climbing from that of `uniform`: whenever it decides, the number of decodes, the
prefill tokens, or which prompt goes first may be another, and from there on `uniform` goes on. Each
kind of decision is also searched alone: what that gains is what the kind loses. Beside it stands a
lower bound (`least_makespan_s`, `least_latency_s`), which no schedule need reach.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from report import plain_table, show

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, RequestId, StageCost
from pipeserve.core.policies.uniform import Uniform
from pipeserve.core.view import Draft, View
from pipeserve.core.work import Work, work_of
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    Served,
    SimulatedPipeline,
    Simulation,
)
from pipeserve.profiling.simulation.stage_times import StageTimes

_AT_ONCE = (1, 1, 2, 4, 16, 64)
"""So many decisions in a row are changed alike."""
KINDS = ("decodes", "prefill", "first")
"""How many decodes go now, how many prefill tokens, and which prompt goes first."""
SLO_S = 1.0
LIMITS = Limits(
    num_blocks=4000, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048,
    max_model_len=8192, enable_prefix_caching=False, max_tbt_s=SLO_S, order="sjf",
)  # fmt: skip


class Times(StageTimes):
    """About a stage of Falcon-180B over eight A100: weights, tokens, and context that is read. Also
    what the policy predicts with, for a schedule is asked for here and not a prediction."""

    control_s = 0.0
    base_s, token_s, position_s = 0.03, 1.5e-4, 3e-7

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages

    def seconds(self, work: Work) -> Sequence[float]:
        each = self.base_s + self.token_s * work.num_tokens + self.position_s * work.context
        return (each,) * self._num_stages

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        return self.seconds(work_of(microbatch))

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return (0.0,) * (self._num_stages - 1)

    def predict(self, microbatch: Microbatch) -> StageCost:
        return StageCost(tuple(self.compute_s(microbatch)))

    def observe(self, index: int, stage: int, seconds: float) -> None:
        pass


Choices = dict[tuple[int, str], int]
"""(number of the decision, kind) -> what is decided instead."""


class Steered(Uniform):
    """`uniform`, but for these choices."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self._choices = choices
        self.num_decisions = 0

    def compose(self, view: View, now: float) -> Draft:
        number = self.num_decisions
        self.num_decisions += 1
        given = {kind: self._choices.get((number, kind)) for kind in KINDS}
        draft = super().compose(view, now)
        if given == dict.fromkeys(KINDS) or draft.preempt:
            return draft
        decodes = [each for each in draft.chunks if each in view.decodes]
        if given["decodes"] is not None:
            decodes = list(view.decodes)[: given["decodes"]]
        tokens = sum(count for each, count in draft.chunks.items() if each not in view.decodes)
        if given["prefill"] is not None:
            tokens = given["prefill"]
        steered = _fill(view, decodes, tokens, given["first"] or 0)
        # Something has to be under way.
        return steered if steered.chunks or view.outstanding else draft


def _fill(view: View, decodes: Sequence[RequestId], tokens: int, first: int) -> Draft:
    """These decodes, and so many prefill tokens; the prompt that is `first` in order goes first."""
    prompts = sorted(
        [*view.prefills.values(), *view.waiting.values()], key=lambda each: each.precedence
    )
    if prompts:
        prompts.insert(0, prompts.pop(first % len(prompts)))
    room = LIMITS.max_num_batched_tokens - len(decodes)
    tokens, chunks, admit = min(tokens, room), {}, {}
    for prompt in prompts:
        if tokens <= 0:
            break
        chunks[prompt.id] = min(tokens, prompt.num_unplanned)
        tokens -= chunks[prompt.id]
        if prompt.id in view.waiting:
            admit[prompt.id] = prompt.num_known
    return Draft(chunks=chunks | dict.fromkeys(decodes, 1), admit=admit)


# ---- what a schedule is worth -------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    num_stages: int
    arrivals: Sequence[Arrival]
    figure: Callable[[Sequence[Served]], float]
    least: Callable[["Instance"], float]
    """A lower bound of the figure."""
    limits: Limits = LIMITS

    def run(self, choices: Choices) -> tuple[list[Served], int]:
        """The requests as served, and how many decisions there were."""
        times = Times(self.num_stages)
        plan = split_layers(self.num_stages, self.num_stages)
        engine = Engine(plan, policy := Steered(choices), self.limits, times)
        simulation = Simulation(SimulatedPipeline(engine, times), self.arrivals)
        simulation.run_until()
        return simulation.served, policy.num_decisions


def makespan_s(served: Sequence[Served]) -> float:
    return max(each.token_times_s[-1] for each in served)


def latency_s(served: Sequence[Served]) -> float:
    """Normalised, mean."""
    return fmean((s.token_times_s[-1] - s.arrival_s) / s.max_tokens for s in served)


def num_late(served: Sequence[Served]) -> int:
    gaps = (b - a for each in served for a, b in pairwise(each.token_times_s))
    return sum(gap > SLO_S + 1e-9 for gap in gaps)


def least_makespan_s(instance: Instance) -> float:
    """No stage works less than for all tokens and their context, in as many microbatches as the
    longest output has tokens, and it begins or ends a stage's least time after or before others."""
    t, arrivals = Times, instance.arrivals
    tokens = sum(each.num_prompt_tokens + each.max_tokens - 1 for each in arrivals)
    context = sum(
        sum(range(each.num_prompt_tokens + 1, each.num_prompt_tokens + each.max_tokens))
        for each in arrivals
    )
    most = max(each.max_tokens for each in arrivals)
    work_s = most * t.base_s + tokens * t.token_s + context * t.position_s
    fill_s = (instance.num_stages - 1) * (t.base_s + t.token_s)
    return max(work_s + fill_s, *[_alone_s(instance.num_stages, each) for each in arrivals])


def least_latency_s(instance: Instance) -> float:
    """Each request as if it were alone."""
    return fmean(
        _alone_s(instance.num_stages, each) / each.max_tokens for each in instance.arrivals
    )


def _alone_s(num_stages: int, arrival: Arrival) -> float:
    """The prompt through one stage, its last token through the others, and each decode through
    all."""
    t = Times
    prompt_s = t.base_s + t.token_s * arrival.num_prompt_tokens
    decodes_s = sum(
        t.base_s + t.token_s + t.position_s * (arrival.num_prompt_tokens + number)
        for number in range(1, arrival.max_tokens)
    )
    return prompt_s + (num_stages - 1) * (t.base_s + t.token_s) + num_stages * decodes_s


# ---- the search ---------------------------------------------------------------------------------


def best_of(instance: Instance, kinds: Sequence[str], tries: int, rng: Random) -> float:
    """The best figure that hill climbing finds by changing decisions of these kinds."""
    served, num_decisions = instance.run(choices := {})
    allowed, best = num_late(served), instance.figure(served)
    for _ in range(tries):
        changed, kind = dict(choices), rng.choice(kinds)
        start, value = rng.randrange(num_decisions), _some(kind, rng)
        for number in range(start, start + rng.choice(_AT_ONCE)):
            if value is None:
                changed.pop((number, kind), None)
            else:
                changed[number, kind] = value
        served, count = instance.run(changed)
        if num_late(served) <= allowed and instance.figure(served) <= best:
            choices, num_decisions, best = changed, count, instance.figure(served)
    return best


def _some(kind: str, rng: Random) -> int | None:
    """None: as `uniform` decides."""
    if rng.random() < 0.2:
        return None
    if kind == "decodes":
        return rng.randint(0, 12)
    if kind == "first":
        return rng.randint(0, 11)
    return rng.choice((0, 64, 128, 192, 256, 384, 512, 768, 1024, 2048))


def instances(num_stages: int, seed: int, limits: Limits = LIMITS) -> dict[str, Instance]:
    rng = Random(f"{num_stages} {seed}")
    count = 12
    lengths = [
        (round(min(4000, rng.lognormvariate(6, 1))) + 1, rng.randint(2, 24)) for _ in range(count)
    ]
    at_once = [Arrival(0.0, *pair) for pair in lengths]
    times_s = sorted(rng.uniform(0, 3.0) for _ in range(count))
    in_time = [Arrival(at_s, *pair) for pair, at_s in zip(lengths, times_s, strict=True)]
    return {
        "makespan": Instance(num_stages, at_once, makespan_s, least_makespan_s, limits),
        "latency": Instance(num_stages, in_time, latency_s, least_latency_s, limits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-limit", action="store_true", help="no limit between tokens")
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    given = parser.parse_args()
    limits = replace(LIMITS, max_tbt_s=None) if given.no_limit else LIMITS
    rows: list[list[Any]] = []
    for num_stages in (2, 4):
        for seed in range(given.seeds):
            for name, instance in instances(num_stages, seed, limits).items():
                served, _ = instance.run({})
                ours = instance.figure(served)
                searched = {
                    what: best_of(instance, kinds, given.tries, Random(0))
                    for what, kinds in {"all": KINDS, **{k: (k,) for k in KINDS}}.items()
                }
                row = [f"{num_stages}", f"{seed}", name, f"{ours:.3f} s"]
                searched["all"] = min(searched.values())
                row += [f"{found / ours:.3f}" for found in searched.values()]
                rows.append([*row, f"{instance.least(instance) / ours:.3f}"])
                print(" | ".join(rows[-1]), flush=True)
    header = ["P", "seed", "figure", "`uniform`", "best found", *[f"only {k}" for k in KINDS],
              "lower bound"]  # fmt: skip
    name = "optimum without a limit" if given.no_limit else "optimum"
    show(plain_table(header, rows), name, given.page)


if __name__ == "__main__":
    main()
