"""Real runs with known causes of idle time, recorded: stages as processes, the product unchanged.

What is planted lies around the product: a process between two stages that carries their messages
late, a policy that sleeps, a busy process on a stage's core, a signal. The rest is how the run is
configured: layers of the stages, limits, policy, arrivals.

Starting stages takes seconds, a run a fraction of one: `Stages` runs many `Scene`s, each with an
engine of its own, so that a run and its baseline differ in what is planted and in nothing else.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from late_links import LateLinks, through
from other_engine import go_on_under

from pipeserve.configs import make_config
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Request
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Record
from pipeserve.core.view import Draft, Policy, View
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.fleet import Fleet
from pipeserve.errors import StageError
from pipeserve.launch.run.record import meta_of_driver
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.recording.recording import Recording, recording_of
from pipeserve.profiling.simulation.simulator import Arrival
from pipeserve.sampling_params import SamplingParams

WARM_UP = (Arrival(0.0, 16, 4),) * 4


def no_pauses(plan: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One run to record."""

    arrivals: Sequence[Arrival] = (Arrival(0.0, 16, 24),) * 8
    policy: str = "uniform"
    window: int | None = None
    """None: the number of stages."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """What differs from those that the stages were started with; never more KV blocks."""
    link_s: Mapping[int, float] = field(default_factory=dict)
    """Seam -> how late the activations are that cross it; behind the last stage, rows to the
    first, where both have the head."""
    feedback_s: float = 0.0
    """How late sampled tokens come to the first stage."""
    to_last_s: float = 0.0
    """How late those of the first one come to the last, where both have the head."""
    plans_s: float = 0.0
    """How late the driver's messages come to the stages."""
    pauses_s: Callable[[int], float] = no_pauses
    """Of the n-th plan: how long the planner sleeps over it."""
    burnt: int | None = None
    """Stage whose core another process keeps busy."""
    halted: tuple[int, float, float] | None = None
    """Rank, and for how many seconds of how many it gets no core at all."""
    killed: tuple[int, int, float] | None = None
    """Stage, microbatches planned before, and for how many seconds it is stopped before it is
    killed."""


class Stages:
    """The stage processes (two or more) of one model and split. Closed at the end of the `with`.
    Where several ranks share a stage, nothing can be made late between stages."""

    def __init__(self, model: str, num_stages: int, **config: Any) -> None:
        self.num_stages = num_stages
        self._records: list[Record] = []
        self._ids = count()
        self._links: LateLinks | None = None
        self.config = make_config(
            {},
            {
                "model": model,
                "dtype": "float32",
                "pipeline_parallel_size": num_stages,
                "num_gpu_blocks_override": 2048,
                "enable_prefix_caching": False,
                **config,
            },
        )
        fleet: type[Fleet] = Fleet
        if self.config.tensor_parallel_size == 1:
            self._links = LateLinks()
            fleet = through(self._links)
        try:
            setup = checkpoint_setup(self.config)
            self.driver = Driver(setup, record=self._records.append, fleet=fleet)
        except BaseException:
            self._close_links()
            raise
        self._limits = self.driver.engine.limits
        self.record(Scene(arrivals=WARM_UP))

    def record(self, scene: Scene) -> Recording:
        """Runs it to its end, or to the end of the stage that is killed."""
        self._renew_engine(scene)
        if self._links is not None:
            self._links.late_s(
                scene.link_s, scene.feedback_s, scene.plans_s, to_last_s=scene.to_last_s
            )
        with ExitStack() as stack:
            if scene.burnt is not None:
                stack.enter_context(busy_core(self.driver.stages[scene.burnt].cpus))
            if scene.halted is not None:
                rank, *seconds = scene.halted
                stack.enter_context(halting(_stage_of(self.driver, rank), *seconds))
            self._records.clear()
            if scene.killed is not None:  # that it happened, the recording has to tell
                stack.enter_context(suppress(StageError))
            self._run(scene)
        if self._links is not None:
            self._links.late_s({}, 0.0, 0.0)
        meta = {**meta_of_driver(self.driver), "policy": scene.policy}
        return recording_of(self._records, self.num_stages, meta)

    def _renew_engine(self, scene: Scene) -> None:
        """As the driver makes it. Nothing is outstanding; stages know requests by ids, and no id
        comes twice."""
        policy = get_policy(scene.policy)
        limits = replace(self._limits, **scene.limits)
        if policy.traits.whole_prompts:
            most = min(limits.max_model_len, limits.max_num_batched_tokens)
            limits = replace(limits, max_model_len=most)
        plan = self.driver.plan
        plan = type(plan)(plan.stages, scene.window or plan.window)
        driver = self.driver
        engine = Engine(plan, Pausing(policy, scene.pauses_s), limits)
        go_on_under(driver, engine, self._records.append)

    def _run(self, scene: Scene) -> None:
        """Adds each request when it is due, and polls."""
        driver, rng = self.driver, Random(0)
        vocab_size = driver.vocab_size
        due = [
            (arrival.arrival_s, self._request(arrival, rng, vocab_size))
            for arrival in sorted(scene.arrivals, key=lambda arrival: arrival.arrival_s)
        ]
        start_s = time.monotonic()
        killing = _killing(driver, *scene.killed) if scene.killed else None
        while due or driver.engine.num_unfinished:
            now_s = time.monotonic() - start_s
            while due and due[0][0] <= now_s:
                driver.submit([due.pop(0)[1]])
            driver.outputs(min(0.5, max(due[0][0] - now_s, 0.0)) if due else 0.5)
            if killing is not None:
                next(killing)
        driver.settle()

    def _request(self, arrival: Arrival, rng: Random, vocab_size: int) -> Request:
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(arrival.num_prompt_tokens))
        params = SamplingParams(
            temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True, seed=0
        )
        return Request(id=next(self._ids), prompt=prompt, params=params)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.close()
        self._close_links()

    def _close_links(self) -> None:
        if self._links is not None:
            self._links.close()


class Pausing:
    """A policy that sleeps before it composes."""

    def __init__(self, policy: Policy, pauses_s: Callable[[int], float]) -> None:
        self.name, self.traits = policy.name, policy.traits
        self._policy, self._pauses_s, self._num = policy, pauses_s, 0

    def compose(self, view: View, now: float) -> Draft:
        draft = self._policy.compose(view, now)
        if draft.chunks:  # not where it finds nothing to plan
            self._num += 1
            time.sleep(self._pauses_s(self._num))
        return draft


def _killing(driver: Driver, stage: int, completed: int, stopped_s: float) -> Iterator[None]:
    """Taken a step further after each poll."""
    pid = driver.stages[stage].pid
    while driver.engine.last is None or driver.engine.last.index < completed:
        yield
    os.kill(pid, signal.SIGSTOP)
    until_s = time.monotonic() + stopped_s
    while time.monotonic() < until_s:
        yield
    os.kill(pid, signal.SIGKILL)
    while True:
        yield


def _stage_of(driver: Driver, rank: int) -> int:
    """The process that its keeper has started."""
    keeper = driver.fleet.keepers[rank].pid
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


@contextmanager
def busy_core(cpus: Sequence[int]) -> Iterator[None]:
    """Another process on these cores, until the end of the `with`."""
    code = f"import os; os.sched_setaffinity(0, {list(cpus)}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()


@contextmanager
def halting(pid: int, halted_s: float, of_s: float) -> Iterator[None]:
    """A process that stops another one again and again, until the end of the `with`."""
    code = f"""import os, signal, time
while True:
    time.sleep({of_s - halted_s})
    os.kill({pid}, signal.SIGSTOP)
    time.sleep({halted_s})
    os.kill({pid}, signal.SIGCONT)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()
            process.wait()
            os.kill(pid, signal.SIGCONT)


# ---- what is planted ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plant:
    """Two runs that differ in one thing."""

    cause: str
    before: Scene
    planted: Scene


SMALL = {"num_hidden_layers": 4, "max_position_embeddings": 4096}
"""Of the model whose microbatches take a millisecond: nothing beside what is waited for."""
SMALL_LIMITS = {"max_num_batched_tokens": 2048}
FEW = Scene(arrivals=(Arrival(0.0, 16, 8),) * 8)
FEWER = Scene(arrivals=(Arrival(0.0, 16, 5),) * 8)
MANY_STEPS = Scene(arrivals=(Arrival(0.0, 16, 120),) * 8)

WAITS = {
    "a link is late": Plant("link", FEW, replace(FEW, link_s={0: 0.15})),
    "rows are late": Plant("link", FEW, replace(FEW, link_s={1: 0.15})),
    "feedback is late": Plant("token_feedback", FEW, replace(FEW, feedback_s=0.15)),
    "the planner pauses": Plant(
        "planning", FEW, replace(FEW, pauses_s=lambda plan: 0.25 if plan % 2 else 0.0)
    ),
    "plans are late": Plant("control", FEW, replace(FEW, plans_s=0.15)),
    "arrivals starve": Plant(
        "no_requests",
        Scene(arrivals=(Arrival(0.0, 16, 1),) * 8),
        Scene(arrivals=[Arrival(0.3 * number, 16, 1) for number in range(8)]),
    ),
    "a stage hangs and is killed": Plant("fault", FEWER, replace(FEW, killed=(1, 12, 1.0))),
}
"""Time that passes while no one computes."""

WIDE = {
    "num_hidden_layers": 8,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
}
"""Of the model whose microbatches of 256 tokens take some 30 ms of a core: much beside what
messages take; and whose heads are wide, so that a context is much beside a decode."""
WIDE_LIMITS = {"max_num_batched_tokens": 4096, "num_gpu_blocks_override": 768}
PROMPTS = Scene(
    arrivals=(Arrival(0.0, 256, 1),) * 20,
    policy="sarathi_serve",
    limits={"max_num_batched_tokens": 256},
)
DECODES = Scene(
    arrivals=[Arrival(0.02 * (number // 4), 16, 40) for number in range(8)], policy="hybrid_only"
)
"""In two groups, one for each stage."""
PAIRS = Scene(policy="orca", limits={"max_num_batched_tokens": 1025})


def groups(*max_tokens: int) -> Scene:
    """Three batches of four, of which two run at a time; the first has long contexts."""
    lengths = (900, 16, 16)
    return Scene(
        arrivals=[
            Arrival(0.0, length, tokens)
            for length, tokens in zip(lengths, max_tokens, strict=True)
            for _ in range(4)
        ],
        policy="request_level",
        limits={"max_num_seqs": 8},
    )


WORK = {
    "the window is one": Plant("too_few_microbatches", PROMPTS, replace(PROMPTS, window=1)),
    "KV for one prompt": Plant(
        "kv_full", PROMPTS, replace(PROMPTS, limits={**PROMPTS.limits, "num_blocks": 17})
    ),
    "a core is burnt": Plant("jitter", PROMPTS, replace(PROMPTS, burnt=1)),
    "a stage is halted": Plant("jitter", PROMPTS, replace(PROMPTS, halted=(1, 0.2, 0.4))),
    "prompts of two lengths": Plant(
        "prefill_length",
        replace(PAIRS, arrivals=[Arrival(0.0, 532, 1)] * 12),
        replace(PAIRS, arrivals=[Arrival(0.0, length, 1) for length in [64, 1000] * 6]),
    ),
    "long prompts among decodes": Plant(
        "prefill_vs_decode",
        DECODES,
        replace(DECODES, arrivals=[*DECODES.arrivals, Arrival(0.1, 2000, 1)]),
    ),
    "a group has long contexts": Plant(
        "context_length",
        groups(1, 160, 160),
        groups(160, 160, 1),
    ),
}
"""Microbatches that compute more, or are too few: as good as the core is one's own."""

SPLITS = {"even": (4, 4), "uneven": (1, 7)}
"""Layers of the stages of `WIDE`."""
ROWS = Scene(arrivals=(Arrival(0.0, 16, 40),) * 64)
"""Many rows for the head."""
LARGE_VOCABULARY = 128_000


def idle_of(recording: Recording) -> dict[str, float]:
    """Of all stages together, by cause. What must hold of any ledger is checked."""
    ledger = explain(recording)
    total = dict.fromkeys(CAUSES, 0.0)
    for stage, busy_s in enumerate(ledger.busy_s):
        idle_s = ledger.idle_s(stage)
        assert abs(busy_s + sum(idle_s.values()) - ledger.seconds) < 1e-6
        assert idle_s["unknown"] < 0.02 * ledger.seconds
        for cause, seconds in idle_s.items():
            total[cause] += seconds
    return total


def added(before: Recording, planted: Recording) -> dict[str, float]:
    """Idle seconds of all stages that came with what was planted, by cause."""
    idle, more = idle_of(before), idle_of(planted)
    return {cause: more[cause] - idle[cause] for cause in CAUSES}
