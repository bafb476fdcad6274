"""Which keepers belong to a pipeline, and what is said of those who do not come."""

from collections.abc import Mapping

from pipeserve.configs.addresses import split_address
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
            "--pipeline-parallel-size equal to the number of keepers"
        )
    if not 0 <= hello.rank < topology.num_ranks:
        return f"{who}: there are ranks 0 to {topology.num_ranks - 1}"
    if hello.rank in joined:
        first = joined[hello.rank]
        return f"{who}: that rank has joined already, from {first.host} (pid {first.pid})"
    return ""


def nobody_came(
    ranks: list[int], address: str, join_s: float, turned_away: TurnedAway
) -> StageError:
    """For keepers that were waited for in vain."""
    others = ""
    if turned_away.counts:
        total, last = turned_away.counts.total(), turned_away.last
        others = f" ({total:,} were turned away, the last: {last})"
    return StageError(
        f"no keeper of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} joined {address} "
        f"within {join_s:g} s{others}; start them with torchrun -m pipeserve.launch.keeper "
        f"--control {address}, or raise --join-timeout"
    )


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
