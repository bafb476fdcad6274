"""What runs where, before anything is loaded."""

from typing import TYPE_CHECKING

from pipeserve.core.nouns import StagePlan

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver


def plan_lines(driver: "Driver") -> list[str]:
    """Of a driver whose stages have said what they will take. The first line names how the layers
    were placed."""
    limits, setup = driver.limits, driver.setup
    kv_tokens = limits.num_blocks * limits.block_size
    lines = [
        f"plan: {driver.shape.num_layers} layers over {len(driver.plan.stages)} "
        f"stage{'s' * (len(driver.plan.stages) > 1)}, {setup.layers_by}; room for the KV of "
        f"{kv_tokens:,} tokens"
    ]
    lines += [f"  {_stage_line(driver, stage)}" for stage in driver.plan.stages]
    other = setup.other_cut
    if other is not None:
        lines.append(
            f"  with --pipeline-layers {','.join(map(str, other.layers))} there would be room for "
            f"{other.kv_tokens:,} tokens, and the slowest stage would take "
            f"{other.slower:.2f} times as long"
        )
    return lines


def held_by(stage: StagePlan) -> str:
    """Its layers, and what else it holds."""
    layers = "no layer"
    if stage.num_layers:
        layers = f"layers {stage.first_layer} to {stage.stop_layer - 1}"
    if stage.num_layers == 1:
        layers = f"layer {stage.first_layer}"
    ends = [("embedding", stage.has_embedding), ("head", stage.has_head)]
    return " + ".join([layers, *[name for name, is_here in ends if is_here]])


def _stage_line(driver: "Driver", stage: StagePlan) -> str:
    """Of ranks that share it, the one that takes most."""
    ranks = ", ".join(map(str, stage.ranks))
    hosts = ", ".join(dict.fromkeys(driver.fleet.keepers[rank].host for rank in stage.ranks))
    is_shared = len(stage.ranks) > 1
    where = f"stage {stage.stage}: rank{'s' * is_shared} {ranks} on {hosts}"
    held = f"{where}: {held_by(stage)}"
    sizes = [driver.sizes[rank] for rank in stage.ranks]
    if not all(size.memory for size in sizes):
        return held
    weights = max(size.weight_bytes for size in sizes)
    kv_bytes = driver.limits.num_blocks * max(size.block_bytes for size in sizes)
    free = min(memory.free_bytes for size in sizes for memory in size.memory)
    each = " each" if is_shared else ""
    return f"{held}; {_gb(weights)} GB + KV {_gb(kv_bytes)} GB{each}, {_gb(free)} GB free there"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
