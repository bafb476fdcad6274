"""How many instances of which parallelism: DistServe's placement search (OSDI'24, section 4).

Algorithm 1, for nodes with a fast network between them, looks for the best prefill instance and the
best decode instance apart; algorithm 2, for nodes without one, cuts both into the same number of
segments, one to a node, so that KV only moves inside a node, and looks for the best pair. Both keep
what serves the most requests a second per GPU, and replicate it to the rate that is asked for. How
much a candidate serves is the caller's to say: `Service` (service.py) simulates it.

As in the published code, a tensor-parallel size divides the heads and a number of stages divides
the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, TypeVar

from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError

BLOCK_SIZE = 16
A100_80GB_BYTES = 79.0e9
"""Of one GPU, for weights and KV. Fitted to DistServe's measured KV capacities of OPT-13B, 66B and
175B (`max_num_tokens.csv`): within 3 % of the nine rows that a test holds."""


Placed = TypeVar("Placed")


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


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]


def _best(candidates: Sequence[Placed], per_gpu: PerGpu) -> tuple[Placed, float] | None:
    """The candidate that serves the most per GPU, the first of equals; None where none serves."""
    best, most = None, 0.0
    for candidate in candidates:
        rate = per_gpu(candidate, most)
        if rate > most:
            best, most = candidate, rate
    return None if best is None else (best, most)


def _replicas(rate: float, of_one: float) -> int:
    return max(1, ceil(rate / of_one - 1e-9))
