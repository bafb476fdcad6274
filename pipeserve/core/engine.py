"""The engine: which positions of which request run next, and what came of them. Sans-I/O.

It starts nothing, sends nothing and knows no clock: a host calls `plan`, carries each microbatch
through the stages, and calls `complete`. The driver does so with real stages, the simulator on
virtual time, the tests by hand; the same calls in the same order give the same microbatches.

It rests on one guarantee: every stage runs every microbatch, strictly by index. Hence a block may
be freed, reused or shared as soon as the microbatch that frees or fills it is planned, and what is
outstanding is never recalled: it runs out, and its result is taken or dropped.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice, repeat

from pipeserve.core.forecast import Forecast
from pipeserve.core.head_share import HeadShare
from pipeserve.core.nouns import (
    Microbatch,
    Output,
    PipelinePlan,
    Request,
    RequestId,
    StepResult,
    Wait,
)
from pipeserve.core.planner import InFlight, Planner
from pipeserve.core.unfinished import Unfinished
from pipeserve.core.view import CostModel, Limits, Outstanding, Policy, Why
from pipeserve.core.window import Window
from pipeserve.errors import ConfigError

__all__ = ["Engine", "Limits", "check_suits"]


# What NamedTuple's own constructor does, without a Python call for every token.
_new_output = partial(tuple.__new__, Output)


def check_suits(policy: Policy, limits: Limits) -> None:
    """Raises ConfigError for limits that the policy cannot work within, however many blocks."""
    if policy.traits.whole_prompts and limits.max_num_batched_tokens < limits.max_model_len:
        raise ConfigError(
            f"policy {policy.name} runs a prompt in one microbatch, but max_num_batched_tokens "
            f"is {limits.max_num_batched_tokens}: give at least max_model_len, "
            f"{limits.max_model_len}"
        )


class Engine:
    """Requests in, microbatches out, in index order. Not thread-safe: one host calls it.

    Raises ConfigError for limits that the policy cannot work within.
    """

    def __init__(
        self, plan: PipelinePlan, policy: Policy, limits: Limits, cost: CostModel | None = None
    ):
        check_suits(policy, limits)
        self.policy = policy
        self.limits = limits
        self.pipeline = plan
        self._requests = Unfinished(limits, policy.traits)
        self.stats = self._requests.stats
        self._cost = cost
        self._window = Window(plan)
        self._forecast = Forecast(len(plan.stages))
        self._head_share = HeadShare(len(plan.stages)) if plan.shares_head else None
        self._planner = Planner(
            policy,
            limits,
            self._requests,
            self._window,
            self._forecast,
            cost,
            self._head_share,
        )
        self._in_flight: deque[InFlight] = deque()
        self._is_full = False
        """The last try at a plan found the window full."""
        self._made_room: int | None = None
        """The completion after it; the next plan is because of that."""

    # ---- what a host may ask --------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        return len(self._requests.states)

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Indices of the microbatches that were planned and have not completed, in order."""
        return tuple(flight.microbatch.index for flight in self._in_flight)

    @property
    def num_outstanding(self) -> int:
        return len(self._in_flight)

    @property
    def window(self) -> int:
        """Microbatches that may be outstanding now, the one planned ahead not counted. More than
        there are stages only where there is work for them: decodes whose token is on its way are
        planned when the window is full."""
        return self._planner.window

    @property
    def last(self) -> Outstanding | None:
        """The microbatch planned last, completed or not; None before the first."""
        return self._planner.last

    @property
    def why(self) -> Why | None:
        """Why the microbatch planned last is no larger, where its policy says so."""
        return self._planner.why

    @property
    def last_known_s(self) -> float | None:
        """When the tokens of the microbatch planned last are predicted to be known; None where it
        is not outstanding, or without a cost model."""
        if not self._in_flight or self._cost is None:
            return None
        return self._forecast.known_s(self._in_flight[-1].summary.index)

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a microbatch outstanding."""
        return bool(self._requests.states or self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that are admitted and have not ended."""
        return len(self._requests.queues.running)

    def requests_of(self, index: int) -> tuple[RequestId, ...]:
        """That have a chunk in the outstanding microbatch `index`; none, when it is not."""
        flights = (flight for flight in self._in_flight if flight.microbatch.index == index)
        return tuple(c.request_id for flight in flights for c in flight.microbatch.chunks)

    @property
    def num_waiting(self) -> int:
        """Unfinished requests that are not admitted."""
        return len(self._requests.states) - len(self._requests.queues.running)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no request holds; cached ones among them."""
        return self._requests.pool.num_free

    # ---- what a host may do ---------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queues a request.

        Raises CapacityError when it could never run, ValueError when its id is in use, when it
        imports positions that it does not have, or wants the logprobs of such.
        """
        self._requests.add(request, now)

    def finish(self, request_id: RequestId, reason: str, now: float) -> Output | None:
        """Ends a request now (abort, stop string); None when it has ended already or never was.

        What is outstanding of it runs out and is dropped.
        """
        state = self._requests.states.get(request_id)
        if state is None:
            return None
        self._requests.end(state)
        return Output(request_id, None, reason)

    def plan(self, now: float) -> Microbatch | Wait:
        """The next microbatch, or why there is none. Raises PolicyError when a draft is wrong."""
        if not self._requests.states:
            self._made_room = None  # what comes next has waited for somebody to ask
            return Wait("no_requests")
        if len(self._in_flight) >= self.window + self.policy.traits.plans_ahead:
            self._is_full, self._made_room = True, None
            return Wait("window")
        planned = self._planner.plan(self._in_flight, now)
        made_room, self._made_room = self._made_room, None
        if isinstance(planned, Wait):
            return planned
        self._in_flight.append(planned)
        summary, follows = planned.summary, planned.token_from
        self._window.planned(
            summary.index,
            summary.num_decodes + summary.num_prefill_tokens,
            made_room if follows is None else follows,
            summary.num_prefill_tokens > 0 and self._requests.queues.prefill_backlog > 0,
            planned.microbatch.head_at_first,
        )
        return planned.microbatch

    def complete(self, result: StepResult, now: float) -> list[Output]:
        """Takes what was sampled for the oldest outstanding microbatch. A request whose
        chunk failed ends with the finish reason "error".

        Raises ValueError for any other index, or for a wrong number of tokens.
        """
        flight = self._oldest(result)
        self._forecast.completed(result.index, now, flight.microbatch.head_at_first)
        if self._is_full:
            self._is_full, self._made_room = False, result.index
        sampled = zip(result.tokens, result.logprobs or repeat(None))  # noqa: B905  (without end)
        scored = iter(result.prompt_logprobs)
        failed, outputs = result.failed, []
        for place, (chunk, state, count) in enumerate(
            zip(flight.microbatch.chunks, flight.states, result.counts, strict=True)
        ):
            state.num_outstanding -= 1
            if chunk.num_scored:
                state.score(islice(scored, chunk.num_scored))
            if state.finished:
                self.stats.wasted_decodes += _skip(sampled, count)
                continue
            if place in failed:
                _skip(sampled, count)
                outputs.append(Output(state.id, None, "error", error=failed[place]))
                self._requests.pool.withdraw(state.keys)
                self._requests.end(state)
                continue
            while count:
                count -= 1
                token, logprobs = next(sampled)
                reason = state.append(token, now)
                scores = None
                if state.prompt_logprobs is not None:
                    scores = state.take_prompt_logprobs()
                begun = state.begun(now) if state.num_known == state.num_prompt + 1 else None
                outputs.append(
                    _new_output((state.id, token, reason, logprobs, scores, None, begun))
                )
                if reason is not None:
                    self._requests.end(state)
                    self.stats.wasted_decodes += _skip(sampled, count)
                    break
            else:
                self._requests.queues.file(state)
        return outputs

    def observe(self, index: int, stage: int, ready_s: float, start_s: float, end_s: float) -> None:
        """When a stage computed a microbatch, by its own clock, for what learns from that (cost
        model, window, the ends' heads); late or never is fine. `ready_s`: when all that it needed
        was there; where it did not wait for that, no later than the end of the one before."""
        self._window.took(index, stage, ready_s, start_s, end_s)
        if self._cost is not None:
            self._cost.observe(index, stage, end_s - start_s)
        if self._head_share is not None:
            self._head_share.took(index, stage, end_s - start_s)

    def observe_head(self, index: int, start_s: float, end_s: float) -> None:
        """Likewise, of a microbatch's head at the first stage."""
        seconds = end_s - start_s
        self._window.headed(start_s, end_s)
        if self._cost is not None:
            self._cost.observe_head(index, seconds)
        if self._head_share is not None:
            self._head_share.headed(seconds)

    def lost(self, now: float) -> None:
        """A fault: all outstanding is void, and the stages forgot every request and all KV.

        Each request computes its KV again and goes on from its last known token. Indices go on.
        """
        self._in_flight.clear()
        self._forecast.forget()
        self._window.forget()
        if self._head_share is not None:
            self._head_share.forget()
        self._is_full, self._made_room = False, None
        self._requests.lost()

    def run_alone(self, request_id: RequestId | None) -> None:
        """Every other request stands aside, whatever it was doing, until this one has ended or the
        next call says otherwise; None: nobody does. What is outstanding runs out."""
        self._requests.run_alone(request_id)

    # ---- completing -----------------------------------------------------------------------------

    def _oldest(self, result: StepResult) -> InFlight:
        """Takes the microbatch that the result is of from the outstanding ones."""
        if not self._in_flight or self._in_flight[0].microbatch.index != result.index:
            raise ValueError(
                f"result of microbatch {result.index}, but outstanding are {self.outstanding}: "
                "results are taken in index order"
            )
        chunks = self._in_flight[0].microbatch.chunks
        num_scored = sum([chunk.num_scored for chunk in chunks])
        expected = sum([chunk.num_logits for chunk in chunks]) - num_scored
        if len(result.tokens) != expected or len(result.logprobs) not in (0, expected):
            raise ValueError(
                f"microbatch {result.index} samples {expected} tokens, the result has "
                f"{len(result.tokens)} and {len(result.logprobs)} logprobs"
            )
        if len(result.counts) != len(chunks) or sum(result.counts) != expected:
            raise ValueError(
                f"microbatch {result.index} samples {expected} tokens in {len(chunks)} chunks, the "
                f"result counts {list(result.counts)}"
            )
        if len(result.prompt_logprobs) != num_scored:
            raise ValueError(
                f"microbatch {result.index} scores {num_scored} prompt tokens, the result "
                f"{len(result.prompt_logprobs)}"
            )
        return self._in_flight.popleft()


def _skip(sampled: Iterator[object], count: int) -> int:
    """Takes so many tokens that nobody wants; returns how many."""
    return len(list(islice(sampled, count)))
