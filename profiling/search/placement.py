"""How many instances of which parallelism: DistServe's placement search (OSDI'24, section 4).

Algorithm 1, for nodes with a fast network between them, looks for the best prefill instance and the
best decode instance apart; algorithm 2, for nodes without one, cuts both into the same number of
segments, one to a node, so that KV only moves inside a node, and looks for the best pair. Both keep
what serves the most requests a second per GPU, and replicate it to the rate that is asked for. How
much a candidate serves is the caller's to say: `Service` simulates it.

As in the published code, a tensor-parallel size divides the heads and a number of stages divides
the layers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, TypeVar

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.profiling.search.capacity import Lengths, poisson_arrivals
from pipeserve.profiling.search.goodput import Slo, find_goodput, meets
from pipeserve.profiling.simulation.disaggregated import DisaggregatedSimulation, KvLink
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline
from pipeserve.profiling.simulation.stage_times import StageTimes

BLOCK_SIZE = 16
MAX_NUM_SEQS = 1024
A100_80GB_BYTES = 79.0e9
"""Of one GPU, for weights and KV. Fitted to DistServe's measured KV capacities of OPT-13B, 66B and
175B (`max_num_tokens.csv`): within 3 % of the nine rows that a test holds."""


Candidate = TypeVar("Candidate")


class Parallelism(NamedTuple):
    """Of one instance: GPUs to a stage, and stages."""

    tp: int
    pp: int

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp


class Pair(NamedTuple):
    """A prefill and a decode instance that share their nodes."""

    prefill: Parallelism
    decode: Parallelism

    @property
    def num_gpus(self) -> int:
        return self.prefill.num_gpus + self.decode.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    num_nodes: int
    gpus_per_node: int
    bytes_per_gpu: float = A100_80GB_BYTES
    """For weights and KV."""

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.gpus_per_node) < 1 or not self.bytes_per_gpu > 0:
            raise ConfigError(
                f"a cluster of {self.num_nodes} nodes of {self.gpus_per_node} GPUs of "
                f"{self.bytes_per_gpu} bytes: all must be over 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What to run. `rate_per_gpu` is what its instances could serve, requests a second."""

    prefill: Parallelism
    decode: Parallelism
    num_prefill: int
    num_decode: int
    rate_per_gpu: float

    @property
    def num_gpus(self) -> int:
        return self.num_prefill * self.prefill.num_gpus + self.num_decode * self.decode.num_gpus


PerGpu = Callable[[Any, float], float]
"""(candidate, beat) -> requests a second and GPU that it serves; 0 where that is under `beat`."""


def kv_capacity(shape: ModelShape, parallelism: Parallelism, bytes_per_gpu: float) -> int:
    """Tokens whose KV an instance holds beside its weights; not over 0 where they do not fit."""
    free = parallelism.num_gpus * bytes_per_gpu - shape.num_parameters * shape.bytes_per_value
    return int(free // shape.kv_bytes_per_token)


def instances(shape: ModelShape, cluster: Cluster) -> list[Parallelism]:
    """Algorithm 1's candidates: tensor parallel inside a node, stages anywhere, smallest first."""
    most_gpus = cluster.num_nodes * cluster.gpus_per_node
    found = [
        Parallelism(tp, pp)
        for tp in _divisors(shape.num_heads, cluster.gpus_per_node)
        for pp in _divisors(shape.num_layers, most_gpus // tp)
    ]
    fits = [p for p in found if kv_capacity(shape, p, cluster.bytes_per_gpu) >= BLOCK_SIZE]
    return sorted(fits, key=lambda p: (p.num_gpus, p))


def pairs(shape: ModelShape, cluster: Cluster) -> list[Pair]:
    """Algorithm 2's candidates, smallest first: each node of a pair holds one segment of its
    prefill and one of its decode instance."""
    found = set()
    candidates = instances(shape, cluster)
    for num_segments in range(1, cluster.num_nodes + 1):
        cut = [p for p in candidates if p.pp % num_segments == 0]
        found |= {
            Pair(prefill, decode)
            for prefill in cut
            for decode in cut
            if prefill.num_gpus + decode.num_gpus <= num_segments * cluster.gpus_per_node
        }
    return sorted(found, key=lambda pair: (pair.num_gpus, pair))


def place_apart(
    candidates: Sequence[Parallelism], prefill: PerGpu, decode: PerGpu, rate: float
) -> Placement | None:
    """Algorithm 1, to serve `rate` requests a second; None where no candidate serves any."""
    best_prefill, best_decode = _best(candidates, prefill), _best(candidates, decode)
    if best_prefill is None or best_decode is None:
        return None
    (p, p_rate), (d, d_rate) = best_prefill, best_decode
    return Placement(
        prefill=p,
        decode=d,
        num_prefill=_replicas(rate, p_rate * p.num_gpus),
        num_decode=_replicas(rate, d_rate * d.num_gpus),
        rate_per_gpu=1 / (1 / p_rate + 1 / d_rate),
    )


def place_together(candidates: Sequence[Pair], pair: PerGpu, rate: float) -> Placement | None:
    """Algorithm 2, to serve `rate` requests a second; None where no candidate serves any."""
    best = _best(candidates, pair)
    if best is None:
        return None
    (prefill, decode), per_gpu = best
    num_pairs = _replicas(rate, per_gpu * best[0].num_gpus)
    return Placement(
        prefill=prefill,
        decode=decode,
        num_prefill=num_pairs,
        num_decode=num_pairs,
        rate_per_gpu=per_gpu,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is served and how well, and so what a candidate is worth, by simulation."""

    shape: ModelShape
    lengths: Lengths
    """(prompt tokens, output tokens) to draw requests from."""
    priorities: Sequence[int] = ()
    """Parallel to `lengths`; empty: all 0."""
    order: str = "fcfs"
    """Of every instance: a key of `order.ORDERS`."""
    slo: Slo
    times: Callable[[Parallelism], StageTimes]
    bytes_per_gpu: float = A100_80GB_BYTES
    kv_tokens: Callable[[Parallelism], int] | None = None
    """Tokens whose KV an instance holds; by default `kv_capacity`, the published formula."""
    link: KvLink | None = None
    num_requests: int = 300
    """Counted in a trial, after a ramp of a third as many."""
    highest_per_gpu: float = 5.0
    resolution: float = 0.25
    """Requests a second and GPU, as in DistServe's search."""
    widen: bool = False
    """Whether a candidate may serve more than `highest_per_gpu`."""
    seed: int = 0
    prefill_policy: str = "vllm"
    """Whole prompts, packed first come first served."""
    decode_policy: str = "token_throttle"
    """Decodes evenly over the microbatches in flight, as DistServe's decode batches are."""
    prefill_batch_tokens: int = 8192
    """DistServe's evaluation's."""
    decode_batch_tokens: int = 2048

    def prefill_per_gpu(self, parallelism: Parallelism, beat: float = 0.0) -> float:
        """Algorithm 1's simu_prefill: time to first token alone."""
        only_first = [(prompt, 1) for prompt, _ in self.lengths]
        return self._per_gpu(
            parallelism.num_gpus,
            lambda arrivals: self.simulation([self.prefill(parallelism)], [], arrivals),
            only_first,
            beat,
        )

    def decode_per_gpu(self, parallelism: Parallelism, beat: float = 0.0) -> float:
        """Algorithm 1's simu_decode: time per output token alone, KV being there at once."""
        return self._per_gpu(
            parallelism.num_gpus,
            lambda arrivals: self.simulation(
                [self._instant()], [self.decode(parallelism)], arrivals
            ),
            self.lengths,
            beat,
        )

    def pair_per_gpu(self, pair: Pair, beat: float = 0.0) -> float:
        """Algorithm 2's simulation of both together."""
        return self._per_gpu(
            pair.num_gpus,
            lambda arrivals: self.simulation(
                [self.prefill(pair.prefill)], [self.decode(pair.decode)], arrivals
            ),
            self.lengths,
            beat,
        )

    def simulation(
        self,
        prefill: Sequence[SimulatedPipeline],
        decode: Sequence[SimulatedPipeline],
        arrivals: Iterable[Arrival],
    ) -> DisaggregatedSimulation:
        """Of any number of instances."""
        return DisaggregatedSimulation(
            prefill,
            decode,
            arrivals,
            link=self.link,
            kv_bytes_per_token=self.shape.kv_bytes_per_token,
        )

    def prefill(self, parallelism: Parallelism) -> SimulatedPipeline:
        """A prefill instance."""
        return self._instance(parallelism, self.prefill_policy, self.prefill_batch_tokens)

    def decode(self, parallelism: Parallelism) -> SimulatedPipeline:
        """A decode instance."""
        return self._instance(parallelism, self.decode_policy, self.decode_batch_tokens)

    def _instance(
        self, parallelism: Parallelism, policy: str, batch_tokens: int
    ) -> SimulatedPipeline:
        if self.kv_tokens is not None:
            capacity = self.kv_tokens(parallelism)
        else:
            capacity = kv_capacity(self.shape, parallelism, self.bytes_per_gpu)
        times = self.times(parallelism)
        return self._pipeline(policy, parallelism.pp, times, capacity, batch_tokens)

    def _instant(self) -> SimulatedPipeline:
        """A prefill instance that takes no time and has room for all."""
        capacity = self.num_requests * self._longest
        return self._pipeline(self.prefill_policy, 1, _NoTimes(), capacity, capacity)

    @property
    def _longest(self) -> int:
        return max(prompt + output for prompt, output in self.lengths)

    def _pipeline(
        self, policy: str, num_stages: int, times: StageTimes, capacity: int, batch_tokens: int
    ) -> SimulatedPipeline:
        plan = split_layers(self.shape.num_layers, num_stages)
        limits = Limits(
            num_blocks=capacity // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=max(batch_tokens, self._longest),
            max_model_len=self._longest,
            enable_prefix_caching=False,
            order=self.order,
        )
        return SimulatedPipeline(Engine(plan, get_policy(policy), limits), times)

    def _per_gpu(
        self,
        num_gpus: int,
        simulate: Callable[[Iterable[Arrival]], DisaggregatedSimulation],
        lengths: Lengths,
        beat: float,
    ) -> float:
        def is_met(per_gpu: float) -> bool:
            rate = per_gpu * num_gpus
            simulation = simulate(poisson_arrivals(lengths, rate, self.seed, self.priorities))
            return meets(simulation, self.slo, self.num_requests // 3, self.num_requests, rate)

        try:
            return find_goodput(
                is_met, self.highest_per_gpu, self.resolution, beat, widen=self.widen
            )
        except (CapacityError, ConfigError):
            return 0.0  # no room for the longest request, or no all-reduce of that size known


class _NoTimes(StageTimes):
    """One stage that takes no time."""

    control_s = 0.0

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        return (0.0,)

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return ()


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


def _best(candidates: Sequence[Candidate], per_gpu: PerGpu) -> tuple[Candidate, float] | None:
    """The candidate that serves the most per GPU, the first of equals; None where none serves."""
    best, most = None, 0.0
    for candidate in candidates:
        rate = per_gpu(candidate, most)
        if rate > most:
            best, most = candidate, rate
    return None if best is None else (best, most)


def _replicas(rate: float, of_one: float) -> int:
    return max(1, ceil(rate / of_one - 1e-9))
