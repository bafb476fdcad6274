"""Which stage gets which layers, where the user left that to us: known when the ranks are there and
have said what memory they have, and before any of them reads a weight.
"""

from collections.abc import Sequence
from dataclasses import replace

from pipeserve.core.cost.cut import Room, StageParts, best_cut, stage_seconds
from pipeserve.core.cost.partition import head_shares, plan_of, split_by_time
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.work import PartSeconds
from pipeserve.driver.setup import OtherCut, Setup
from pipeserve.errors import ConfigError
from pipeserve.wire.control import Examined, StageSized

EXAMINE_S = 2.0
_WORTH_SAYING = 1.1
"""Times as much KV that another cut would have to hold."""


def place(setup: Setup, sizes: Sequence[StageSized], examined: Sequence[Examined]) -> Setup:
    """The run with its layers where `setup.choice` has them. `sizes`, `examined`: of one rank of
    each stage; the latter are empty where there was nothing to time. Where no cut fits the memory,
    how much lacks is found when the KV pool is sized."""
    choice = setup.choice
    by, parts = choice.by, choice.parts
    if choice.works:
        by, parts = choice.of_times(examined)
    sizing = _Sizing(setup, choice.sizes or sizes)
    counts = counts_of(sizing.fitting(parts))
    placed = setup if counts == counts_of(setup.plan) else choice.with_layers(counts)
    other = _with_more_kv(sizing, parts, counts)
    return replace(placed, layers_by=by, choice=None, other_cut=other)


def counts_of(plan: PipelinePlan) -> tuple[int, ...]:
    return tuple(stage.num_layers for stage in plan.stages)


def parts_of_times(
    times: Sequence[PartSeconds], shares_head: bool = False
) -> tuple[StageParts, ...]:
    """Of each stage, from what a rank of it takes. `shares_head`: the first one has half of the
    last one's heads, and takes as long for them."""
    head_s, shares = times[-1].head, head_shares(len(times), shares_head)
    return tuple(
        StageParts(found.layers, found.host + found.embedding * (stage == 0) + head_s * share)
        for stage, (found, share) in enumerate(zip(times, shares, strict=True))
    )


class _Sizing:
    """What a cut takes of the ranks' memory."""

    def __init__(self, setup: Setup, sizes: Sequence[StageSized]) -> None:
        self._choice, self._config, self._sizes = setup.choice, setup.config, sizes
        self._have_head = [stage.has_head for stage in setup.plan.stages]
        held = zip(sizes, setup.plan.stages, strict=True)
        by_layer = [
            size.block_bytes // stage.num_layers for size, stage in held if stage.num_layers
        ]
        self._block_bytes = max(by_layer, default=0)  # of one layer
        rooms: dict[str, tuple[int, list[int]]] = {}
        for stage, size in enumerate(sizes):
            for memory in size.memory:
                free, stages = rooms.get(memory.key, (memory.free_bytes, []))
                rooms[memory.key] = min(free, memory.free_bytes), [*stages, stage]
        self._rooms = [Room(free, tuple(stages)) for free, stages in rooms.values()]

    def fitting(self, parts: Sequence[StageParts]) -> PipelinePlan:
        """The fastest cut in which one request of the longest fits, or a block at least."""
        config = self._config
        longest = -(-self._choice.max_model_len // config.block_size)
        for num_blocks in (config.num_gpu_blocks_override or longest, 1):
            counts = best_cut(self._with_bytes(parts, num_blocks), self._rooms)
            if counts is not None:
                return plan_of(counts)
        return split_by_time(parts)

    def kv_tokens(self, counts: tuple[int, ...]) -> int:
        """Positions that the pools would hold; 0 where the cut does not fit."""
        sizes, first = [], 0
        parts = [StageParts(()) for _ in counts]
        for size, part, count in zip(self._sizes, self._with_bytes(parts, 0), counts, strict=True):
            weights = part.other_bytes + sum(part.layer_bytes[first : first + count])
            sizes.append(StageSized(weights, count * self._block_bytes, size.memory))
            first += count
        try:
            limits = self._choice.with_layers(counts).limits_for(sizes)
        except ConfigError:
            return 0
        return limits.num_blocks * limits.block_size

    def _with_bytes(self, parts: Sequence[StageParts], num_blocks: int) -> list[StageParts]:
        kv_bytes = num_blocks * self._block_bytes
        told = self._sizes[0]
        layers = tuple(weights + kv_bytes for weights in told.layer_bytes)
        embedding, head = told.end_bytes
        return [
            replace(
                part,
                layer_bytes=layers,
                other_bytes=embedding * (stage == 0) + head * has_head,
            )
            for stage, (part, has_head) in enumerate(zip(parts, self._have_head, strict=True))
        ]


def _with_more_kv(
    sizing: _Sizing, parts: Sequence[StageParts], counts: tuple[int, ...]
) -> OtherCut | None:
    """What the fastest cut gives up: that of even layers, where it would hold more."""
    even = counts_of(split_by_time([StageParts((1.0,) * sum(counts))] * len(counts)))
    if even == counts:
        return None
    kv_tokens = sizing.kv_tokens(even)
    if kv_tokens < _WORTH_SAYING * sizing.kv_tokens(counts):
        return None
    slower = max(stage_seconds(parts, even)) / max(stage_seconds(parts, counts))
    return OtherCut(even, slower, kv_tokens)
