"""What a process of a launched job is told by hand: flags of `serve`, `generate` and `bench`."""

from dataclasses import dataclass, field

from pipeserve.errors import ConfigError
from pipeserve.launch.job.place import OWN_PORT, Place


def _option(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Beside `RunConfig.nnodes`. Raises ConfigError for what cannot be right together."""

    node_rank: int | None = _option(
        None, "Number of this machine among --nnodes, from 0, which runs the driver."
    )
    master_addr: str | None = _option(
        None, "Name or address of machine 0, where no launcher says it."
    )
    master_port: int | None = _option(
        None, f"Port of machine 0 that keepers join at \\[default: {OWN_PORT}]"
    )
    headless: bool = _option(
        False, "Keepers alone, without driver or server, as on every machine but 0."
    )
    interface: str | None = _option(
        None,
        "Network interface, or address, of this machine that others reach it by; by default that "
        "of the route to machine 0.",
    )
    log_dir: str | None = _option(
        None, "Folder that keeps what each rank says on stderr, in a file of its own."
    )

    def place_by_hand(self, nnodes: int) -> Place | None:
        """Of one process a machine. None: its flags were not given."""
        if nnodes == 1:
            if self.node_rank or self.headless:
                raise ConfigError("--node-rank and --headless are for several machines: --nnodes")
            return None
        if self.node_rank is None:
            raise ConfigError(f"--nnodes {nnodes}: give --node-rank, 0 to {nnodes - 1}")
        if not 0 <= self.node_rank < nnodes:
            raise ConfigError(f"--node-rank {self.node_rank}, must be 0 to {nnodes - 1}")
        if self.headless and self.node_rank == 0:
            raise ConfigError("--headless is for other machines: --node-rank 0 runs the driver")
        if self.master_addr is None:
            raise ConfigError(f"--nnodes {nnodes}: give --master-addr, machine 0's name or address")
        port = OWN_PORT if self.master_port is None else self.master_port
        if not 0 < port < 65536:
            raise ConfigError(f"--master-port {port}, must be 1 to 65535")
        return Place("--nnodes", self.node_rank, nnodes, 0, 1, self.master_addr, port)
