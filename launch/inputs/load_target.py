"""What `pipeserve bench --url` is asked for: a server, and what is good enough of it."""

from dataclasses import dataclass
from math import inf
from urllib.parse import urlsplit

from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Raises ConfigError for flags that make no measurement."""

    url: str
    """Of the server, with or without /v1."""
    model: str | None = None
    """What the server calls it; None: the first that it lists."""
    api_key: str | None = None
    find_capacity: bool = False
    rate: float | None = None
    slo_ttft_s: float | None = None
    slo_tbt_s: float | None = None
    """Of a request: its 99th percentile."""
    attainment: float = 0.9
    """Share of the requests that must keep both, for a rate to count as served."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"--url {self.url} is no address such as http://127.0.0.1:8000")
        for flag, value in (("--slo-ttft", self.slo_ttft_s), ("--slo-tbt", self.slo_tbt_s)):
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{flag} is {value}, must be over 0 seconds and finite")
        if not 0 < self.attainment <= 1:
            raise ConfigError(f"--attainment is {self.attainment}, must be over 0 and at most 1")
        if self.find_capacity and self.rate is not None:
            raise ConfigError("--find-capacity looks for the rate; leave --rate out")
        if self.find_capacity and self.slo_ttft_s is None and self.slo_tbt_s is None:
            raise ConfigError("--find-capacity goes by --slo-ttft and --slo-tbt; give one or both")

    @property
    def base(self) -> str:
        """The address that /v1/... follows."""
        return self.url.rstrip("/").removesuffix("/v1")
