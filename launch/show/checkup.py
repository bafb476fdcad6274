"""The tables of `pipeserve doctor`."""

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from rich.table import Table

from pipeserve.core.work import Work
from pipeserve.launch.show.plan import held_by

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver
    from pipeserve.profiling.simulation.measured_times import Seam
    from pipeserve.wire.control import Examined


def name_of(work: Work) -> str:
    """A kind of microbatch, in words."""
    if not work.prefills:
        return f"{work.num_decodes} decodes"
    num_prompt = sum(size for _, size in work.prefills)
    return f"{num_prompt} prompt tokens + {work.num_decodes} decodes"


def ranks_table(driver: "Driver", examined: "Sequence[Examined]") -> Table:
    """What runs where, and what it would hold."""
    table = Table(title="ranks; nothing is loaded; GB")
    for name in ("stage", "rank", "host", "cores", "holds"):
        table.add_column(name)
    for name in ("weights", "KV", "free", "fills"):
        table.add_column(name, justify="right")
    num_blocks = driver.limits.num_blocks
    for stage in driver.plan.stages:
        for shard, rank in enumerate(stage.ranks):
            part = f", shard {shard + 1} of {len(stage.ranks)}" if len(stage.ranks) > 1 else ""
            size = driver.sizes[rank]
            least = min(size.memory, key=lambda memory: memory.free_bytes)
            sharing = [
                other for other in driver.sizes if least.key in {each.key for each in other.memory}
            ]
            taken = sum(each.weight_bytes + num_blocks * each.block_bytes for each in sharing)
            table.add_row(
                str(stage.stage),
                str(rank),
                driver.fleet.keepers[rank].host,
                _ranges(examined[rank].facts.cpus),
                held_by(stage) + part,
                _gb(size.weight_bytes),
                _gb(num_blocks * size.block_bytes),
                _gb(least.free_bytes),
                f"{taken / max(least.free_bytes, 1):.0%}",
            )
    return table


def software_lines(examined: "Sequence[Examined]") -> list[str]:
    """What ranks compute with and in, one line for those that are alike."""
    ranks_of: dict[str, list[int]] = {}
    for rank, found in enumerate(examined):
        facts = found.facts
        quota = "no CPU quota" if facts.cpu_limit == inf else f"{facts.cpu_limit:g} CPUs by quota"
        line = (
            f"python {facts.python}, torch {facts.torch}, pipeserve {facts.pipeserve}, "
            f"{facts.kernels}, {facts.num_threads} thread{'s' * (facts.num_threads > 1)} a stage; "
            f"{quota}, {facts.open_files:,} open files, {_gb(facts.shared_bytes)} GB in /dev/shm"
        )
        ranks_of.setdefault(line, []).append(rank)
    return [f"ranks {_ranges(ranks)}: {line}" for line, ranks in ranks_of.items()]


def seams_table(
    driver: "Driver",
    seams: "Sequence[Seam]",
    clocks: Sequence[tuple[float, float]],
    feedback_s: float,
    num_tokens: int,
) -> Table:
    """What lies between stages."""
    table = Table(title="links, measured between these stages")
    table.add_column("from → to")
    for name in ("hosts", "latency", "bandwidth", f"of {num_tokens} tokens"):
        table.add_column(name, justify="right")
    hosts = [driver.fleet.keepers[stage.ranks[0]].host for stage in driver.plan.stages]
    num_bytes = num_tokens * driver.shape.link_bytes_per_token
    for number, seam in enumerate(seams):
        here, there = hosts[number], hosts[number + 1]
        table.add_row(
            f"stage {number} → {number + 1}",
            here if here == there else f"{here}, {there}",
            _latency(driver, number, number + 1, seam.latency_s, clocks),
            "fast" if seam.bytes_per_s == inf else f"{seam.bytes_per_s / 1e9:.2f} GB/s",
            f"{seam.seconds(num_bytes) * 1e3:.2f} ms",
        )
    last = len(hosts) - 1
    if last:
        latency = _latency(driver, last, 0, feedback_s, clocks)
        table.add_row(f"stage {last} → 0, tokens", "", latency, "", "")
    return table


def _latency(
    driver: "Driver",
    sender: int,
    receiver: int,
    latency_s: float,
    clocks: Sequence[tuple[float, float]],
) -> str:
    """Known as well as the two clocks are; exactly, by one."""
    keepers = [driver.fleet.keepers[driver.plan.stages[s].ranks[0]] for s in (sender, receiver)]
    is_one = keepers[0].boot_id == keepers[1].boot_id
    within_s = 0.0 if is_one else clocks[sender][1] + clocks[receiver][1]
    error = f" ± {within_s * 1e3:.2f}" if within_s else ""
    return f"{latency_s * 1e3:.2f}{error} ms"


def times_table(
    works: Sequence[Work],
    work_s: Sequence[Sequence[float]],
    shared_s: Sequence[Sequence[tuple[float, float]]],
    busy: Sequence[float],
) -> Table:
    """What stages would take for a microbatch, and how long they would be idle. `shared_s`: in that
    time, what the ranks of each stage add up, and wait for each other, where several share it."""
    table = Table(title="predicted, a microbatch")
    table.add_column("stage", justify="right")
    for work, shared in zip(works, shared_s, strict=True):
        table.add_column(name_of(work), justify="right")
        if shared:
            table.add_column("of it sums", justify="right")
            table.add_column("ranks wait", justify="right")
    table.add_column("idle", justify="right")
    for stage, share in enumerate(busy):
        took: list[float] = []
        for seconds, shared in zip(work_s, shared_s, strict=True):
            took += [seconds[stage], *(shared[stage] if shared else ())]
        table.add_row(str(stage), *(f"{each * 1e3:,.1f} ms" for each in took), f"{1 - share:.0%}")
    return table


def clock_lines(clocks: Sequence[tuple[float, float]]) -> list[str]:
    """How far those of other machines are off the driver's."""
    return [
        f"the clock of stage {stage} is {ahead_s * 1e3:+.3f} ms off the driver's, known to within "
        f"{within_s * 1e3:.3f} ms"
        for stage, (ahead_s, within_s) in enumerate(clocks)
        if within_s
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3,6" """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
