"""Throughput over slow links: every message of the stages, each way, comes so much later.

    python bench/slow_links.py [MODEL] [-pp 2] [--late-ms 5] [--requests 192] [--rounds 3]

A process between the stages, and between them and the driver, hands on every message after the
delay, any number of them at once (tests/support/late_links.py): no bandwidth is lost. Four runs of
the same requests take turns: messages at once and late, as many microbatches in flight as stages
and a window that follows, which begins with as many each time. Tokens a second, prompt and output,
between a quarter and three quarters of the tokens: all requests come at once, and fill and drain,
which links make longer, are left out.
"""

import argparse
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from statistics import median

from report import plain_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from commands import script
from late_links import LateLinks, through
from other_engine import go_on_under

from pipeserve.configs import make_config
from pipeserve.core.engine import Engine
from pipeserve.core.policies import get_policy
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.simulation.workloads import WorkItem, random_items

KINDS = ("at once, fixed", "at once, following", "late, fixed", "late, following")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("-pp", type=int, default=2)
    parser.add_argument("--late-ms", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="uniform")
    parser.add_argument("--device-profile", help="Emulated stages of this device.")
    return parser.parse_args()


class Sides:
    """The stages, and what they are given to do."""

    def __init__(self, driver: Driver, links: LateLinks, late_s: float, num_requests: int) -> None:
        self._driver, self._links, self._late_s = driver, links, late_s
        self._ids = count()
        rng = Random(0)
        lengths = [(rng.randint(32, 96), rng.randint(32, 96)) for _ in range(num_requests)]
        self._items = random_items(lengths, 1, driver.vocab_size, rng)

    def warm_up(self) -> None:
        self._run(self._items[:8], KINDS[0])

    def tokens_per_s(self, kind: str) -> tuple[float, int, float]:
        """And the most microbatches that might be in flight, and the median time between tokens."""
        return self._run(self._items, kind)

    def _run(self, items: list[WorkItem], kind: str) -> tuple[float, int, float]:
        driver = self._driver
        plan = replace(driver.plan, window_follows=kind.endswith("following"))
        engine = Noting(plan, get_policy(driver.config.policy), driver.limits, driver.setup.cost)
        go_on_under(driver, engine)
        self._links.all_late_s(self._late_s if kind.startswith("late") else 0.0)
        records = run_items(driver, items, str(next(self._ids)), self._ids)
        driver.settle()
        times = sorted(
            (at_s, record.num_prompt_tokens if place == 0 else 1)
            for record in records
            for place, at_s in enumerate(record.token_times_s)
        )
        middle = times[len(times) // 4 : 3 * len(times) // 4]
        gaps = [
            (record.token_times_s[-1] - record.token_times_s[0]) / (len(record.token_times_s) - 1)
            for record in records
            if len(record.token_times_s) > 1
        ]
        num_tokens = sum(tokens for _, tokens in middle[1:])
        return num_tokens / (middle[-1][0] - middle[0][0]), engine.widest, median(gaps)


class Noting(Engine):
    widest = 0

    def plan(self, now):
        self.widest = max(self.widest, self.window)
        return super().plan(now)


def main() -> None:
    given = options()
    config = {"model": given.model, "pipeline_parallel_size": given.pp, "policy": given.policy}
    config |= {"max_model_len": 1024, "enable_prefix_caching": False}
    if given.device_profile:
        config |= {"device": "emulated", "device_profile": given.device_profile}
    make_setup = emulated_setup if given.device_profile else checkpoint_setup
    links = LateLinks()
    try:
        with Driver(make_setup(make_config({}, config)), fleet=through(links)) as driver:
            sides = Sides(driver, links, given.late_ms / 1000, given.requests)
            sides.warm_up()
            found = {kind: [] for kind in KINDS}
            for number in range(given.rounds):
                for kind in KINDS[number % 4 :] + KINDS[: number % 4]:
                    found[kind].append(sides.tokens_per_s(kind))
                    rate, widest, _ = found[kind][-1]
                    print(f"{kind}: {rate:.0f} tokens/s, {widest}", file=sys.stderr, flush=True)
    finally:
        links.close()
    base = median(rate for rate, _, _ in found[KINDS[0]])
    rows = []
    for kind, runs in found.items():
        rates = [rate for rate, _, _ in runs]
        rows.append(
            (
                kind,
                f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
                f"{median(rates) / base:.1%}",
                " ".join(str(widest) for _, widest, _ in runs),
                f"{1000 * median(tbt_s for _, _, tbt_s in runs):.1f}",
            )
        )
    print(f"{given.model}, {given.pp} stages, {given.late_ms:g} ms a message, {given.policy}\n")
    header = ("", "tokens/s", "of the first", "most in flight", "ms between tokens")
    print(plain_table(header, rows))


if __name__ == "__main__":
    script(main)
