"""What a driver knows of its stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from pipeserve.core.nouns import PipelinePlan
from pipeserve.wire.control import KeeperHello, Memory, StageReady, StageSized


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """Where one stage runs and what it holds. Memory in bytes, of all its ranks; the rest is of the
    one that speaks for it."""

    stage: int
    rank: int
    host: str
    boot_id: str
    """Of the machine: there may be two of one name."""
    pid: int
    cpus: tuple[int, ...]
    num_threads: int
    num_layers: int
    weight_bytes: int
    kv_bytes: int
    baseline_bytes: int
    """The interpreter with torch, before the model."""
    peak_bytes: int | None = None
    """The most that was resident at once; None until `Driver.refresh_memory`."""


def stage_infos(
    plan: PipelinePlan, keepers: Mapping[int, KeeperHello], started: Sequence[StageReady]
) -> tuple[StageInfo, ...]:
    """Of each stage, from what the stage of each rank says of itself."""
    infos = []
    for stage in plan.stages:
        rank, parts = stage.ranks[0], [started[each] for each in stage.ranks]
        infos.append(
            StageInfo(
                stage=stage.stage,
                rank=rank,
                host=keepers[rank].host,
                boot_id=keepers[rank].boot_id,
                pid=started[rank].pid,
                cpus=tuple(started[rank].cpus),
                num_threads=started[rank].num_threads,
                num_layers=stage.num_layers,
                weight_bytes=sum(part.weight_bytes for part in parts),
                kv_bytes=sum(part.kv_bytes for part in parts),
                baseline_bytes=sum(part.baseline_bytes for part in parts),
            )
        )
    return tuple(infos)


def one_of_each_stage(plan: PipelinePlan, sizes: Sequence[StageSized]) -> tuple[StageSized, ...]:
    """Of the rank that speaks for it, whose share of a memory is that of all its ranks there."""
    found = []
    for stage in plan.stages:
        keys = [memory.key for rank in stage.ranks for memory in sizes[rank].memory]
        own = sizes[stage.ranks[0]]
        memory = [
            each._replace(free_bytes=each.free_bytes // keys.count(each.key)) for each in own.memory
        ]
        found.append(msgspec.structs.replace(own, memory=tuple(memory)))
    return tuple(found)


def with_memory(
    infos: Sequence[StageInfo], plan: PipelinePlan, memory: Sequence[Memory]
) -> tuple[StageInfo, ...]:
    """The same, with what each rank has used at most so far."""
    return tuple(
        replace(info, peak_bytes=sum(memory[rank].peak_bytes for rank in stage.ranks))
        for info, stage in zip(infos, plan.stages, strict=True)
    )
