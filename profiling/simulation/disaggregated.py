"""Two pools of pipelines, one for prefill and one for decode, with KV pulled between them.

DistServe (OSDI'24, section 4): a new request goes to the prefill instance with the shortest queue;
after its first token its KV stays where it is until a decode instance, the least loaded one, has
room and pulls it; then it decodes there to its end. KV that is not pulled takes room from the next
prompts: that is the back-pressure. A prefill instance runs every request with `max_tokens` 1, a
decode instance one whose prompt's KV is imported (`Request.num_imported`).

Times are seconds of virtual time. Pure: no clock, nothing random, nothing is read or written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from pipeserve.core.nouns import Output, Request, RequestId
from pipeserve.core.order import Order, RequestQueue
from pipeserve.core.request_state import check_fits
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.profiling.simulation.simulator import (
    Arrival,
    Served,
    SimulatedPipeline,
    request_of,
    served_of,
)
from pipeserve.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLink:
    """Into one decode instance, over which requests come one after the other."""

    alpha_s: float = 0.0
    bytes_per_s: float = inf
    """All shards of the instance together; inf with `alpha_s` 0 is DistServe's own simulator."""

    def __post_init__(self) -> None:
        if self.alpha_s < 0 or not self.bytes_per_s > 0:
            raise ConfigError(
                f"a KV link of {self.alpha_s} s and {self.bytes_per_s} bytes/s: give a delay of at "
                "least 0 and a bandwidth over 0"
            )

    def seconds(self, num_bytes: int) -> float:
        return self.alpha_s + num_bytes / self.bytes_per_s


@dataclass(slots=True)
class _Instance:
    """One pipeline, and what the host has promised of its KV."""

    pipeline: SimulatedPipeline
    order: Order
    queue: RequestQueue[Served] = field(default_factory=RequestQueue)
    """Not let in yet, in order: prompts without room here, or KV that this instance has to pull."""
    num_requests: int = 0
    """That it has to serve; the pools' measure of load."""
    promised: dict[RequestId, int] = field(default_factory=dict)
    """Blocks of a request. Prefill: let in and not pulled yet. Decode: on the link, or there and
    not admitted yet."""
    num_promised: int = 0
    """Blocks in `promised`."""
    link_free_s: float = 0.0
    is_touched: bool = False
    """Something was added since it last planned."""

    @property
    def limits(self) -> Limits:
        return self.pipeline.engine.limits

    def enqueue(self, request: Request, served: Served) -> None:
        self.queue.put(request.id, served, self.order.precedence(request))
        self.num_requests += 1

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def promise(self, request_id: RequestId, num_blocks: int) -> None:
        self.promised[request_id] = num_blocks
        self.num_promised += num_blocks

    def let_go(self, request_id: RequestId) -> None:
        """Does nothing where nothing is promised: one that was preempted is admitted twice."""
        self.num_promised -= self.promised.pop(request_id, 0)

    def add(self, request: Request, now: float) -> None:
        self.pipeline.add(request, now)
        self.is_touched = True

    def advance(self, now: float) -> list[Output]:
        if not self.is_touched and self.pipeline.next_event_s > now:
            return []
        self.is_touched = False
        return self.pipeline.advance(now)


def _instance_of(pipeline: SimulatedPipeline) -> _Instance:
    return _Instance(pipeline, Order(pipeline.engine.limits.order))


class DisaggregatedSimulation:
    """Requests through both pools, on one clock."""

    def __init__(
        self,
        prefill: Sequence[SimulatedPipeline],
        decode: Sequence[SimulatedPipeline],
        arrivals: Iterable[Arrival],
        *,
        link: KvLink | None = None,
        kv_bytes_per_token: int = 0,
    ) -> None:
        """`arrivals`: by time; may have no end, then `run_until` needs one. No `link`: KV is there
        at once. Engines must not cache prefixes: the ids of simulated prompts mean nothing."""
        self.served: list[Served] = []
        """Every request that has arrived, in order; its id is its place here."""
        self._prefill = [_instance_of(pipeline) for pipeline in prefill]
        self._decode = [_instance_of(pipeline) for pipeline in decode]
        self._arrivals = iter(arrivals)
        self._next = next(self._arrivals, None)
        self._link = link or KvLink()
        self._kv_bytes = kv_bytes_per_token
        self._sources: dict[RequestId, _Instance] = {}  # that hold KV which is not pulled yet
        self._pulls: list[tuple[float, RequestId, _Instance]] = []  # a heap, by when it is there

    def run_until(self, stop_s: float = inf) -> None:
        """Runs on to `stop_s`, or until every request that will come has ended.

        Raises CapacityError for a request that an instance could never hold.
        """
        pools = self._prefill + self._decode
        while True:
            arrival_s = self._next.arrival_s if self._next is not None else inf
            pull_s = self._pulls[0][0] if self._pulls else inf
            now = min(arrival_s, pull_s, *[i.pipeline.next_event_s for i in pools])
            if now > stop_s or now == inf:
                return
            if arrival_s == now:
                self._dispatch(now)
            if pull_s == now:
                self._land(now)
            for instance in self._prefill:
                self._advance_prefill(instance, now)
            for instance in self._decode:
                self._advance_decode(instance, now)

    def _dispatch(self, now: float) -> None:
        """To the prefill instance with the shortest queue."""
        while self._next is not None and self._next.arrival_s <= now:
            arrival, request_id = self._next, RequestId(len(self.served))
            instance = _least_loaded(self._prefill)
            served = served_of(arrival)
            request = _only_first(request_id, served)
            check_fits(request, instance.limits)
            if arrival.max_tokens > 1:
                for decode in self._decode:
                    _check_continues(request_of(request_id, arrival), decode.limits)
            instance.enqueue(request, served)
            self._sources[request_id] = instance
            self.served.append(served)
            self._next = next(self._arrivals, None)

    def _advance_prefill(self, instance: _Instance, now: float) -> None:
        self._let_in(instance, now)
        while outputs := instance.advance(now):
            for output in outputs:
                instance.num_requests -= 1
                self._first_token(output.request_id, now)
            self._let_in(instance, now)
        for request_id, start_s in instance.pipeline.started:
            self.served[request_id].started_s = start_s
        instance.pipeline.started.clear()

    def _let_in(self, instance: _Instance, now: float) -> None:
        """Prompts in order, while the KV of all that is not pulled yet leaves them room."""
        while instance.queue:
            request_id, served = next(iter(instance.queue.items()))
            num_blocks = instance.num_blocks(served.num_prompt_tokens)
            if instance.num_promised + num_blocks > instance.limits.num_blocks:
                return
            instance.queue.discard(request_id)
            instance.promise(request_id, num_blocks)
            instance.add(_only_first(request_id, served), now)

    def _first_token(self, request_id: RequestId, now: float) -> None:
        """The KV waits for the decode instance that is least loaded now."""
        served = self.served[request_id]
        served.token_times_s.append(now)
        if served.finished:
            self._sources.pop(request_id).let_go(request_id)
            return
        instance = _least_loaded(self._decode)
        instance.enqueue(_continued(request_id, served), served)

    def _advance_decode(self, instance: _Instance, now: float) -> None:
        for output in instance.advance(now):
            self.served[output.request_id].token_times_s.append(now)
            instance.num_requests -= output.finish_reason is not None
        for request_id, _ in instance.pipeline.started:
            instance.let_go(request_id)
        instance.pipeline.started.clear()
        self._pull(instance, now)

    def _pull(self, instance: _Instance, now: float) -> None:
        """KV in order, while there is room for it that was not promised."""
        while instance.queue:
            request_id, served = next(iter(instance.queue.items()))
            num_tokens = served.num_prompt_tokens
            num_blocks = instance.num_blocks(num_tokens + 1)
            if num_blocks > instance.pipeline.engine.num_free_blocks - instance.num_promised:
                return
            instance.queue.discard(request_id)
            instance.promise(request_id, num_blocks)
            seconds = self._link.seconds(num_tokens * self._kv_bytes)
            instance.link_free_s = max(now, instance.link_free_s) + seconds
            heappush(self._pulls, (instance.link_free_s, request_id, instance))

    def _land(self, now: float) -> None:
        """KV that is there: the prefill instance forgets it, the decode instance takes it up."""
        while self._pulls and self._pulls[0][0] <= now:
            _, request_id, instance = heappop(self._pulls)
            self._sources.pop(request_id).let_go(request_id)
            instance.add(_continued(request_id, self.served[request_id]), now)


def _least_loaded(instances: Sequence[_Instance]) -> _Instance:
    """The first one with the fewest requests."""
    return min(instances, key=lambda instance: instance.num_requests)


def _check_continues(request: Request, limits: Limits) -> None:
    """Raises CapacityError for a request that could not get all its tokens from an instance."""
    check_fits(request, limits)
    num_tokens = len(request.prompt) + request.params.max_tokens
    if num_tokens > limits.max_model_len:
        raise CapacityError(
            f"a request of {num_tokens} tokens, and the context of a decode instance holds "
            f"{limits.max_model_len}: raise max_model_len"
        )


def _only_first(request_id: RequestId, served: Served) -> Request:
    """What the prefill instance runs."""
    arrival = Arrival(served.arrival_s, served.num_prompt_tokens, 1, served.priority)
    return request_of(request_id, arrival)


def _continued(request_id: RequestId, served: Served) -> Request:
    """What is left to do after the first token, with the prompt's KV imported."""
    params = SamplingParams(max_tokens=served.max_tokens - 1, ignore_eos=True, seed=0)
    return Request(
        id=request_id,
        prompt=(0,) * (served.num_prompt_tokens + 1),
        params=params,
        num_imported=served.num_prompt_tokens,
        priority=served.priority,
    )
