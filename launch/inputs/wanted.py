"""What `pipeserve simulate` is asked for, beside the run itself: limits, pools, searches."""

import re
from dataclasses import dataclass
from math import inf

from pipeserve.errors import ConfigError
from pipeserve.profiling.search.goodput import Slo
from pipeserve.profiling.search.placement import Parallelism

_MOST_GPUS = 4096


@dataclass(frozen=True, slots=True)
class Pool:
    """So many instances of one parallelism."""

    parallelism: Parallelism
    num_instances: int

    @property
    def num_gpus(self) -> int:
        return self.num_instances * self.parallelism.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Prefill and decode apart."""

    prefill: Pool
    decode: Pool

    @property
    def num_gpus(self) -> int:
        return self.prefill.num_gpus + self.decode.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationGoal:
    """One question. Raises ConfigError for flags that do not make one."""

    find_capacity: bool = False
    rate: float | None = None
    slo_tbt_s: float | None = None
    """The run's own, which also steers its policy."""
    slo: Slo | None = None
    pools: Pools | None = None
    nodes: tuple[int, int] | None = None
    """(nodes, GPUs of each) to place pools on."""
    fast_network: bool = False

    def __post_init__(self) -> None:
        if self.find_capacity and self.rate is not None:
            raise ConfigError("--find-capacity looks for the rate; leave --rate out")
        if self.nodes is not None:
            self._check_placement()
        elif self.fast_network:
            raise ConfigError("--fast-network is for --place NODESxGPUS; give both or none")
        elif self.pools is not None:
            if self.slo is None:
                raise ConfigError("pools are measured by --slo-ttft and --slo-tpot; give both")
        elif self.find_capacity and self.slo is not None:
            raise ConfigError(
                "of one pipeline --find-capacity goes by --slo-tbt; leave --slo-ttft and "
                "--slo-tpot out"
            )
        elif self.find_capacity and self.slo_tbt_s is None:
            raise ConfigError("--find-capacity goes by --slo-tbt; give --slo-tbt SECONDS")

    def _check_placement(self) -> None:
        if self.slo is None or self.rate is None:
            raise ConfigError("--place needs --slo-ttft, --slo-tpot and --rate; give all of them")
        if self.rate == inf:
            raise ConfigError("--place is for so many requests a second; --rate is inf")
        if self.pools is not None or self.find_capacity:
            raise ConfigError("--place looks for pools; leave pools and --find-capacity out")


def read_slo(ttft_s: float | None, tpot_s: float | None, share: float | None) -> Slo | None:
    """Both limits or none; a share, by default 90 %, only with them. Raises ConfigError."""
    if (ttft_s is None) != (tpot_s is None):
        raise ConfigError("--slo-ttft and --slo-tpot go together; give both or none")
    if ttft_s is None:
        if share is not None:
            raise ConfigError("--attainment is for --slo-ttft and --slo-tpot; give all or none")
        return None
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s, share=0.9 if share is None else share)


def read_pools(prefill: str | None, decode: str | None) -> Pools | None:
    """Both pools or none. Raises ConfigError."""
    if (prefill is None) != (decode is None):
        raise ConfigError("--prefill-pool and --decode-pool go together; give both or none")
    if prefill is None:
        return None
    return Pools(
        prefill=_read_pool("--prefill-pool", prefill), decode=_read_pool("--decode-pool", decode)
    )


def read_nodes(text: str | None) -> tuple[int, int] | None:
    """ "2x4" as (2, 4). Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--place is {text!r}; give NODESxGPUS, as in 2x4")
    num_nodes, gpus_per_node = int(match[1]), int(match[2])
    _check_gpus("--place", num_nodes * gpus_per_node)
    return num_nodes, gpus_per_node


def _read_pool(flag: str, text: str) -> Pool:
    """ "2x1" is one instance of TP2 x PP1, "2x1*3" are three."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:\*([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(
            f"{flag} is {text!r}; give TPxPP, or TPxPP*N for N instances, as in 2x1*3"
        )
    tp, pp, num_instances = (int(part or 1) for part in match.groups())
    _check_gpus(flag, tp * pp * num_instances)
    return Pool(Parallelism(tp, pp), num_instances)


def _check_gpus(flag: str, num_gpus: int) -> None:
    if num_gpus > _MOST_GPUS:
        raise ConfigError(f"{flag} asks for {num_gpus} GPUs; give at most {_MOST_GPUS}")
