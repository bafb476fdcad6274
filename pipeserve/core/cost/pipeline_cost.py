"""Predicts the seconds of a microbatch on each stage, and learns from what stages observe. Pure.

A microbatch's time depends on a few counts of it (`Work`); a device profile says what they cost in
one layer, and the plan how many layers a stage has. docs/cost-model.md has the formulae, where the
numbers are from, and how far off they are.
"""

from functools import partial
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

from pipeserve.core.cost.device import DeviceProfile, check_profile
from pipeserve.core.cost.rough import is_rough
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.cost.stage_terms import StageTerms
from pipeserve.core.cost.token_curve import TokenCurve
from pipeserve.core.nouns import Microbatch, PipelinePlan, StageCost
from pipeserve.core.work import Work, work_of

_REMEMBERED = 1024
"""Predictions kept until they are observed: more than are ever outstanding."""


class Breakdown(NamedTuple):
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
        """With a rough `profile` (rough.py) nobody knows how long a stage takes before it is
        observed."""
        check_profile(profile, model=shape.name, tensor_parallel_size=tensor_parallel_size)
        self.profile = profile
        self._shard = shape.shard(tensor_parallel_size)
        self._size = tensor_parallel_size
        self._plan = plan
        self._stages = plan.stages
        self._with_head = [s.stage for s in plan.stages if s.has_head]
        self._with_embedding = [s.stage for s in plan.stages if s.has_embedding]
        self._crossings = crossings(profile, len(plan.stages), tensor_parallel_size)
        self._flat: dict[int, tuple[float, float, float]] = {}
        self._heads: dict[int, float] = {0: 0.0}
        self._predicted: dict[int, _Predicted] = {}
        self._tokens = TokenCurve(self._linear_s)  # a missing all-reduce is found here
        self._learnt = [self._first(float(stage.num_layers)) for stage in plan.stages]
        self._rates = [learnt.rates for learnt in self._learnt]

    def predict(self, microbatch: Microbatch) -> StageCost:
        """Seconds on each stage, corrected by what was observed so far."""
        work = work_of(microbatch)
        parts = self._parts(work)
        waits = [True] * (len(self._stages) + microbatch.head_at_first)
        self._predicted[microbatch.index] = _Predicted(work.num_tokens, parts, waits)
        if len(self._predicted) > _REMEMBERED:
            del self._predicted[next(iter(self._predicted))]
        return StageCost(self._seconds(work.num_tokens, parts))

    def seconds(self, work: Work) -> tuple[float, ...]:
        """As `predict`, of work that no microbatch holds yet; not remembered."""
        return self._seconds(work.num_tokens, self._parts(work))

    def observe(self, index: int, stage: int, seconds: float) -> None:
        """Corrects later predictions. What was never predicted, is observed twice or came too late
        is ignored; so is a time that is not positive and finite.

        A stage's terms explain what they can, and the number of tokens, which is the same on all
        stages, what they leave over: backfitting (Hastie and Tibshirani, "Generalized Additive
        Models", 1986), one observation at a time.
        """
        found = self._awaited(index, stage, seconds)
        if found is None:
            return
        terms, learnt = self._terms_of(stage, found), self._learnt[stage]
        _, of_even, of_steps, *_ = learnt.rates
        share = (of_even * terms[1] + of_steps * terms[2]) / seconds
        left = learnt.update(terms, seconds)
        self._rates[stage] = learnt.rates
        if left:
            self._tokens.learn(found.num_tokens, share * left)

    def observe_head(self, index: int, seconds: float) -> None:
        """Likewise, of a head that the first stage applied."""
        found = self._awaited(index, len(self._stages), seconds)
        if found is not None:
            self._learnt[0].update((*[0.0] * 6, found.parts.head), seconds)
            self._rates[0] = self._learnt[0].rates

    def _awaited(self, index: int, place: int, seconds: float) -> "_Predicted | None":
        """What was predicted of it, if this observation was still to come."""
        found = self._predicted.get(index)
        if found is None or not (0 <= place < len(found.waits) and found.waits[place]):
            return None
        if not (seconds > 0 and isfinite(seconds)):
            return None
        found.waits[place] = False
        if not any(found.waits):
            del self._predicted[index]
        return found

    def breakdown(self, work: Work) -> tuple[Breakdown, ...]:
        """What `seconds` is the sum of, stage by stage."""
        linear, all_reduce, embedding = self._flat_of(work.num_tokens)
        alone = linear / (linear + all_reduce or 1.0)
        own, prefix, context, head, _ = self._parts(work)
        even, stepped = self._tokens.of(work.num_tokens)
        found = []
        for stage, rates in zip(self._stages, self._rates, strict=True):
            weights, of_even, of_steps, of_own, of_prefix, of_context, of_ends = rates
            host = weights * self.profile.host_s / (self._weights_s(stage.num_layers) or 1.0)
            flat = weights - host + of_even * even + of_steps * stepped
            found.append(
                Breakdown(
                    alone * flat,
                    of_own * own + of_prefix * prefix,
                    of_context * context,
                    (1 - alone) * flat,
                    stage.has_head * of_ends * head / len(self._with_head),
                    stage.has_embedding * of_ends * embedding,
                    host,
                )
            )
        return tuple(found)

    def hop_seconds(self, num_tokens: int) -> tuple[float, ...]:
        """Activations of a microbatch over each of the P - 1 seams."""
        return hop_seconds(self.profile, self._shard, self._crossings, num_tokens)

    def _parts(self, work: Work) -> "_Parts":
        """What the profile has for it beside what depends on the number of tokens alone."""
        attention, shard = self.profile.attention, self._shard
        own = prefix = 0.0
        for start, tokens in work.prefills:
            alone = attention.prefill_s(shard, 0, tokens)
            own += alone
            if start:
                prefix += attention.prefill_s(shard, start, tokens) - alone
        context = attention.decode_s(shard, work.num_decodes, work.context)
        embedding = self._flat_of(work.num_tokens)[2]
        return _new_parts((own, prefix, context, self._head_of(work.num_logits), embedding))

    def _seconds(self, num_tokens: int, parts: "_Parts") -> tuple[float, ...]:
        """Of each stage; asked many times for each microbatch that is planned."""
        own, prefix, context, head, embedding = parts
        even, stepped = self._tokens.of(num_tokens)
        rates = self._rates
        seconds = [
            weights + a * even + b * stepped + c * own + d * prefix + e * context
            for weights, a, b, c, d, e, _ in rates
        ]
        for stage in self._with_head:  # where both ends have it, half of all
            seconds[stage] += rates[stage][-1] * head / len(self._with_head)
        for stage in self._with_embedding:
            seconds[stage] += rates[stage][-1] * embedding
        return tuple(seconds)

    def _terms_of(self, stage: int, found: "_Predicted") -> tuple[float, ...]:
        """What the stage's rates are multiplied with."""
        own, prefix, context, head, embedding = found.parts
        even, stepped = self._tokens.of(found.num_tokens)
        plan = self._stages[stage]
        num_stages = len(self._stages)
        has_head = plan.has_head and stage == num_stages - 1 and len(found.waits) == num_stages
        ends = has_head * head + plan.has_embedding * embedding
        return (1.0, even, stepped, own, prefix, context, ends)

    def _first(self, num_layers: float) -> StageTerms:
        """The rates of a stage before anything was observed: what is always the same (the weights
        are read, the host works), tokens as if they cost evenly (a profile has the steps), tokens
        by steps, chunks, their prefixes, the contexts of decodes; and once, not in each layer, head
        and embedding."""
        weights_s = self._weights_s(num_layers)
        others = (num_layers, num_layers, num_layers, num_layers, 1.0)
        rates, sizes = (weights_s, 0.0, *others), (weights_s, num_layers, *others)
        return StageTerms(rates, sizes, is_guess=is_rough(self.profile))

    def _weights_s(self, num_layers: float) -> float:
        return num_layers * self._tokens.weights_s + self.profile.host_s

    def _linear_s(self, num_tokens: int) -> float:
        linear, all_reduce, _ = self._flat_of(num_tokens)
        return linear + all_reduce

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


class _Parts(NamedTuple):
    """Seconds of a microbatch by the profile: in a layer, but for the last two."""

    own: float
    """Chunks, as if nothing were before them."""
    prefix: float
    """What they read before them."""
    context: float
    """Decodes."""
    head: float
    embedding: float


# What NamedTuple's own constructor does, without a Python call each time.
_new_parts = partial(tuple.__new__, _Parts)


class _Predicted(NamedTuple):
    num_tokens: int
    parts: _Parts
    waits: list[bool]
    """For each stage, whether it has not been observed; and for the head, where the first stage
    has it apart."""


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
    num_bytes = num_tokens * profile.hop_bytes_per_token(shape)
    inside, between = profile.intra_node.seconds(num_bytes), profile.inter_node.seconds(num_bytes)
    return tuple([between if crosses else inside for crosses in crossings])
