"""Makes the next microbatch: asks the policy for a draft, checks it, and gives each request of it
positions and blocks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter

from pipeserve.core.forecast import Forecast
from pipeserve.core.head_share import HeadShare
from pipeserve.core.nouns import Admission, BlockId, Chunk, Microbatch, RequestId, Wait
from pipeserve.core.request_state import RequestState
from pipeserve.core.unfinished import Unfinished
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

# What NamedTuple's own constructor does, without a Python call for every token.
_new_chunk = partial(tuple.__new__, Chunk)
_is_prefilling = attrgetter("prefilling")


@dataclass(frozen=True, slots=True)
class InFlight:
    """A microbatch that was planned, and what its end has to know of it."""

    microbatch: Microbatch
    states: tuple[RequestState, ...]
    """Parallel to the chunks. States, not ids: an id may be used again after its request ended."""
    token_from: int | None
    """The latest microbatch of which it needs a token that is on its way; None: of none."""
    summary: Outstanding


class Planner:
    """Of one engine. What it needs to know of the microbatches in flight, it is handed."""

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        requests: Unfinished,
        window: Window,
        forecast: Forecast,
        cost: CostModel | None,
        head_share: HeadShare | None,
    ) -> None:
        """`head_share`: where both ends have the head."""
        self.last: Outstanding | None = None
        """The microbatch planned last; None before the first."""
        self.why: Why | None = None
        """Why it is no larger, where its policy says so."""
        self._policy, self._limits = policy, limits
        self._requests = requests
        self._states, self._queues = requests.states, requests.queues
        self._pool = requests.pool
        self._window, self._forecast, self._cost = window, forecast, cost
        self._head_share = head_share
        self._next_index = 0

    @property
    def window(self) -> int:
        """As `Engine.window`."""
        most = self._window.size
        if not self._queues.prefill_backlog:
            most = min(most, len(self._queues.running))
        return max(self._window.least, most)

    def plan(self, in_flight: Collection[InFlight], now: float) -> InFlight | Wait:
        """The next microbatch, or what it waits for. Raises PolicyError when a draft is wrong."""
        while True:
            draft = self._policy.compose(self._view(in_flight), now)
            for request_id in draft.preempt:
                self._preempt(request_id)
            if draft.chunks:
                return self._apply(draft, now)
            if draft.admit:
                raise self._wrong(f"admits {list(draft.admit)} but gives them no chunk")
            if not draft.preempt:
                break  # otherwise blocks came free: ask again
        if not in_flight:
            raise self._wrong("plans nothing, although nothing is outstanding that could change it")
        return Wait(draft.wait)

    # ---- what the policy sees -------------------------------------------------------------------

    def _view(self, in_flight: Iterable[InFlight]) -> View:
        queues = self._queues
        return View(
            limits=self._limits,
            window=self.window,
            waiting=queues.waiting,
            running=queues.running,
            decodes=queues.decodes,
            prefills=queues.prefills,
            num_decoding=queues.num_decoding,
            decoding_context=queues.decoding_context,
            prefill_backlog=queues.prefill_backlog,
            free_blocks=self._pool.num_free,
            outstanding=tuple([flight.summary for flight in in_flight]),
            last=self.last,
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
        num_tokens = len(blocks) * self._limits.block_size
        return Prefix(num_tokens, len(blocks), self._pool.num_idle(blocks))

    def _freed_by(self, request_ids: Collection[RequestId]) -> int:
        tables = (self._states[request_id].table for request_id in request_ids)
        return self._pool.num_freed(block for table in tables for block in table.blocks)

    # ---- what becomes of its draft --------------------------------------------------------------

    def _preempt(self, request_id: RequestId) -> None:
        state = self._states.get(request_id)
        if state is None or not state.running:
            raise self._wrong(f"preempts request {request_id}, which does not run")
        self._requests.preempt(state)

    def _apply(self, draft: Draft, now: float) -> InFlight:
        """Makes the microbatch. Prefixes are shared before any block of this draft is published:
        its own prompts are not there yet when its chunks run."""
        num_tokens = sum(draft.chunks.values())
        if num_tokens > self._limits.max_num_batched_tokens:
            raise self._wrong(
                f"drafts {num_tokens} tokens, over the {self._limits.max_num_batched_tokens} "
                "of a microbatch"
            )
        admitted = tuple([self._admit(request_id, draft, now) for request_id in draft.admit])
        try:
            states = tuple(map(self._queues.plannable, draft.chunks, draft.chunks.values()))
        except LookupError as error:
            raise self._wrong(str(error)) from None
        num_decodes = len(states) - sum(map(_is_prefilling, states))
        chunks = tuple(map(self._chunk, states, draft.chunks.values(), repeat(draft.admit)))
        released = self._requests.take_released()
        microbatch = Microbatch(
            self._next_index, chunks, admitted, released, self._is_head_at_first(chunks)
        )
        self._next_index += 1
        sources = [chunk.token_from for chunk in chunks if chunk.token_from is not None]
        token_from, cost = max(sources, default=None), None
        if self._cost is not None:
            cost = self._cost.predict(microbatch)
            ready_s = now if token_from is None else max(now, self._forecast.known_s(token_from))
            self._forecast.planned(microbatch.index, cost.seconds, ready_s)
        self.last = Outstanding(microbatch.index, num_decodes, num_tokens - num_decodes, cost)
        self.why = draft.why
        return InFlight(microbatch, states, token_from, self.last)

    def _is_head_at_first(self, chunks: Sequence[Chunk]) -> bool:
        """Prompt tokens are scored on the last stage alone, by rows that would be many to send."""
        if self._head_share is None or any(chunk.num_scored for chunk in chunks):
            return False
        samples = any(chunk.num_logits for chunk in chunks)
        return samples and self._head_share.at_first()

    def _admit(self, request_id: RequestId, draft: Draft, now: float) -> Admission:
        waiting = self._queues.waiting.get(request_id)
        if waiting is None or waiting.num_outstanding:
            raise self._wrong(
                f"admits request {request_id}, which is not waiting or still runs out"
            )
        if len(self._queues.running) == self._limits.max_num_seqs:
            raise self._wrong(f"runs more than max_num_seqs = {self._limits.max_num_seqs} requests")
        if request_id not in draft.chunks:
            raise self._wrong(f"admits request {request_id} but gives it no chunk")
        state, stats = self._states[request_id], self._requests.stats
        blocks = [] if state.num_imported else self._pool.match(state.matchable_keys)
        first_time = not state.was_admitted
        state.start(blocks, now)
        if first_time and state.reads_cache:
            stats.prefix_queries += state.num_known
            stats.prefix_hits += state.num_slots
        stats.cached_prefix_tokens += state.num_slots
        self._queues.admit(state)
        return Admission(request_id, state.tokens[:], state.num_prompt, tuple(blocks))

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
        if state.keys and (num_tokens > 1 or stop % self._limits.block_size == 0):
            state.table.publish(state.keys, stop)
        num_logits = num_scored + samples
        return _new_chunk((state.id, start, stop, new_blocks, token_from, num_logits, num_scored))

    def _grow(self, state: RequestState, num_positions: int) -> tuple[BlockId, ...]:
        missing = state.table.num_missing(num_positions)
        if missing > self._pool.num_free:
            raise self._wrong(f"needs {missing} blocks, {self._pool.num_free} are free")
        return state.grow(num_positions)

    def _wrong(self, what: str) -> PolicyError:
        return PolicyError(f"policy {self._policy.name} {what}")
