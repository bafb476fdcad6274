"""Where each unfinished request stands, for policies to look into: it waits, it runs, its prompt
can go on, it can decode."""

from collections.abc import Mapping
from types import MappingProxyType

from pipeserve.core.nouns import RequestId
from pipeserve.core.order import RequestQueue
from pipeserve.core.request_state import RequestState
from pipeserve.core.view import RequestView, Traits

MAX_ON_WAY = 2
"""Tokens of a request on their way: one in flight, one planned ahead (docs/design.md, 'Order is the
guarantee')."""


class Queues:
    """Files each request where a policy looks for it, so that `plan` touches no other.

    Whoever waits or prefills stands in order (`order.py`), and who runs in that of admission or, if
    the order is binding, in order; decodes take turns.
    """

    def __init__(self, traits: Traits, is_binding: bool):
        self._one_in_flight, self._is_binding = traits.one_in_flight, is_binding
        self._max_on_way = MAX_ON_WAY if traits.plans_ahead else 1
        self._chunks_follow = traits.chunk_pipelining and not traits.one_in_flight
        self._waiting: RequestQueue[RequestState] = RequestQueue()
        self._running: RequestQueue[RequestState] = RequestQueue()
        self._prefills: RequestQueue[RequestState] = RequestQueue()
        self._decodes: dict[RequestId, RequestState] = {}
        self.waiting: Mapping[RequestId, RequestView] = MappingProxyType(self._waiting)
        self.running: Mapping[RequestId, RequestView] = MappingProxyType(self._running)
        self.prefills: Mapping[RequestId, RequestView] = MappingProxyType(self._prefills)
        self.decodes: Mapping[RequestId, RequestView] = MappingProxyType(self._decodes)
        self.alone: RequestId | None = None
        """No other request may wait to be admitted; None: all may."""
        self.num_decoding = 0
        self.decoding_context = 0
        self.prefill_backlog = 0

    def file(self, state: RequestState) -> None:
        """Brings the queues up to date with a request that changed; its place in them stays."""
        if state.prefilling:
            self._file_prefill(state)
            return
        is_decoding = state.num_known + state.num_on_way < state.num_longest
        if is_decoding != state.is_decoding:
            self._count(state, is_decoding, backlog=0)
        if (
            is_decoding
            and state.num_on_way < self._max_on_way
            and not (self._one_in_flight and state.num_outstanding)
        ):
            self._decodes[state.id] = state

    def plan(self, state: RequestState, num_tokens: int, index: int) -> bool:
        """The next positions of a request are in microbatch `index`; whether it samples a token of
        them. A decode goes to the back."""
        state.num_planned += num_tokens
        state.num_outstanding += 1
        if state.prefilling:
            return self._plan_prefill(state, index)
        state.num_on_way += 1
        state.token_from = index
        state.context += 1
        self.decoding_context += 1
        del self._decodes[state.id]
        self.file(state)
        return True

    def admit(self, state: RequestState) -> None:
        self._waiting.discard(state.id)
        state.running = True
        self._running.put(state.id, state, state.precedence if self._is_binding else 0.0)
        self.file(state)

    def hold(self, state: RequestState, until: RequestState) -> None:
        """Keeps a request back until the prompt of another is planned, or that one ended."""
        until.held += (state,)

    def let_go(self, state: RequestState) -> None:
        """Those that this request held back came with it: they go to the front."""
        for held in sorted(state.held, key=lambda held: -held.number):
            if not held.finished:
                self.to_front(held)
        state.held = ()

    def to_front(self, state: RequestState) -> None:
        """A request that runs no longer waits again, before all others of its precedence."""
        self.drop(state)
        self.file(state)
        if state.id in self._waiting:
            self._waiting.to_front(state.id)

    def drop(self, state: RequestState) -> None:
        """Takes the request out of every queue."""
        for queue in (self._waiting, self._running, self._prefills):
            queue.discard(state.id)
        self._decodes.pop(state.id, None)
        self._count(state, is_decoding=False, backlog=0)

    def plannable(self, request_id: RequestId, num_tokens: int) -> RequestState:
        """The request, if that many positions of it may be planned now. Raises LookupError."""
        state = self._decodes.get(request_id)
        if state is not None and num_tokens == 1:
            return state
        state = state or self._prefills.get(request_id)
        if state is None:
            raise LookupError(
                f"runs request {request_id}, which does not run or, by the policy's traits, has to "
                "wait for what is outstanding"
            )
        most = state.num_unplanned if state.prefilling else 1
        if not 1 <= num_tokens <= most:
            raise LookupError(f"runs {num_tokens} positions of request {request_id}, not 1..{most}")
        return state

    def _plan_prefill(self, state: RequestState, index: int) -> bool:
        self._count(state, is_decoding=False, backlog=state.num_unplanned)
        is_last = not state.num_unplanned
        if is_last:
            state.prefilling = False
            state.num_on_way += 1
            state.token_from = index
            self.let_go(state)
        if is_last or not self._chunks_follow:
            self._prefills.discard(state.id)
        self.file(state)
        return is_last

    def _file_prefill(self, state: RequestState) -> None:
        if not state.running and self.alone not in (None, state.id):
            return
        self._count(state, is_decoding=False, backlog=state.num_unplanned)
        if not state.running:
            self._waiting.put(state.id, state, state.precedence)
        elif not state.num_outstanding or self._chunks_follow:
            self._prefills.put(state.id, state, state.precedence)

    def _count(self, state: RequestState, is_decoding: bool, backlog: int) -> None:
        context = state.num_planned if is_decoding else 0
        self.num_decoding += is_decoding - state.is_decoding
        self.decoding_context += context - state.context
        self.prefill_backlog += backlog - state.backlog
        state.is_decoding = is_decoding
        state.context = context
        state.backlog = backlog
