"""Predicts the seconds of a microbatch on each stage, and learns from what stages observe. Pure.

A microbatch's time depends on a few counts of it (`Work`); a device profile says what they cost in
one layer, and the plan how many layers a stage has. docs/cost-model.md has the formulae, where the
numbers are from, and how far off they are.
"""

from itertools import pairwise
from math import exp, isfinite, log, sqrt
from typing import NamedTuple

from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.kernels import TILE
from pipeserve.core.cost.rough import ROUGH
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import Microbatch, PipelinePlan, StageCost
from pipeserve.core.work import Work, work_of

_REMEMBERED = 1024
"""Predictions kept until they are observed: more than are ever outstanding."""

_FURTHEST = 1e6
"""Times as long as predicted, or as short: what is further off says nothing of the stage, and is
taken as that far."""
_WEIGHT = 0.1
"""Of the latest observation."""
_USUAL, _UNKNOWN = 0.2, 20.0
"""Scales of the errors before anything was observed: of a profile, and of a guess."""
_BOUND = 2.0
"""Scales of the errors; what lies further out is moved there."""
_RHO = 2.52
"""Makes the mean of the biweight function 1 for normal errors."""
_LEAST_SCALE = 0.01
"""Or a change after a long calm would never be believed."""


class Terms(NamedTuple):
    """The seconds of a microbatch on one stage, by what they are spent on."""

    linear: float
    """Matrix products and elementwise work of the layers."""
    attention_prefill: float
    attention_decode: float
    all_reduce: float
    head: float
    embedding: float
    host: float


class PipelineCost:
    """view.CostModel for one pipeline of a model on a device. One host calls it.

    Raises ConfigError for a profile of another model, or without the all-reduce that it takes.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        shape: ModelShape,
        plan: PipelinePlan,
        tensor_parallel_size: int = 1,
    ):
        """`ROUGH` as the profile: how long each stage takes is not known before it is observed."""
        check_profile(profile, model=shape.name, tensor_parallel_size=tensor_parallel_size)
        self.profile = profile
        self._shard = shape.shard(tensor_parallel_size)
        self._size = tensor_parallel_size
        self._plan = plan
        self._stages = tuple(
            (float(stage.num_layers), float(stage.has_head), float(stage.has_embedding))
            for stage in plan.stages
        )
        self._crossings = crossings(profile, len(plan.stages), tensor_parallel_size)
        self._flat: dict[int, tuple[float, float, float]] = {}
        self._heads: dict[int, float] = {0: 0.0}
        self._predicted: dict[int, tuple[int, list[float]]] = {}  # size class, uncorrected seconds
        self._kinds = tuple(dict.fromkeys(self._stages))
        self._kind_of = tuple(map(self._kinds.index, self._stages))
        scale, self._weight = (_UNKNOWN, 1.0) if profile is ROUGH else (_USUAL, _WEIGHT)
        self._by_stage = [Correction(0.0, scale, self._weight) for _ in plan.stages]
        self._factors = [1.0] * len(plan.stages)  # what these levels come to
        self._by_size: dict[int, Correction] = {}
        self._typical = 0.0  # level of sizes in use: what one that was never seen starts from
        self._flat_of(1)  # a missing all-reduce is found here, not in a run

    def predict(self, microbatch: Microbatch) -> StageCost:
        """Seconds on each stage, corrected by what was observed so far."""
        work = work_of(microbatch)
        raw = self._raw(work)
        self._predicted[microbatch.index] = _size_class(work.num_tokens), raw
        if len(self._predicted) > _REMEMBERED:
            del self._predicted[next(iter(self._predicted))]
        return StageCost(self._corrected(work.num_tokens, raw))

    def seconds(self, work: Work) -> tuple[float, ...]:
        """As `predict`, of work that no microbatch holds yet; not remembered."""
        return self._corrected(work.num_tokens, self._raw(work))

    def observe(self, index: int, stage: int, seconds: float) -> None:
        """Corrects later predictions. What was never predicted, is observed twice or came too late
        is ignored; so is a time that is not positive and finite.

        A prediction is off by a factor of the stage (a slow device) times one of the microbatch's
        tiles (the kernels that the library picks for that size), on all stages alike. Each is the
        level of what the other leaves over: backfitting (Hastie and Tibshirani, "Generalized
        Additive Models", 1986), one observation at a time. A number of tiles that was never seen
        gets the usual one's.
        """
        size_class, raw = self._predicted.get(index, (0, []))
        if not (0 <= stage < len(raw) and raw[stage] > 0 and seconds > 0 and isfinite(seconds)):
            return
        times = seconds / raw[stage]
        ratio, raw[stage] = log(min(max(times, 1 / _FURTHEST), _FURTHEST)), 0.0
        if not any(raw):  # the last stage to report
            del self._predicted[index]
        by_stage = self._by_stage[stage]
        by_size = self._by_size.get(size_class)
        if by_size is None:
            by_size = self._by_size[size_class] = Correction(self._typical, _USUAL, self._weight)
        by_stage.update(ratio - by_size.level)
        self._factors[stage] = exp(by_stage.level)
        by_size.update(ratio - by_stage.level)
        self._typical += _WEIGHT * (by_size.level - self._typical)

    def terms(self, work: Work) -> tuple[Terms, ...]:
        """What `seconds` is the sum of, stage by stage."""
        linear, all_reduce, embedding = self._flat_of(work.num_tokens)
        prefill, decode = self._attention(work)
        head, host = self._head_of(work.num_logits), self.profile.host_s
        factors = self._corrected(work.num_tokens, [1.0] * len(self._stages))
        return tuple(
            Terms(
                factor * layers * linear,
                factor * layers * prefill,
                factor * layers * decode,
                factor * layers * all_reduce,
                factor * has_head * head,
                factor * has_embedding * embedding,
                factor * host,
            )
            for factor, (layers, has_head, has_embedding) in zip(factors, self._stages, strict=True)
        )

    def hop_seconds(self, num_tokens: int) -> tuple[float, ...]:
        """Activations of a microbatch over each of the P - 1 seams."""
        return hop_seconds(self.profile, self._shard, self._crossings, num_tokens)

    def _raw(self, work: Work) -> list[float]:
        linear, all_reduce, embedding = self._flat_of(work.num_tokens)
        layer = linear + all_reduce + sum(self._attention(work))
        head, host = self._head_of(work.num_logits), self.profile.host_s
        by_kind = [
            layers * layer + has_head * head + has_embedding * embedding + host
            for layers, has_head, has_embedding in self._kinds
        ]
        return [by_kind[kind] for kind in self._kind_of]

    def _corrected(self, num_tokens: int, raw: list[float]) -> tuple[float, ...]:
        by_size = self._by_size.get(_size_class(num_tokens))
        factor = exp(by_size.level if by_size else self._typical)
        pairs = zip(raw, self._factors, strict=True)
        return tuple([seconds * (factor * of_stage) for seconds, of_stage in pairs])

    def _flat_of(self, num_tokens: int) -> tuple[float, float, float]:
        """What follows from the number of tokens alone: linear and all-reduce seconds of a layer,
        and the embedding's. Kept: there are only so many numbers of tokens in a microbatch."""
        found = self._flat.get(num_tokens)
        if found is None:
            shard, linear = self._shard, self.profile.linear
            found = self._flat[num_tokens] = (
                linear.layer_s(shard, num_tokens),
                all_reduce_s(self.profile, shard, self._size, num_tokens),
                linear.embedding_s(shard, num_tokens),
            )
        return found

    def _head_of(self, num_logits: int) -> float:
        found = self._heads.get(num_logits)
        if found is None:
            found = self.profile.linear.head_s(self._shard, num_logits)
            self._heads[num_logits] = found
        return found

    def _attention(self, work: Work) -> tuple[float, float]:
        """Seconds of a layer's attention: prefills, decodes."""
        attention, shard = self.profile.attention, self._shard
        prefill = sum([attention.prefill_s(shard, *chunk) for chunk in work.prefills])
        return prefill, attention.decode_s(shard, work.num_decodes, work.context)


class Correction:
    """The level of a noisy series, whatever a few outliers say.

    Exponential smoothing with cleaned observations: what lies further from the level than two of
    the errors' own scale is moved there. Source: Gelper, Fried and Croux, "Robust forecasting with
    exponential and Holt-Winters smoothing", Journal of Forecasting 29 (2010).
    """

    __slots__ = ("_weight", "level", "scale")

    def __init__(self, level: float = 0.0, scale: float = _USUAL, weight: float = _WEIGHT) -> None:
        """`scale`: of log(observed / predicted) before anything was observed; `weight`: of the
        first observation. At 1 the level is the mean of the first ones, whatever it was before."""
        self.level, self.scale, self._weight = level, scale, weight

    def update(self, value: float) -> None:
        """Runs for every microbatch on every stage, hence spelt out."""
        error = value - self.level
        share = error / (_BOUND * self.scale)
        inside = 1 - share * share
        rho = _RHO * (1 - inside * inside * inside) if inside > 0 else _RHO
        scale = self.scale * sqrt(1 - _WEIGHT + _WEIGHT * rho)
        self.scale = scale = scale if scale > _LEAST_SCALE else _LEAST_SCALE
        bound = _BOUND * scale
        if error > bound:
            error = bound
        elif error < -bound:
            error = -bound
        self.level += self._weight * error
        if self._weight > _WEIGHT:
            self._weight = max(_WEIGHT, self._weight / (1 + self._weight))


def _size_class(num_tokens: int) -> int:
    """Tiles of rows, up to 64; below one tile, octaves."""
    if num_tokens <= TILE // 2:
        return -num_tokens.bit_length()
    return min(-(-num_tokens // TILE), 64)


def all_reduce_s(
    profile: DeviceProfile, shape: ModelShape, tensor_parallel_size: int, num_tokens: int
) -> float:
    """Of one layer."""
    if tensor_parallel_size == 1:
        return 0.0
    num_bytes = num_tokens * shape.hidden_size * shape.bytes_per_value
    return shape.sums_per_layer * profile.all_reduce_of(tensor_parallel_size).seconds(num_bytes)


def crossings(profile: DeviceProfile, num_stages: int, tensor_parallel_size: int) -> list[bool]:
    """For each seam, whether it leads to another node; stages fill node after node."""
    nodes = [s * tensor_parallel_size // profile.devices_per_node for s in range(num_stages)]
    return [here != there for here, there in pairwise(nodes)]


def hop_seconds(
    profile: DeviceProfile, shape: ModelShape, crossings: list[bool], num_tokens: int
) -> tuple[float, ...]:
    """Activations of `num_tokens` over each seam."""
    num_bytes = num_tokens * shape.hidden_size * shape.bytes_per_value
    inside, between = profile.intra_node.seconds(num_bytes), profile.inter_node.seconds(num_bytes)
    return tuple([between if crosses else inside for crosses in crossings])
