"""The requests that have not ended: how far each is, where it stands, which blocks it holds."""

from dataclasses import dataclass

from pipeserve.core.blocks import BlockPool
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.order import Order
from pipeserve.core.queues import Queues
from pipeserve.core.request_state import RequestState, check_fits
from pipeserve.core.view import Limits, Traits


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


class Unfinished:
    """All of one engine, and what was counted of them and of those that ended."""

    def __init__(self, limits: Limits, traits: Traits) -> None:
        self.stats = Stats()
        self.states: dict[RequestId, RequestState] = {}
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self._limits = limits
        self._order = Order(limits.order)
        self.queues = Queues(traits, self._order.is_binding)
        self._released: list[RequestId] = []
        self._num_added = 0

    def add(self, request: Request, now: float) -> None:
        """As `Engine.add`."""
        if request.id in self.states:
            raise ValueError(f"request id {request.id} is in use")
        check_fits(request, self._limits)
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
        state = RequestState(request, self._num_added, precedence, now, self._limits, self.pool)
        self._num_added += 1
        self.states[request.id] = state
        if not self._hold(state):
            self.queues.file(state)

    def end(self, state: RequestState) -> None:
        """Whatever it was doing. What is outstanding of it runs out."""
        state.finished = True
        self.queues.drop(state)
        self.queues.let_go(state)
        self._give_up_kv(state)
        del self.states[state.id]
        if state.id == self.queues.alone:
            self.run_alone(None)

    def preempt(self, state: RequestState) -> None:
        """Back to the front of those that wait: its KV will be computed again."""
        self._give_up_kv(state)
        state.rewind()
        self.queues.to_front(state)
        self.stats.preemptions += 1

    def run_alone(self, request_id: RequestId | None) -> None:
        """As `Engine.run_alone`."""
        self.queues.alone = request_id if request_id in self.states else None
        for state in self._youngest_first():
            self.queues.let_go(state)
            if state.running and self.queues.alone not in (None, state.id):
                self._give_up_kv(state)
                state.rewind()
            if not state.running:
                self.queues.to_front(state)

    def lost(self) -> None:
        """The stages forgot every request and all KV: all begin again, with the tokens that they
        have."""
        self._released.clear()
        self.pool.reset()
        states = self._youngest_first()
        for state in states:
            state.forget_outstanding()
            state.table.forget()
            state.rewind()
            self.queues.drop(state)
        for state in states:
            if not self._hold(state):
                self.queues.to_front(state)

    def take_released(self) -> tuple[RequestId, ...]:
        """That gave up their KV since the last time: the stages are to forget them."""
        released = tuple(self._released)
        self._released.clear()
        return released

    def _hold(self, state: RequestState) -> bool:
        """Keeps a sample back while the prompt that it is to share is not planned."""
        sample_of = state.request.sample_of
        first = self.states.get(sample_of) if sample_of is not None else None
        if self.queues.alone is not None or first is None:
            return False
        if not first.prefilling or not state.matchable_keys:
            return False
        self.queues.hold(state, until=first)
        return True

    def _youngest_first(self) -> list[RequestState]:
        """So that each may go to the front in turn."""
        return sorted(self.states.values(), key=lambda state: -state.number)

    def _give_up_kv(self, state: RequestState) -> None:
        """Frees the blocks, and lets the stages forget the request if they know it."""
        if state.running:
            state.table.clear()
            self._released.append(state.id)
