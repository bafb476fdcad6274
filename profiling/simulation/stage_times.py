"""What a simulated stage takes: the simulator's ground truth, which no policy holds.

The formulae of the device profile, op by op, each op times a factor that was drawn from the fit's
own residuals: e.g. a matrix product is 7 % slower than predicted at 3 tiles of rows and 4 % faster
at 4. The factors are constant, so that a cost model that observes can learn what they amount to,
and cannot know it beforehand. Each execution then has a small jitter of its own. All of it follows
from the seed.
"""

import random
from collections.abc import Sequence
from math import exp
from typing import Protocol

from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.kernels import TILE
from pipeserve.core.cost.pipeline_cost import all_reduce_s, crossings, hop_seconds
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import Microbatch, PipelinePlan
from pipeserve.core.work import PartSeconds, Work, work_of

_JITTERS = 8191  # prime, so that microbatches times stages do not soon repeat


class StageTimes(Protocol):
    """How long things take: the truth of a simulation, which no policy may look into."""

    control_s: float
    """From the driver to a stage, or from the last stage to the driver."""
    feedback_s: float | None = None
    """From the last stage to stage 0, of the sampled tokens, or of the rows whose head that is to
    apply; None: as `control_s`."""
    planning_s: float = 0.0
    """Of one plan. The driver makes one at a time and does nothing else meanwhile."""

    latency_s: Sequence[float] = ()
    """For each seam, what of `hop_s` does not occupy the link: the next activations may be sent
    meanwhile. Empty: none."""

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        """Seconds of each stage's own compute, in stage order; the head in the last one's, unless
        the first one has it, which is apart."""
        ...

    def head_s(self, microbatch: Microbatch) -> float:
        """The vocabulary head and the sampling: what of the last stage's seconds they are, or what
        the first one takes for them."""
        return 0.0

    def all_reduce_s(self, microbatch: Microbatch) -> Sequence[float]:
        """What of each stage's seconds its ranks take to add up what each has computed. Empty:
        nothing, where stages have one rank."""
        return ()

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        """Seconds that the activations take over each of the P - 1 seams."""
        ...


class ProfiledTimes(StageTimes):
    """Seconds of microbatches on the stages of one pipeline and on the links between them.

    Raises ConfigError as `core.cost.PipelineCost` does.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        shape: ModelShape,
        plan: PipelinePlan,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        slowdown: Sequence[float] | None = None,
    ):
        """`slowdown`: for each stage, how many times as long as the profile's device it takes."""
        check_profile(profile, model=shape.name, tensor_parallel_size=tensor_parallel_size)
        self.control_s = self.feedback_s = profile.control_s
        self._profile = profile
        self._shard = shape.shard(tensor_parallel_size)
        self._size = tensor_parallel_size
        self._seed = seed
        last = plan.stages[-1]
        stages = [(s.num_layers, s is last and s.has_head, s.has_embedding) for s in plan.stages]
        self._shares_head = plan.shares_head
        self._slowdown = tuple(slowdown or (1.0,) * len(stages))
        self._num_layers = [stage.num_layers for stage in plan.stages]
        self._kinds = list(dict.fromkeys(stages))
        self._kind_of = [self._kinds.index(stage) for stage in stages]
        self._crossings = crossings(profile, len(stages), tensor_parallel_size)
        self.latency_s = [
            (profile.inter_node if crosses else profile.intra_node).alpha_s
            for crosses in self._crossings
        ]
        self._flat: dict[int, tuple[float, float]] = {}
        self._all_reduces: dict[int, float] = {}
        self._heads: dict[int, float] = {0: 0.0}
        self._factors: dict[tuple[str, int, int], float] = {}
        self._hops: dict[int, tuple[float, ...]] = {}
        self._last: tuple[Microbatch | None, Work] = None, Work(0, 0, (), 0, 0)
        draw = random.Random(f"{seed} jitter").gauss
        self._jitters = [exp(draw(0.0, profile.residuals.jitter)) for _ in range(_JITTERS)]
        self._flat_of(1)  # a missing all-reduce is found here, not in a run

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        """Of one execution on each stage; the same microbatch has the same times."""
        layer, embedding, head, host = self._parts(self._work_of(microbatch))
        if self._shares_head and microbatch.head_at_first:
            head = 0.0
        by_kind = [
            layers * layer + has_head * head + has_embedding * embedding + host
            for layers, has_head, has_embedding in self._kinds
        ]
        jitters, first = self._jitters, microbatch.index * len(self._kind_of)
        return [
            by_kind[kind] * self._slowdown[stage] * jitters[(first + stage) % _JITTERS]
            for stage, kind in enumerate(self._kind_of)
        ]

    def head_s(self, microbatch: Microbatch) -> float:
        """Jitter and all."""
        num_stages, stage = len(self._kind_of), len(self._kind_of) - 1
        if self._shares_head and microbatch.head_at_first:
            stage = 0
        jitter = self._jitters[(microbatch.index * num_stages + stage) % _JITTERS]
        head_s = self._head_s(self._work_of(microbatch).num_logits)
        return head_s * self._slowdown[stage] * jitter

    def all_reduce_s(self, microbatch: Microbatch) -> Sequence[float]:
        """Of each stage's, jitter and all."""
        if self._size == 1:
            return ()
        layer = self._all_reduce_of(self._work_of(microbatch).num_tokens)
        first = microbatch.index * len(self._kind_of)
        return [
            num * layer * self._slowdown[stage] * self._jitters[(first + stage) % _JITTERS]
            for stage, num in enumerate(self._num_layers)
        ]

    def parts(self, work: Work, stage: int) -> PartSeconds:
        """On that stage's device, jitter left out; of one layer, for all are alike."""
        factor = self._slowdown[stage]
        layer, *others = self._parts(work)
        others.append(self._all_reduce_of(work.num_tokens))
        return PartSeconds((factor * layer,), *(factor * seconds for seconds in others))

    def _parts(self, work: Work) -> tuple[float, float, float, float]:
        """Of a layer, the embedding, the head, and the host."""
        layer, embedding = self._flat_of(work.num_tokens)
        layer += self._attention_s(work)
        return layer, embedding, self._head_s(work.num_logits), self._profile.host_s

    def hop_s(self, microbatch: Microbatch) -> tuple[float, ...]:
        """Of the activations over each of the P - 1 seams."""
        num_tokens = self._work_of(microbatch).num_tokens
        found = self._hops.get(num_tokens)
        if found is None:
            found = hop_seconds(self._profile, self._shard, self._crossings, num_tokens)
            self._hops[num_tokens] = found
        return found

    def _work_of(self, microbatch: Microbatch) -> Work:
        """Of the last one asked for it is known: a host asks for its times and its hops."""
        if microbatch is not self._last[0]:
            self._last = microbatch, work_of(microbatch)
        return self._last[1]

    def _flat_of(self, num_tokens: int) -> tuple[float, float]:
        """What follows from the number of tokens: seconds of a layer without attention, and of the
        embedding."""
        found = self._flat.get(num_tokens)
        if found is None:
            profile, shard, tiles = self._profile, self._shard, -(-num_tokens // TILE)
            residuals = profile.residuals
            layer = sum(
                seconds * self._factor(op, residuals.linear, tiles)
                for op, seconds in profile.linear.layer_ops(shard, num_tokens)
            )
            layer += self._all_reduce_of(num_tokens)
            embedding = profile.linear.embedding_s(shard, num_tokens)
            found = layer, embedding * self._factor("embedding", residuals.linear, tiles)
            self._flat[num_tokens] = found
        return found

    def _all_reduce_of(self, num_tokens: int) -> float:
        """Seconds of one layer."""
        found = self._all_reduces.get(num_tokens)
        if found is None:
            profile, octave = self._profile, num_tokens.bit_length()
            found = all_reduce_s(profile, self._shard, self._size, num_tokens)
            found *= self._factor("all_reduce", profile.residuals.all_reduce, octave)
            self._all_reduces[num_tokens] = found
        return found

    def _head_s(self, num_logits: int) -> float:
        found = self._heads.get(num_logits)
        if found is None:
            found = self._profile.linear.head_s(self._shard, num_logits)
            found *= self._factor("head", self._profile.residuals.linear, -(-num_logits // TILE))
            self._heads[num_logits] = found
        return found

    def _attention_s(self, work: Work) -> float:
        """Of one layer; factors by octaves of the positions before a chunk, of decodes and of
        their mean context."""
        attention, residuals = self._profile.attention, self._profile.residuals
        shard, total = self._shard, 0.0
        for start, tokens in work.prefills:
            factor = self._factor(
                "prefill", residuals.attention_prefill, start.bit_length(), tokens.bit_length()
            )
            total += factor * attention.prefill_s(shard, start, tokens)
        decodes = work.num_decodes
        if decodes:
            mean = work.context // decodes
            factor = self._factor(
                "decode", residuals.attention_decode, decodes.bit_length(), mean.bit_length()
            )
            total += factor * attention.decode_s(shard, decodes, work.context)
        return total

    def _factor(self, op: str, deviation: float, bucket: int, second: int = 0) -> float:
        """Drawn once for an op and a bucket, and the same for the same seed in any order."""
        key = (op, bucket, second)
        found = self._factors.get(key)
        if found is None:
            drawn = random.Random(f"{self._seed} {op} {bucket} {second}").gauss(0.0, deviation)
            found = self._factors[key] = exp(drawn)
        return found
