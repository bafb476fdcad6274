"""Runs a load on virtual time, and checks the engine and its policy at every step.

The stages' KV is followed as the microbatches are planned: every stage runs every microbatch, by
index, so what a slot holds when a stage gets to a microbatch is settled by then.
"""

import random
from collections import deque
from dataclasses import replace
from math import ceil, inf, nan

from linear_times import LinearCost, LinearTimes
from loads import Finish, Load, make_load, policy_of
from made_up_profile import SHAPE, TRUE
from model_stages import ModelStage
from plan_checker import InOrder, PlanChecker

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.device import DeviceProfile
from pipeserve.core.cost.kernels import TILE
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH_CPU
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import (
    Microbatch,
    Output,
    PipelinePlan,
    Request,
    RequestId,
    StepResult,
    Wait,
    one_each,
)
from pipeserve.core.policies import get_policy
from pipeserve.core.view import CostModel, Draft, Policy, View
from pipeserve.core.work import Work, work_of
from pipeserve.errors import CapacityError
from pipeserve.profiling.simulation.simulator import SimulatedPipeline
from pipeserve.profiling.simulation.stage_times import StageTimes

MAX_EVENTS = 200_000
GPU = load_profile("a100-80gb-dgx"), load_shape("falcon-180b")
GARBAGE = (0.0, -1.0, nan, inf, 1e-300, 1e300, 1e-9, 1e9)


def serve(policy: str, seeds: range) -> None:
    """The loads of `seeds` that are for `policy`; what fails says how to run it alone."""
    for seed in seeds:
        if policy_of(seed) != policy:
            continue
        load = make_load(seed)
        try:
            run(load)
        except Exception as error:
            error.add_note(f"{load}\nalone: python bench/random_loads.py --first {seed} --loads 1")
            raise


def run(load: Load, follows: bool = False, late_s: float | None = None) -> "CheckedEngine":
    """Raises whatever goes wrong. `follows`: the window does. `late_s`: so late is whatever a stage
    sends; None: as late as the load's kind has it."""
    plan = replace(split_layers(30, load.num_stages), window=load.window, window_follows=follows)
    cost, times = _costs(load, plan)
    if late_s is not None:
        times = Late(times, load.num_stages, late_s)
    engine = CheckedEngine(load, plan, cost)
    pipeline = SimulatedPipeline(engine, times)
    for fault in load.faults:
        pipeline.fail(fault.stage, fault.at_s, fault.outage_s)
    host = Host(load, engine, pipeline)
    host.serve()
    engine.check_end()
    return engine


class Host:
    """Adds and ends requests when their time has come, and lets the pipeline go on between."""

    def __init__(self, load: Load, engine: "CheckedEngine", pipeline: SimulatedPipeline):
        self.engine, self.pipeline = engine, pipeline
        self.at_tokens = {r: f for r, f in load.finishes.items() if f.at_s is None}
        aborts = [(f.at_s, 1, r, f) for r, f in load.finishes.items() if f.at_s is not None]
        arrivals = [(at_s, 0, request.id, request) for at_s, request in load.arrivals]
        self.events = deque(sorted(arrivals + aborts, key=lambda event: event[:3]))

    def serve(self) -> None:
        for _ in range(MAX_EVENTS):
            event_s = self.events[0][0] if self.events else inf
            now = min(event_s, self.pipeline.next_event_s)
            if now == inf:
                return
            while self.events and self.events[0][0] <= now:
                _, _, request_id, what = self.events.popleft()
                if isinstance(what, Finish):
                    self.engine.finish(request_id, what.reason, now)
                else:
                    self.add(what, now)
            if self.look_for_ends(self.pipeline.advance(now), now):
                self.pipeline.advance(now)
        raise AssertionError("no end")

    def add(self, request: Request, now: float) -> None:
        """Before some, one that can never run: it is refused, and nothing has changed."""
        if request.id % 16 == 5:
            impossible = replace(request, prompt=(0,) * self.engine.limits.max_model_len)
            try:
                Engine.add(self.engine, impossible, now)
            except CapacityError:
                pass
            else:
                raise AssertionError("a request that can never run was not refused")
        self.pipeline.add(request, now)

    def look_for_ends(self, outputs: list[Output], now: float) -> bool:
        """Of text, which is made where the engine does not see it."""
        found = False
        for request_id in {output.request_id for output in outputs}:
            finish = self.at_tokens.get(request_id)
            if finish and len(self.engine.outputs[request_id]) >= finish.num_tokens:
                self.engine.finish(request_id, finish.reason, now)
                found = True
        return found


class CheckedEngine(Engine):
    """An engine whose every call is checked, and whose tokens are those of the made-up model."""

    def __init__(self, load: Load, plan: PipelinePlan, cost: CostModel | None):
        super().__init__(plan, Watched(get_policy(load.policy), self), load.limits, cost)
        self.load = load
        self.has_cost = cost is not None
        self.checker = PlanChecker(self)
        self.policy = InOrder(self.policy)
        self.stage = ModelStage(load.limits)
        self.outputs: dict[RequestId, list[int]] = {}
        self.reasons: dict[RequestId, str] = {}
        self.scores: dict[RequestId, tuple] = {}
        self.microbatches: list[Microbatch] = []
        self.widest = 0
        """Most microbatches that might be outstanding, one planned ahead not counted."""
        self._rng = random.Random(load.seed)
        self._num_fruitless = 0
        """Microbatches since a token became known or all was lost."""
        self._shift_s = {"far on": 3e9, "coarse": 1e16}.get(load.clock, 0.0)

    def clock(self, now: float) -> float:
        return 0.0 if self.load.clock == "stands still" else now + self._shift_s

    # ---- calls ----------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        self.checker.added(request)
        self.outputs[request.id] = []
        super().add(request, self.clock(now))

    def finish(self, request_id: RequestId, reason: str, now: float) -> Output | None:
        ended = super().finish(request_id, reason, self.clock(now))
        assert (ended is None) == (request_id in self.reasons)
        if ended is not None:
            self.reasons[request_id] = reason
        return ended

    def plan(self, now: float) -> Microbatch | Wait:
        self.checker.asked()
        planned = super().plan(self.clock(now))
        self.widest = max(self.widest, self.window)
        if isinstance(planned, Wait):
            self.checker.waits(planned)
            return planned
        self.microbatches.append(planned)
        self.checker.planned(planned)
        stories = self.checker.stories
        self.stage.run(planned, [stories[chunk.request_id].states for chunk in planned.chunks])
        self.check_counts(planned)
        self._num_fruitless += 1
        if planned.index % 8 == 0:
            self.check_progress()
        return planned

    def check_progress(self) -> None:
        """There is no need for more microbatches without a token than each known position in one
        of its own, and some for what is in flight."""
        going_on = [
            request for request in self.checker.requests.values() if request.id not in self.reasons
        ]
        num_known = sum([len(r.prompt) + len(self.outputs[r.id]) for r in going_on])
        assert self._num_fruitless <= num_known + 8 * self.checker.most_outstanding

    def complete(self, result: StepResult, now: float) -> list[Output]:
        microbatch, stories = self.checker.outstanding[0], self.checker.stories
        tokens, scores, failed = [], [], {}
        for place, chunk in enumerate(microbatch.chunks):
            request_id, _, stop, _, _, num_logits, num_scored = chunk
            story = stories[request_id]
            if num_logits and stop > self.load.fails.get(request_id, inf):
                failed[place] = "made up"
            if num_scored:
                first = stop - num_logits
                scores += story.scores[first : first + num_scored]
            if num_logits > num_scored:  # a decode planned ahead may be behind the end
                tokens.append(story.tokens[stop] if stop < len(story.tokens) else 0)
        self.checker.completed(result.index)
        counts = one_each(microbatch.chunks)
        result = StepResult(
            result.index, tuple(tokens), counts, prompt_logprobs=tuple(scores), failed=failed
        )
        outputs = super().complete(result, self.clock(now))
        for output in outputs:
            request_id = output.request_id
            assert request_id not in self.reasons, "output after the end"
            assert (output.token is None) == (output.error is not None)
            if output.token is not None:
                self.outputs[request_id].append(output.token)
            if output.prompt_logprobs is not None:
                assert request_id not in self.scores, "told twice"
                self.scores[request_id] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.reasons[request_id] = output.finish_reason
        if outputs:
            self._num_fruitless = 0
        return outputs

    def observe(self, index: int, stage: int, ready_s: float, start_s: float, end_s: float) -> None:
        if self.load.cost == "garbage":
            end_s = start_s + self._rng.choice(GARBAGE)
        super().observe(index, stage, ready_s, start_s, end_s)

    def lost(self, now: float) -> None:
        super().lost(self.clock(now))
        self.checker.lost()
        self.stage = ModelStage(self.limits)
        self._num_fruitless = 0
        assert self.last_known_s is None

    # ---- checks ---------------------------------------------------------------------------------

    def check_counts(self, planned: Microbatch) -> None:
        """What is said of the microbatch that was planned last."""
        plans = self.checker.plans
        prefill = [c for c in planned.chunks if c.start < plans[c.request_id].num_prefill]
        num_prefill_tokens = sum([chunk.num_tokens for chunk in prefill])
        num_decodes = len(planned.chunks) - len(prefill)
        assert self.last[:3] == (planned.index, num_decodes, num_prefill_tokens)
        assert (self.last_known_s is None) == (not self.has_cost)

    def check_view(self, view: View) -> None:
        """What is counted along the way is what a recount gives."""
        running = [(self.checker.plans[id_], each) for id_, each in view.running.items()]
        prefilling = [plan for plan, _ in running if plan.next_position < plan.num_prefill]
        decoding = [
            plan
            for plan, request in running
            if plan.next_position >= plan.num_prefill and plan.num_tokens < request.num_longest
        ]
        assert view.num_decoding == len(decoding)
        assert view.decoding_context == sum([plan.next_position for plan in decoding])
        waiting = sum([request.num_unplanned for request in view.waiting.values()])
        begun = sum([plan.num_prefill - plan.next_position for plan in prefilling])
        assert view.prefill_backlog == waiting + begun
        assert not view.running.keys() & view.waiting.keys()
        assert not (view.running.keys() | view.waiting.keys()) & self.reasons.keys()

    def check_end(self) -> None:
        assert not self.has_work
        assert self.outstanding == ()
        assert self.num_free_blocks == self.limits.num_blocks, "leaked blocks"
        for request_id, story in self.checker.stories.items():
            got, reason = self.outputs[request_id], self.reasons[request_id]
            assert self.scores.get(request_id) == (story.scores if got else None)
            assert got == story.outputs[: len(got)]
            finish, fails = self.load.finishes.get(request_id), self.load.fails.get(request_id)
            num_before = inf  # tokens that come before it fails
            if fails is not None:
                num_before = max(0, fails + 1 - len(story.tokens) + len(story.outputs))
            if reason == "error" and len(got) == num_before:
                continue
            assert len(got) <= num_before
            if finish is not None and reason == finish.reason:
                at_least = 0 if finish.at_s is not None else finish.num_tokens
                assert len(got) >= min(at_least, len(story.outputs))
            else:
                assert (got, reason) == (story.outputs, story.reason)


class Watched:
    """A policy whose every eighth view is checked before it sees it."""

    def __init__(self, policy: Policy, engine: CheckedEngine):
        self.name, self.traits = policy.name, policy.traits
        self._policy, self._engine, self._num_views = policy, engine, 0

    def compose(self, view: View, now: float) -> Draft:
        if self._num_views % 8 == 0:
            self._engine.check_view(view)
        self._num_views += 1
        return self._policy.compose(view, now)


# ---- what stages take, and what is predicted ----------------------------------------------------


class Tiled(LinearTimes):
    """Steps up at whole tiles of rows, as matrix products do."""

    def of(self, work: Work) -> tuple[float, ...]:
        return super().of(work._replace(num_tokens=ceil(work.num_tokens / TILE) * TILE))


class Scaled(StageTimes):
    """What a cost model predicts, times a factor for each stage."""

    control_s = 1e-4

    def __init__(self, cost: CostModel, factors: list[float]):
        self.cost, self.factors = cost, factors
        self.control_s *= any(factors)

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        seconds = self.cost.seconds(work_of(microbatch))
        return [each * factor for each, factor in zip(seconds, self.factors, strict=True)]

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        return [self.control_s] * (len(self.factors) - 1)


class Late(StageTimes):
    """As others, with every message so late; links carry any number at once."""

    def __init__(self, times: StageTimes, num_stages: int, late_s: float):
        self.compute_s = times.compute_s
        self.control_s = self.feedback_s = late_s
        self.latency_s = [late_s] * (num_stages - 1)

    def hop_s(self, microbatch: Microbatch) -> list[float]:
        return list(self.latency_s)


def _costs(load: Load, plan: PipelinePlan) -> tuple[CostModel | None, StageTimes]:
    num_stages = load.num_stages
    factors = [load.slow] * num_stages
    if load.cost in ("none", "right", "tiled"):
        kind = LinearTimes if load.cost == "right" else Tiled
        rng = random.Random(f"prices {load.seed}")
        prices = {
            "base": rng.choice((0.0, 1e-3, 1e-2, 1e-2)),
            "per_token": rng.choice((1e-5, 2e-4, 2e-3)),
            "per_position": rng.choice((0.0, 1e-6, 1e-4)),
            "per_pair": rng.choice((0.0, 1e-7, 1e-5)),
        }
        cost = LinearCost(kind(num_stages, **prices))
        return None if load.cost == "none" else cost, Scaled(cost, factors)
    wrong = {"dear": 1.3, "cheap": 0.7}.get(load.cost, 1.0)
    if load.cost == "one slow stage":
        factors[load.seed % num_stages] *= 3
    if load.cost == "gpu":
        return PipelineCost(*GPU, plan), Scaled(PipelineCost(*GPU, plan), factors)
    profile = ROUGH_CPU if load.cost == "rough" else wrong_by(wrong)
    cost = PipelineCost(profile, SHAPE, plan)
    return cost, Scaled(PipelineCost(TRUE, SHAPE, plan), factors)


def wrong_by(factor: float) -> DeviceProfile:
    """The made-up profile with every term off: matrix products one way, attention the other."""
    layer = tuple((tokens, seconds * factor) for tokens, seconds in TRUE.tables.layer)
    attention = replace(
        TRUE.attention,
        prefix_flops_per_s=TRUE.attention.prefix_flops_per_s * factor,
        causal_flops_per_s=TRUE.attention.causal_flops_per_s * factor,
        decode_bytes_per_s=TRUE.attention.decode_bytes_per_s * factor,
    )
    return replace(TRUE, tables=replace(TRUE.tables, layer=layer), attention=attention)
