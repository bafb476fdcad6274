"""What an instance, or a pair of them, can serve within an SLO, by simulation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Microbatch
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.profiling.search.capacity import Lengths, poisson_arrivals
from pipeserve.profiling.search.goodput import Slo, find_goodput, meets
from pipeserve.profiling.search.placement import (
    A100_80GB_BYTES,
    BLOCK_SIZE,
    Pair,
    Parallelism,
    kv_capacity,
)
from pipeserve.profiling.simulation.disaggregated import DisaggregatedSimulation, KvLink
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline
from pipeserve.profiling.simulation.stage_times import StageTimes

MAX_NUM_SEQS = 1024


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
