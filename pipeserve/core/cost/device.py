"""A device and the node it sits in, as the cost model knows them. `configs/` reads it from YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import exp, log

from pipeserve.core.cost.kernels import (
    AttentionCost,
    Kernels,
    Points,
    Tables,
    check_points,
    interpolate,
    neighbours,
)
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """From one device to another."""

    alpha_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.alpha_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """Measured seconds at message sizes in bytes, of one group of devices over so many nodes."""

    group: int
    nodes: int
    points: Points

    def __post_init__(self) -> None:
        check_points(f"all_reduce of {self.group}", self.points)
        if min(seconds for _, seconds in self.points) <= 0:
            raise ConfigError(f"all_reduce of {self.group}: its points must take more than 0 s")

    def seconds(self, num_bytes: float) -> float:
        """Log-log between points, the first below them, latency and bandwidth of the last two (a
        straight line) beyond."""
        (least, first_s), (most, _) = self.points[0], self.points[-1]
        if num_bytes <= least:
            return first_s
        if num_bytes >= most:
            return interpolate(self.points, num_bytes)
        (low, low_s), (high, high_s) = neighbours(self.points, num_bytes)
        share = log(num_bytes / low) / log(high / low)
        return low_s * exp(share * log(high_s / low_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RingAllReduce:
    """Of a group that nobody measured: each device sends 2 (n - 1) / n of the message to the next
    one, and more no algorithm can save. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", JPDC 69 (2009)."""

    group: int
    link: Link

    def seconds(self, num_bytes: float) -> float:
        return self.link.seconds(2 * (self.group - 1) / self.group * num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """How far off the profile is, as the standard deviation of log(measured / predicted)."""

    linear: float = 0.0
    """Of one operation, on models that the fit did not see; the next three likewise on held-out
    measurements."""
    attention_prefill: float = 0.0
    attention_decode: float = 0.0
    all_reduce: float = 0.0
    jitter: float = 0.0
    """From one run of the same microbatch to the next."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) > 1:
                raise ConfigError(
                    f"residuals.{item.name} is {getattr(self, item.name)}: give 0 to 1; at 1 a "
                    "prediction is off by a factor of e"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One kind of device in its node. Exactly one of `kernels` and `tables` is given."""

    name: str
    provenance: Mapping[str, str]
    """Where the numbers are from: files, commits, licences, date, fit errors, what is assumed."""
    memory_bytes: int
    devices_per_node: int
    attention: AttentionCost
    intra_node: Link
    inter_node: Link
    kernels: Kernels | None = None
    tables: Tables | None = None
    all_reduce: tuple[AllReduce, ...] = ()
    group_link: Link | None = None
    """Of each device in a tensor-parallel group inside a node: what an all-reduce that was not
    measured goes by."""
    host_s: float = 0.0
    """Of a microbatch on a stage beside the device's own work; 0: device time alone."""
    control_s: float = 0.0
    """One message from the driver to a stage, or back."""
    residuals: Residuals = field(default_factory=Residuals)

    def __post_init__(self) -> None:
        if (self.kernels is None) == (self.tables is None):
            raise ConfigError(
                f"the profile of {self.name} has both kernels and tables, or neither: give one"
            )

    @property
    def linear(self) -> Kernels | Tables:
        """What answers for a layer's linear work, the head and the embedding."""
        if self.kernels is not None:
            return self.kernels
        assert self.tables is not None  # one of both is there
        return self.tables

    def hop_bytes_per_token(self, shape: ModelShape) -> int:
        """Of activations to the next stage. Tables are of our own stages; formulae of GPUs whose
        runtimes hand on what they multiply."""
        if self.tables is not None:
            return shape.link_bytes_per_token
        return shape.hidden_size * shape.bytes_per_value

    def all_reduce_of(self, group: int) -> AllReduce | RingAllReduce:
        """Of a tensor-parallel group, over as few nodes as hold it: as measured, or inside a node
        by `group_link`. Raises ConfigError."""
        nodes = -(-group // self.devices_per_node)
        for found in self.all_reduce:
            if (found.group, found.nodes) == (group, nodes):
                return found
        if nodes == 1 and self.group_link is not None:
            return RingAllReduce(group=group, link=self.group_link)
        measured = ", ".join(f"{a.group} over {a.nodes}" for a in self.all_reduce) or "none"
        raise ConfigError(
            f"tensor_parallel_size is {group}: the profile of {self.name} has no all-reduce of "
            f"{group} devices over {nodes} nodes; measured are {measured}"
        )


def check_profile(
    profile: DeviceProfile,
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    tensor_parallel_size: int | None = None,
) -> None:
    """Raises ConfigError when the profile was made for something else. None: not checked."""
    wanted: dict[str, tuple[object, object]] = {"device": (profile.name, device)}
    if profile.tables is not None:
        tables = profile.tables
        wanted |= {
            "model": (tables.model, model),
            "dtype": (tables.dtype, dtype),
            "threads": (tables.threads, threads),
            "tensor_parallel_size": (tables.tensor_parallel_size, tensor_parallel_size),
        }
    for what, (made_for, asked) in wanted.items():
        if asked is not None and asked != made_for:
            raise ConfigError(
                f"the device profile is for {what} {made_for}, not {asked}: "
                "make one with `pipeserve calibrate`, or name another"
            )
