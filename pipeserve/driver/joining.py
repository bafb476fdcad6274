"""Which keepers belong to a pipeline, and what is said of those who do not come."""

from collections.abc import Mapping

from pipeserve.addresses import split_address
from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.errors import ConfigError, StageError
from pipeserve.wire.control import KeeperHello
from pipeserve.wire.listener import is_loopback
from pipeserve.wire.strangers import TurnedAway


def why_not(hello: KeeperHello, topology: Topology, joined: Mapping[int, KeeperHello]) -> str:
    """Why this keeper does not belong to the pipeline. Empty: it is one of ours."""
    who = f"keeper of rank {hello.rank} on {hello.host}"
    if hello.world_size != topology.num_ranks:
        return (
            f"{who} is one of {hello.world_size}, and the pipeline has {topology}; make "
            "--pipeline-parallel-size times --tensor-parallel-size equal to the number of keepers"
        )
    if not 0 <= hello.rank < topology.num_ranks:
        return f"{who}: there are ranks 0 to {topology.num_ranks - 1}"
    if hello.rank in joined:
        first = joined[hello.rank]
        return f"{who}: that rank has joined already, from {first.host} (pid {first.pid})"
    return ""


def nobody_came(
    missing: list[int],
    topology: Topology,
    keepers: Mapping[int, KeeperHello],
    config: RunConfig,
    address: str,
    turned_away: TurnedAway,
) -> StageError:
    """For the keepers of `missing` ranks, that were waited for in vain; `keepers` are those that
    have come."""
    others = ""
    if turned_away.counts:
        total, last = turned_away.counts.total(), turned_away.last
        others = f"; {total:,} were turned away, the last: {last}"
    if keepers:
        hosts = ", ".join(sorted({keeper.host for keeper in keepers.values()}))
        others += f"; {len(keepers)} came, from {hosts}"
    return StageError(
        f"no keeper of rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        f"{_machines_of(missing, topology, config)} joined {address} within "
        f"{config.join_timeout:g} s{others}; see what their command says, whose keepers look for "
        f"{address} (with --launcher external: torchrun -m pipeserve.launch.keeper --control "
        f"{address}), or raise --join-timeout"
    )


def _machines_of(ranks: list[int], topology: Topology, config: RunConfig) -> str:
    """From where they should have come, where that is known."""
    if config.nnodes == 1 or topology.num_ranks % config.nnodes:
        return ""
    each = topology.num_ranks // config.nnodes
    machines = sorted({rank // each for rank in ranks})
    named = ", ".join(map(str, machines))
    return f" (of machine{'s' * (len(machines) > 1)} {named} of 0 to {config.nnodes - 1})"


def check_addresses(keepers: Mapping[int, KeeperHello], control: str) -> None:
    """Stages of several machines find each other by the addresses of their keepers. Raises
    ConfigError for one that others cannot reach."""
    if len({keeper.boot_id for keeper in keepers.values()}) < 2:
        return
    for rank, keeper in keepers.items():
        if is_loopback(keeper.address):
            raise ConfigError(
                f"the keeper of rank {rank} on {keeper.host} joined at {keeper.address}, "
                "where the stages of other machines cannot reach its stage; start it with "
                f"--control ADDRESS:{split_address(control)[1]}, an address of the "
                "driver's machine in the network of the others"
            )
