"""The engine's private record of one unfinished request, and the queues that policies look into."""

from collections import OrderedDict
from types import MappingProxyType

from pipeserve.core.blocks import BlockPool, BlockTable, extend_keys
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.view import Limits, RequestView, Traits
from pipeserve.errors import CapacityError

MAX_ON_WAY = 2
"""Tokens of a request on their way: one in flight, one planned ahead (DESIGN.md, 'Order')."""


class Record:
    """Progress of one request."""

    __slots__ = (
        "arrived",
        "backlog",
        "finished",
        "is_decoding",
        "keys",
        "limit",
        "limits",
        "num_imported",
        "number",
        "on_way",
        "outstanding",
        "planned",
        "prefilling",
        "request",
        "running",
        "table",
        "tokens",
    )

    def __init__(
        self, request: Request, number: int, arrived: float, limits: Limits, pool: BlockPool
    ):
        self.request = request
        self.number = number  # order of arrival
        self.arrived = arrived
        self.limits = limits
        self.limit = longest(request, limits)
        self.num_imported = request.num_imported  # until it is preempted
        self.tokens = list(request.prompt)  # known ids, prompt and outputs
        self.table = BlockTable(pool)
        self.keys: list[bytes] = []  # prefix key of each full block of `tokens`
        self.planned = 0  # positions in the KV cache once all outstanding microbatches have run
        self.on_way: list[int] = []  # microbatches that sample a token of this request
        self.outstanding = 0  # microbatches that name it
        self.running = False
        self.prefilling = True  # until a chunk reaches the end of the known tokens
        self.finished = False
        self.is_decoding = False  # as `Queues` last counted it
        self.backlog = 0  # likewise
        self.update_keys()

    @property
    def num_tokens(self) -> int:
        """Tokens known or on their way."""
        return len(self.tokens) + len(self.on_way)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def matchable_keys(self) -> list[bytes]:
        """Keys of the blocks that may be shared: never all, the last token must be computed."""
        return self.keys[: (len(self.tokens) - 1) // self.limits.block_size]

    def update_keys(self) -> None:
        if self.limits.enable_prefix_caching:
            salt = self.request.cache_salt
            extend_keys(self.keys, self.tokens, self.limits.block_size, salt)

    def append(self, token: int) -> None:
        """A sampled token became known; a block may thereby be full of known tokens."""
        self.tokens.append(token)
        self.on_way.pop(0)
        if len(self.tokens) % self.limits.block_size == 0:
            self.update_keys()
            self.table.publish(self.keys, self.planned)

    def rewind(self) -> None:
        """Back to waiting: no KV, all known tokens to prefill. The blocks are the caller's."""
        self.planned = 0
        self.num_imported = 0
        self.running = False
        self.prefilling = True

    def view(self) -> RequestView:
        return RequestView(
            self.request.id,
            self.arrived,
            len(self.tokens),
            self.limit,
            self.planned,
            self.table.num_slots,
            self.outstanding,
            self.on_way[-1] if self.on_way else None,
        )


def longest(request: Request, limits: Limits) -> int:
    """Most tokens that a request can reach, prompt and output."""
    return min(len(request.prompt) + request.params.max_tokens, limits.max_model_len)


def check_fits(request: Request, limits: Limits) -> None:
    """Raises CapacityError for a request that could never run to its end, even alone."""
    num_prompt = len(request.prompt)
    if num_prompt == 0:
        raise CapacityError(f"the prompt of request {request.id} is empty: give it a token")
    if request.params.max_tokens < 1:
        raise CapacityError(f"max_tokens is {request.params.max_tokens}: ask for at least 1")
    if num_prompt >= limits.max_model_len:
        raise CapacityError(
            f"the prompt has {num_prompt} tokens and the context {limits.max_model_len}, one of "
            "them for the output: shorten the prompt or raise max_model_len"
        )
    positions = longest(request, limits) - 1  # the last token's KV is never computed
    num_slots = limits.num_blocks * limits.block_size
    if positions > num_slots:
        raise CapacityError(
            f"the request can reach {positions} positions and the KV cache holds {num_slots}: "
            "lower max_tokens or give the KV cache more memory"
        )


class Queues:
    """Files each request's view where a policy looks for it, so that `plan` touches no other.

    Plain dicts keep the order; `waiting` is an OrderedDict because requests come back to its front
    and leave from it by the thousand.
    """

    def __init__(self, traits: Traits):
        self._traits = traits
        self._max_on_way = MAX_ON_WAY if traits.plans_ahead else 1
        self._chunks_follow = traits.chunk_pipelining and not traits.one_in_flight
        self._waiting: OrderedDict[RequestId, RequestView] = OrderedDict()
        self._running: dict[RequestId, RequestView] = {}
        self._decodes: dict[RequestId, RequestView] = {}
        self._prefills: dict[RequestId, RequestView] = {}
        self.waiting = MappingProxyType(self._waiting)
        self.running = MappingProxyType(self._running)
        self.decodes = MappingProxyType(self._decodes)
        self.prefills = MappingProxyType(self._prefills)
        self.num_decoding = 0
        self.prefill_backlog = 0

    def file(self, record: Record) -> None:
        """Brings the queues up to date with a request that changed; its place in them stays."""
        request_id = record.request.id
        view = record.view()
        if not record.running:
            self._waiting[request_id] = view
            self._count(record, is_decoding=False, backlog=len(record.tokens))
        elif record.prefilling:
            self._running[request_id] = view
            free = not record.outstanding or self._chunks_follow
            self._set(self._prefills, view, free)
            self._count(record, is_decoding=False, backlog=len(record.tokens) - record.planned)
        else:
            self._running[request_id] = view
            is_decoding = record.num_tokens < record.limit
            free = not record.outstanding or not self._traits.one_in_flight
            ready = is_decoding and free and len(record.on_way) < self._max_on_way
            self._set(self._decodes, view, ready)
            self._count(record, is_decoding=is_decoding, backlog=0)

    def planned(self, record: Record) -> None:
        """As `file`, for a request that was just given a chunk: its decodes go to the back."""
        self._decodes.pop(record.request.id, None)
        if not record.prefilling:
            self._prefills.pop(record.request.id, None)
        self.file(record)

    def admit(self, record: Record) -> None:
        del self._waiting[record.request.id]
        record.running = True
        self.file(record)

    def to_front(self, record: Record) -> None:
        """A request that runs no longer goes before all that wait."""
        self.drop(record)
        self.file(record)
        self._waiting.move_to_end(record.request.id, last=False)

    def drop(self, record: Record) -> None:
        """The request is in no queue."""
        for queue in (self._waiting, self._running, self._decodes, self._prefills):
            queue.pop(record.request.id, None)
        self._count(record, is_decoding=False, backlog=0)

    def _set(self, queue: dict[RequestId, RequestView], view: RequestView, ready: bool) -> None:
        if ready:
            queue[view.id] = view
        else:
            queue.pop(view.id, None)

    def _count(self, record: Record, is_decoding: bool, backlog: int) -> None:
        self.num_decoding += is_decoding - record.is_decoding
        self.prefill_backlog += backlog - record.backlog
        record.is_decoding = is_decoding
        record.backlog = backlog
