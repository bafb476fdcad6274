"""The order in which requests are served (`--order`): the one place where it is decided.

A new order is one line of `ORDERS`. Policies know none of them: the queues that they look into are
sorted (`RequestQueue`). Whoever is first in order is admitted first; a request that was preempted
goes back before all others of its precedence, for it came before them. Nothing that runs is
preempted only because a request that goes first has come. Both as in vLLM. Who was admitted last is
preempted first, unless requests have priorities (`BINDING`): by length, those that came later would
push a long one out of a small pool again and again, and all that it had computed with it.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

from pipeserve.core.nouns import Request, RequestId

T = TypeVar("T")

PASSED = 32
"""Under sjf, the shorter prompts that pass a prompt are together at most so many times as long as
it is: the larger, the sooner short ones are served, and the later the longest. Near capacity at 4
hardly anything passes, and half of all wait for longer than at 32 (docs/schedules.md)."""

Rule = Callable[[Request, int], float]
"""A request, and the prompt tokens of all that came, its own included: its precedence."""

ORDERS: Mapping[str, Rule] = MappingProxyType(
    {
        "fcfs": lambda request, came: 0,
        "priority": lambda request, came: request.priority,
        "sjf": lambda request, came: came + PASSED * prompt_work(request),
    }
)
"""The precedence of a request under each order: lower goes first, and those with the same go by
arrival. It stays what it is from arrival to end. That of `Limits` where none is given comes first.

sjf is shortest prompt first, with ageing. Let B be what came by a prompt, itself included, and w
its own work. A later one passes it where B' + kw' < B + kw; of all that do, the last has a B' of at
least B and their sum, so their sum is under k(w - w') < kw: at most k times its own work, whatever
the load and however fast the stages are. No clock is in it. Work is counted in tokens, which are
known at arrival and stay what they are; what is learnt of costs later would change it."""


BINDING = frozenset({"priority"})
"""Orders that hold among running requests, too: of these the last in order is preempted first. Were
sjf one of them, a request would stand still for 11 s between two of its tokens with `uniform`, and
for 26 with `token_throttle`, where it is 3 and 2 (150 requests in small pools, four CPU stages,
simulated)."""


class Order:
    """Gives each request of an engine its precedence as it comes."""

    def __init__(self, name: str) -> None:
        self._rule = ORDERS[name]
        self.is_binding = name in BINDING
        self._came = 0

    def precedence(self, request: Request) -> float:
        self._came += prompt_work(request)
        return self._rule(request, self._came)


def prompt_work(request: Request) -> int:
    """Prompt tokens to compute; the prefix cache is not asked, it may be another by then."""
    return len(request.prompt) - request.num_imported


class RequestQueue(Mapping[RequestId, T]):
    """Something of each request, by precedence; of the same precedence, as they came.

    Requests come and leave by the thousand, at both ends, so each precedence has an OrderedDict.
    All of them are in one where the order is fcfs.
    """

    def __init__(self) -> None:
        self._lanes: dict[float, OrderedDict[RequestId, T]] = {}
        self._sorted: list[float] = []  # the keys of `_lanes`, in order
        self._precedence: dict[RequestId, float] = {}

    def put(self, request_id: RequestId, item: T, precedence: float) -> None:
        """Behind all of its precedence; one that is in the queue already keeps its place."""
        lane = self._lanes.get(precedence)
        if lane is None:
            lane = self._lanes[precedence] = OrderedDict()
            insort(self._sorted, precedence)
        lane[request_id] = item
        self._precedence[request_id] = precedence

    def to_front(self, request_id: RequestId) -> None:
        """Before all others of its precedence."""
        self._lanes[self._precedence[request_id]].move_to_end(request_id, last=False)

    def discard(self, request_id: RequestId) -> None:
        """Takes the request out, if it is in the queue."""
        precedence = self._precedence.pop(request_id, None)
        if precedence is None:
            return
        lane = self._lanes[precedence]
        del lane[request_id]
        if not lane:
            del self._lanes[precedence]
            del self._sorted[bisect_left(self._sorted, precedence)]

    def __getitem__(self, request_id: RequestId) -> T:
        return self._lanes[self._precedence[request_id]][request_id]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._precedence

    def __len__(self) -> int:
        return len(self._precedence)

    def __iter__(self) -> Iterator[RequestId]:
        return chain.from_iterable(self._in_order())

    def values(self) -> ValuesView[T]:
        return _Values(self)

    def in_order(self) -> Iterator[T]:
        """The items."""
        return chain.from_iterable(map(OrderedDict.values, self._in_order()))

    def _in_order(self) -> Iterable[OrderedDict[RequestId, T]]:
        return map(self._lanes.__getitem__, self._sorted)


class _Values(ValuesView[T]):
    """What `Mapping` offers, without a look-up for each item: policies go through hundreds."""

    _mapping: RequestQueue[T]

    def __iter__(self) -> Iterator[T]:
        return self._mapping.in_order()
