"""An engine over model stages that are driven by hand, so that anything may happen in any order."""

from collections import deque

from model_stages import ModelStage, next_token, prompt_score, states_of
from plan_checker import PlanChecker

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import (
    Microbatch,
    Request,
    RequestId,
    StepResult,
    TokenLogprobs,
    Wait,
    one_each,
)
from pipeserve.core.view import Policy

MAX_STEPS = 20_000


class Pipeline:
    """Its methods do one thing that could happen next; `drain` all that is left."""

    def __init__(self, policy: Policy, num_stages: int, limits: Limits):
        self.limits = limits
        self.engine = Engine(split_layers(num_stages, num_stages), policy, limits)
        self.checker = PlanChecker(self.engine)
        self.requests = self.checker.requests
        self.num_stages = num_stages
        self.outputs: dict[RequestId, list[int]] = {}
        self.reasons: dict[RequestId, str] = {}
        self.scores: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        self.alone: RequestId | None = None
        self.reset_stages()

    def reset_stages(self) -> None:
        self.stages = [ModelStage(self.limits) for _ in range(self.num_stages)]
        self.crossing: list[Microbatch] = []  # every microbatch since the last fault
        self.states: list[list[list[int]]] = []  # parallel: what its activations carry
        self.first_stage: dict[RequestId, list[int]] = {}  # states of the tokens that it knows
        self.results: deque[StepResult] = deque()

    # ---- what can happen ------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.checker.added(request)
        self.outputs[request.id] = []
        self.engine.add(request, 0.0)

    def plan(self) -> bool:
        self.checker.asked()
        planned = self.engine.plan(0.0)
        if isinstance(planned, Wait):
            self.checker.waits(planned)
            return False
        self.checker.planned(planned)
        if self.alone is not None and self.alone not in self.reasons:
            assert {chunk.request_id for chunk in planned.chunks} == {self.alone}
        self.crossing.append(planned)
        return True

    def run_stage(self, stage: int) -> bool:
        """The stage's next microbatch, if its inputs are there."""
        number = self.stages[stage].num_run
        if stage == 0:
            if number == len(self.crossing) or not self.start(self.crossing[number]):
                return False
        elif number == self.stages[stage - 1].num_run:
            return False
        self.stages[stage].run(self.crossing[number], self.states[number])
        if stage == self.num_stages - 1:
            self.sample(number)
        return True

    def start(self, microbatch: Microbatch) -> bool:
        """Stage 0 looks up the tokens; False while one is still on its way."""
        known = dict(self.first_stage)
        for request_id in microbatch.released:
            known.pop(request_id, None)
        for admission in microbatch.admitted:
            salt = self.requests[admission.request_id].cache_salt
            known[admission.request_id] = states_of(salt, admission.token_ids)
        for chunk in microbatch.chunks:
            if len(known[chunk.request_id]) < chunk.stop:
                assert chunk.token_from is not None, "a token that nobody announced"
                return False
        self.first_stage = known
        self.states.append([known[chunk.request_id][: chunk.stop] for chunk in microbatch.chunks])
        return True

    def sample(self, number: int) -> None:
        """The last stage: tokens straight to stage 0, and to the engine's letter box."""
        microbatch = self.crossing[number]
        sampled, scored = [], []
        for chunk, states in zip(microbatch.chunks, self.states[number], strict=True):
            request = self.requests[chunk.request_id]
            prompt = states_of(request.cache_salt, request.prompt)
            first = chunk.stop - chunk.num_logits
            scored += [prompt_score(prompt[first + i + 1]) for i in range(chunk.num_scored)]
            if not chunk.samples:
                continue
            sampled.append(next_token(states[-1], request))
            if self.first_stage.get(chunk.request_id) == states:
                # Else stage 0 was told to release it, or admitted it anew.
                state = hash((states[-1], sampled[-1]))
                self.first_stage[chunk.request_id] = [*states, state]
        counts = one_each(microbatch.chunks)
        self.results.append(
            StepResult(microbatch.index, tuple(sampled), counts, prompt_logprobs=tuple(scored))
        )

    def deliver(self) -> bool:
        if not self.results:
            return False
        result = self.results.popleft()
        self.checker.completed(result.index)
        for output in self.engine.complete(result, 0.0):
            assert output.request_id not in self.reasons, "output after the end"
            self.outputs[output.request_id].append(output.token)
            if output.prompt_logprobs is not None:
                assert output.request_id not in self.scores, "told twice"
                self.scores[output.request_id] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
        return True

    def finish(self, request_id: RequestId) -> None:
        ended = self.engine.finish(request_id, "abort", 0.0)
        assert (ended is None) == (request_id in self.reasons)
        if ended is not None:
            self.reasons[request_id] = ended.finish_reason

    def lose(self) -> None:
        self.engine.lost(0.0)
        self.checker.lost()
        self.reset_stages()

    def run_alone(self, request_id: RequestId | None) -> None:
        """The others stand aside, until it has ended or is no longer the one."""
        self.engine.run_alone(request_id)
        self.alone = request_id

    # ---- checks ---------------------------------------------------------------------------------

    def drain(self) -> None:
        """Everything in turn, last stage first so that the pipe fills, until nothing is left."""
        for _ in range(MAX_STEPS):
            moved = self.deliver()
            for stage in reversed(range(self.num_stages)):
                moved |= self.run_stage(stage)
            while self.plan():
                moved = True
            if not moved:
                return
        raise AssertionError("no end")

    def check_end(self) -> None:
        assert not self.engine.has_work
        assert self.engine.num_unfinished == 0
        assert self.engine.outstanding == ()
        assert self.engine.num_free_blocks == self.limits.num_blocks, "leaked blocks"
        for request_id, story in self.checker.stories.items():
            got = self.outputs[request_id]
            assert self.scores.get(request_id) == (story.scores if got else None)
            if self.reasons[request_id] == "abort":
                assert got == story.outputs[: len(got)]
            else:
                assert (got, self.reasons[request_id]) == (story.outputs, story.reason)
