"""The engine: which positions of which request run next, and what came of them. Sans-I/O.

It starts nothing, sends nothing and knows no clock: a host calls `plan`, carries each microbatch
through the stages, and calls `complete`. The driver does so with real stages, the simulator on
virtual time, the tests by hand; the same calls in the same order give the same microbatches.

It rests on one guarantee: every stage runs every microbatch, strictly by index. Hence a block may
be freed, reused or shared as soon as the microbatch that frees or fills it is planned, and what is
outstanding is never recalled: it runs out, and its result is taken or dropped.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat

from pipeserve.core.blocks import BlockPool
from pipeserve.core.forecast import Forecast
from pipeserve.core.nouns import (
    Admission,
    BlockId,
    Chunk,
    Microbatch,
    Output,
    PipelinePlan,
    Request,
    RequestId,
    StepResult,
    Wait,
)
from pipeserve.core.order import Order
from pipeserve.core.request_state import Queues, RequestState, check_fits
from pipeserve.core.view import (
    CostModel,
    Draft,
    Limits,
    Outstanding,
    Policy,
    PolicyError,
    Prefix,
    View,
    Why,
)
from pipeserve.core.window import Window
from pipeserve.errors import ConfigError

__all__ = ["Engine", "Limits", "Stats"]


# What NamedTuple's own constructor does, without a Python call for every token.
_new_chunk = partial(tuple.__new__, Chunk)
_new_output = partial(tuple.__new__, Output)


@dataclass(slots=True)
class Stats:
    """Counted since the engine was made."""

    preemptions: int = 0
    wasted_decodes: int = 0
    """Sampled tokens that were dropped because their request had ended."""
    cached_prefix_tokens: int = 0
    """Positions that the prefix cache saved from being computed."""
    prefix_queries: int = 0
    """Tokens that were looked for in the prefix cache when their request was first admitted."""
    prefix_hits: int = 0
    """Those of them that it had."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    microbatch: Microbatch
    states: tuple[RequestState, ...]
    """Parallel to the chunks. Records, not ids: an id may be used again after its request ended."""
    summary: Outstanding


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
        self.stats = Stats()
        self.pipeline = plan
        self._window = Window(plan)
        self._cost = cost
        self._order = Order(limits.order)
        self._forecast = Forecast(len(plan.stages))
        self._pool = BlockPool(limits.num_blocks, limits.block_size)
        self._states: dict[RequestId, RequestState] = {}
        self._queues = Queues(policy.traits)
        self._in_flight: deque[_InFlight] = deque()
        self._is_full = False
        """The last try at a plan found the window full."""
        self._made_room: int | None = None
        """The completion after it; the next plan is because of that."""
        self._last: Outstanding | None = None
        self._why: Why | None = None
        self._released: list[RequestId] = []
        self._num_added = 0
        self._next_index = 0

    # ---- what a host may ask --------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        return len(self._states)

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
        most = self._window.size
        if not self._queues.prefill_backlog:
            most = min(most, len(self._queues.running))
        return max(self._window.least, most)

    @property
    def last(self) -> Outstanding | None:
        """The microbatch planned last, completed or not; None before the first."""
        return self._last

    @property
    def why(self) -> Why | None:
        """Why the microbatch planned last is no larger, where its policy says so."""
        return self._why

    @property
    def last_known_s(self) -> float | None:
        """When the tokens of the microbatch planned last are predicted to be known; None where it
        is not outstanding, or without a cost model."""
        if not self._in_flight or self._last is None or self._cost is None:
            return None
        return self._forecast.known_s(self._last.index)

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a microbatch outstanding."""
        return bool(self._states or self._in_flight)

    @property
    def num_running(self) -> int:
        """Requests that are admitted and have not ended."""
        return len(self._queues.running)

    def requests_of(self, index: int) -> tuple[RequestId, ...]:
        """That have a chunk in the outstanding microbatch `index`; none, when it is not."""
        flights = (flight for flight in self._in_flight if flight.microbatch.index == index)
        return tuple(c.request_id for flight in flights for c in flight.microbatch.chunks)

    @property
    def num_waiting(self) -> int:
        """Unfinished requests that are not admitted."""
        return len(self._states) - len(self._queues.running)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that no request holds; cached ones among them."""
        return self._pool.num_free

    # ---- what a host may do ---------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queues a request.

        Raises CapacityError when it could never run, ValueError when its id is in use, when it
        imports positions that it does not have, or wants the logprobs of such.
        """
        if request.id in self._states:
            raise ValueError(f"request id {request.id} is in use")
        check_fits(request, self.limits)
        if not 0 <= request.num_imported < len(request.prompt):
            raise ValueError(
                f"request {request.id} imports {request.num_imported} of {len(request.prompt)} "
                "positions: at most all but the last"
            )
        if request.num_imported and request.params.prompt_logprobs is not None:
            raise ValueError(
                f"request {request.id} wants prompt_logprobs and imports {request.num_imported} "
                "positions, whose logits are not computed here"
            )
        precedence = self._order.precedence(request)
        state = RequestState(request, self._num_added, precedence, now, self.limits, self._pool)
        self._num_added += 1
        self._states[request.id] = state
        if not self._hold(state):
            self._queues.file(state)

    def finish(self, request_id: RequestId, reason: str, now: float) -> Output | None:
        """Ends a request now (abort, stop string); None when it has ended already or never was.

        What is outstanding of it runs out and is dropped.
        """
        state = self._states.get(request_id)
        if state is None:
            return None
        self._end(state)
        return Output(request_id, None, reason)

    def plan(self, now: float) -> Microbatch | Wait:
        """The next microbatch, or why there is none. Raises PolicyError when a draft is wrong."""
        if not self._states:
            return Wait("no_requests")
        if len(self._in_flight) >= self.window + self.policy.traits.plans_ahead:
            self._is_full, self._made_room = True, None
            return Wait("window")
        while True:
            draft = self.policy.compose(self._view(), now)
            for request_id in draft.preempt:
                self._preempt(request_id)
            if draft.chunks:
                return self._apply(draft, now)
            if draft.admit:
                raise self._wrong(f"admits {list(draft.admit)} but gives them no chunk")
            if not draft.preempt:
                break  # otherwise blocks came free: ask again
        if not self._in_flight:
            raise self._wrong("plans nothing, although nothing is outstanding that could change it")
        self._made_room = None
        return Wait(draft.wait)

    def complete(self, result: StepResult, now: float) -> list[Output]:
        """Takes what the last stage sampled for the oldest outstanding microbatch. A request whose
        chunk failed ends with the finish reason "error".

        Raises ValueError for any other index, or for a wrong number of tokens.
        """
        flight = self._oldest(result)
        self._forecast.completed(result.index, now)
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
                self._pool.withdraw(state.keys)
                self._end(state)
                continue
            while count:
                count -= 1
                token, logprobs = next(sampled)
                reason = state.append(token, now)
                scores = None
                if state.prompt_logprobs is not None:
                    scores = state.take_prompt_logprobs()
                begun = state.begun(now) if state.num_outputs == 1 else None
                outputs.append(
                    _new_output((state.id, token, reason, logprobs, scores, None, begun))
                )
                if reason is not None:
                    self._end(state)
                    self.stats.wasted_decodes += _skip(sampled, count)
                    break
            else:
                self._queues.file(state)
        return outputs

    def observe(self, index: int, stage: int, ready_s: float, start_s: float, end_s: float) -> None:
        """When a stage computed a microbatch, by its own clock, for cost model and window; late or
        never is fine. `ready_s`: when all that it needed was there; where it did not wait for that,
        no later than the end of the one before."""
        self._window.took(index, stage, ready_s, start_s, end_s)
        if self._cost is not None:
            self._cost.observe(index, stage, end_s - start_s)

    def lost(self, now: float) -> None:
        """A fault: all outstanding is void, and the stages forgot every request and all KV.

        Each request computes its KV again and goes on from its last known token. Indices go on.
        """
        self._in_flight.clear()
        self._forecast.forget()
        self._window.forget()
        self._is_full, self._made_room = False, None
        self._released.clear()
        self._pool.reset()
        states = sorted(self._states.values(), key=lambda state: -state.number)
        for state in states:
            state.forget_outstanding()
            state.table.forget()
            state.rewind()
            self._queues.drop(state)
        for state in states:
            if not self._hold(state):
                self._queues.to_front(state)

    def run_alone(self, request_id: RequestId | None) -> None:
        """Every other request stands aside, whatever it was doing, until this one has ended or the
        next call says otherwise; None: nobody does. What is outstanding runs out."""
        self._queues.alone = request_id if request_id in self._states else None
        for state in sorted(self._states.values(), key=lambda state: -state.number):
            self._queues.let_go(state)
            if state.running and self._queues.alone not in (None, state.id):
                self._give_up_kv(state)
                state.rewind()
            if not state.running:
                self._queues.to_front(state)

    # ---- requests -------------------------------------------------------------------------------

    def _hold(self, state: RequestState) -> bool:
        """Keeps a sample back while the prompt that it is to share is not planned."""
        sample_of = state.request.sample_of
        first = self._states.get(sample_of) if sample_of is not None else None
        if self._queues.alone is not None or first is None:
            return False
        if not first.prefilling or not state.matchable_keys:
            return False
        self._queues.hold(state, until=first)
        return True

    def _end(self, state: RequestState) -> None:
        state.finished = True
        self._queues.drop(state)
        self._queues.let_go(state)
        self._give_up_kv(state)
        del self._states[state.id]
        if state.id == self._queues.alone:
            self.run_alone(None)

    def _preempt(self, request_id: RequestId) -> None:
        state = self._states.get(request_id)
        if state is None or not state.running:
            raise self._wrong(f"preempts request {request_id}, which does not run")
        self._give_up_kv(state)
        state.rewind()
        self._queues.to_front(state)
        self.stats.preemptions += 1

    def _give_up_kv(self, state: RequestState) -> None:
        """Frees the blocks, and lets the stages forget the request if they know it."""
        if state.running:
            state.table.clear()
            self._released.append(state.request.id)

    # ---- planning -------------------------------------------------------------------------------

    def _view(self) -> View:
        queues = self._queues
        return View(
            limits=self.limits,
            window=self.window,
            waiting=queues.waiting,
            running=queues.running,
            decodes=queues.decodes,
            prefills=queues.prefills,
            num_decoding=queues.num_decoding,
            decoding_context=queues.decoding_context,
            prefill_backlog=queues.prefill_backlog,
            free_blocks=self._pool.num_free,
            outstanding=tuple(flight.summary for flight in self._in_flight),
            last=self._last,
            prefix=self._prefix,
            freed_by=self._freed_by,
            cost=self._cost,
            forecast=self._forecast,
        )

    def _prefix(self, request_id: RequestId) -> Prefix:
        state = self._states[request_id]
        if state.num_imported:
            return Prefix(state.num_imported, 0, 0)
        blocks = self._pool.match(state.matchable_keys)
        num_tokens = len(blocks) * self.limits.block_size
        return Prefix(num_tokens, len(blocks), self._pool.num_idle(blocks))

    def _freed_by(self, request_ids: Collection[RequestId]) -> int:
        tables = (self._states[request_id].table for request_id in request_ids)
        return self._pool.num_freed(block for table in tables for block in table.blocks)

    def _apply(self, draft: Draft, now: float) -> Microbatch:
        """Makes the microbatch. Prefixes are shared before any block of this draft is published:
        its own prompts are not there yet when its chunks run."""
        num_tokens = sum(draft.chunks.values())
        if num_tokens > self.limits.max_num_batched_tokens:
            raise self._wrong(
                f"drafts {num_tokens} tokens, over the {self.limits.max_num_batched_tokens} "
                "of a microbatch"
            )
        admitted = tuple([self._admit(request_id, draft, now) for request_id in draft.admit])
        try:
            states = tuple(map(self._queues.plannable, draft.chunks, draft.chunks.values()))
        except LookupError as error:
            raise self._wrong(str(error)) from None
        num_decodes = sum([not state.prefilling for state in states])
        chunks = tuple(map(self._chunk, states, draft.chunks.values(), repeat(draft.admit)))
        microbatch = Microbatch(self._next_index, chunks, admitted, tuple(self._released))
        self._next_index += 1
        self._released.clear()
        sources = {c.token_from for c in chunks if c.token_from is not None}
        follows = max(sources, default=self._made_room)
        left_over = num_tokens > num_decodes and self._queues.prefill_backlog > 0
        self._window.planned(microbatch.index, num_tokens, follows, left_over)
        self._made_room = cost = None
        if self._cost is not None:
            cost = self._cost.predict(microbatch)
            ready_s = max([now, *[self._forecast.known_s(index) for index in sources]])
            self._forecast.planned(microbatch.index, cost.seconds, ready_s)
        summary = Outstanding(microbatch.index, num_decodes, num_tokens - num_decodes, cost)
        self._in_flight.append(_InFlight(microbatch, states, summary))
        self._last, self._why = summary, draft.why
        return microbatch

    def _admit(self, request_id: RequestId, draft: Draft, now: float) -> Admission:
        view = self._queues.waiting.get(request_id)
        if view is None or view.num_outstanding:
            raise self._wrong(
                f"admits request {request_id}, which is not waiting or still runs out"
            )
        if len(self._queues.running) == self.limits.max_num_seqs:
            raise self._wrong(f"runs more than max_num_seqs = {self.limits.max_num_seqs} requests")
        if request_id not in draft.chunks:
            raise self._wrong(f"admits request {request_id} but gives it no chunk")
        state = self._states[request_id]
        blocks = [] if state.num_imported else self._pool.match(state.matchable_keys)
        first_time = not state.was_admitted
        state.start(blocks, now)
        if first_time and state.reads_cache:
            self.stats.prefix_queries += state.num_known
            self.stats.prefix_hits += state.num_slots
        self.stats.cached_prefix_tokens += state.num_slots
        self._queues.admit(state)
        num_prompt = len(state.request.prompt)
        return Admission(request_id, state.tokens[:], num_prompt, tuple(blocks))

    def _chunk(
        self, state: RequestState, num_tokens: int, reserved: Mapping[RequestId, int]
    ) -> Chunk:
        """Plans the next positions of a request: blocks, feedback, and its new place in queues."""
        start = state.num_planned
        stop = start + num_tokens
        new_blocks: tuple[BlockId, ...] = ()
        if stop > state.num_slots or state.id in reserved:
            new_blocks = self._grow(state, max(stop, reserved.get(state.id, 0)))
        token_from = state.token_from
        num_scored = 0
        if state.prompt_logprobs is not None:
            num_scored = state.num_scored_by(start, stop)
        samples = self._queues.plan(state, num_tokens, self._next_index)
        if state.keys and (num_tokens > 1 or stop % self.limits.block_size == 0):
            state.table.publish(state.keys, stop)
        num_logits = num_scored + samples
        return _new_chunk((state.id, start, stop, new_blocks, token_from, num_logits, num_scored))

    def _grow(self, state: RequestState, num_positions: int) -> tuple[BlockId, ...]:
        missing = state.table.num_missing(num_positions)
        if missing > self._pool.num_free:
            raise self._wrong(f"needs {missing} blocks, {self._pool.num_free} are free")
        return state.grow(num_positions)

    # ---- completing -----------------------------------------------------------------------------

    def _oldest(self, result: StepResult) -> _InFlight:
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

    def _wrong(self, what: str) -> PolicyError:
        return PolicyError(f"policy {self.policy.name} {what}")


def _skip(sampled: Iterator[object], count: int) -> int:
    """Takes so many tokens that nobody wants; returns how many."""
    return len(list(islice(sampled, count)))
