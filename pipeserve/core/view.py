"""What a policy sees (`View`) and what it answers (`Draft`). Both immutable.

A policy is one file in `core/policies/`: it looks at the view and says which requests run how many
positions in the next microbatch. The engine checks the draft and does the rest: positions, blocks,
token feedback, the prefix cache.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeserve.core.forecast import Forecast
from pipeserve.core.nouns import Microbatch, RequestId, StageCost
from pipeserve.core.order import ORDERS
from pipeserve.core.work import Work
from pipeserve.errors import ConfigError

_MOST_BLOCKS = 1 << 27
"""The engine keeps 33 bytes of each, used or not: 4.4 GB."""


class PolicyError(RuntimeError):
    """A policy drafted what may not be: a bug in the policy, not a mistake of the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine may hand out. Raises ConfigError for a limit below 1, or an unknown order."""

    num_blocks: int
    """KV blocks of a stage; the same ids on every stage."""
    block_size: int
    """Positions in a block."""
    max_num_seqs: int
    """Requests running at a time: admitted, and neither finished nor preempted."""
    max_num_batched_tokens: int
    """Positions in one microbatch, decodes included. A hard limit: stages size buffers by it."""
    max_model_len: int
    """Tokens of one request, prompt and output."""
    enable_prefix_caching: bool = True
    max_tbt_s: float | None = None
    """Longest time between two tokens of a request that is wanted; None: as it comes."""
    order: str = "fcfs"
    """Who goes first: a key of `order.ORDERS`."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_blocks > _MOST_BLOCKS:
            raise ConfigError(
                f"num_blocks is {self.num_blocks}: it must be at most {_MOST_BLOCKS}; give the KV "
                "cache less memory, or a larger block_size"
            )
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}: it must be at least 2, "
                "a prompt token and an output token"
            )
        if self.order not in ORDERS:
            raise ConfigError(f"there is no order {self.order!r}: choose from {', '.join(ORDERS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a policy may use. Published policies keep their published traits."""

    plans_ahead: bool
    """One microbatch beyond the window, and decodes whose token is still on its way."""
    chunk_pipelining: bool
    """A prompt's next chunk may follow while its earlier chunks are still in the pipe."""
    one_in_flight: bool
    """A request is in at most one outstanding microbatch, whatever the other traits allow."""
    whole_prompts: bool = False
    """A prompt, or what a preempted request computes again, runs in one chunk; so a microbatch must
    have room for the longest."""
    reads_cost: bool = False
    """Looks at what the cost model says. Where it does not, a simulation does without one."""
    order: str = "fcfs"
    """Who goes first where the run does not say: a key of `order.ORDERS`."""


class RequestView(Protocol):
    """One request, as far as a policy needs it: the engine's own record, of which a policy reads
    these and writes nothing. Making a copy for each change would double what planning costs."""

    @property
    def id(self) -> RequestId: ...

    @property
    def arrived(self) -> float:
        """The `now` of `Engine.add`."""
        ...

    @property
    def precedence(self) -> float:
        """By the run's order: lower goes first. The same for all where that is fcfs."""
        ...

    @property
    def num_known(self) -> int:
        """Prompt and output tokens whose ids are known."""
        ...

    @property
    def num_longest(self) -> int:
        """Prompt and output tokens that it can reach."""
        ...

    @property
    def num_planned(self) -> int:
        """Positions in the KV cache once everything outstanding has run; also the next to plan."""
        ...

    @property
    def num_unplanned(self) -> int:
        """Of a waiting or prefilling request: known tokens whose KV is not planned yet."""
        ...

    @property
    def num_slots(self) -> int:
        """Positions that its blocks have room for."""
        ...

    @property
    def num_outstanding(self) -> int:
        """Outstanding microbatches that name it. A waiting request is admissible when it is 0."""
        ...

    @property
    def token_from(self) -> int | None:
        """Microbatch that samples the token of its next decode, while that is on its way."""
        ...

    @property
    def last_token_s(self) -> float:
        """The `now` of the completion that brought its newest token."""
        ...


class Prefix(NamedTuple):
    """What is there already of a waiting request: in the prefix cache, or imported."""

    num_tokens: int
    num_blocks: int
    num_idle: int
    """Blocks of these that count as free now and no longer would after the admission."""


class Outstanding(NamedTuple):
    """A microbatch that was planned and has not completed."""

    index: int  # type: ignore[assignment]  # as a field it hides tuple.index
    num_decodes: int
    num_prefill_tokens: int
    cost: StageCost | None
    """None where the engine was given no cost model."""


@dataclass(frozen=True, slots=True)
class View:
    """The engine's state during one `compose`. The mappings are read-only and ordered."""

    limits: Limits
    window: int
    """Microbatches that may be outstanding now, the one planned ahead not counted. Outstanding can
    be more: of those that were planned when it was larger."""
    waiting: Mapping[RequestId, RequestView]
    """In order: who is to be admitted first comes first. Of the same precedence, those that were
    preempted come before the others, and these by arrival."""
    running: Mapping[RequestId, RequestView]
    """Who is to be preempted first comes last: by admission or, where the order is binding, by
    precedence, and of the same by admission."""
    decodes: Mapping[RequestId, RequestView]
    """Running requests that may decode now, the one that waited longest first."""
    prefills: Mapping[RequestId, RequestView]
    """Running requests whose next prefill chunk may be planned now, in order."""
    num_decoding: int
    """Running requests past their prefill with a decode still to plan, plannable now or not."""
    decoding_context: int
    """Positions that these have planned, all together."""
    prefill_backlog: int
    """Known tokens of waiting and prefilling requests that are not planned, cached or not."""
    free_blocks: int
    outstanding: tuple[Outstanding, ...]
    last: Outstanding | None
    """The microbatch planned last, completed or not; None before the first."""
    prefix: Callable[[RequestId], Prefix]
    """What is there already of a waiting request."""
    freed_by: Callable[[Collection[RequestId]], int]
    """Blocks that come free when all of these running requests are preempted."""
    cost: "CostModel | None"
    forecast: Forecast
    """Of the outstanding microbatches; knows nothing without a cost model."""


class Why(NamedTuple):
    """Why a microbatch is no larger, for who asks (`--explain`)."""

    bound: str
    """What the budget came from."""
    budget: float
    """Seconds on the slowest stage; tokens without a cost model."""
    due_s: float
    """When it must have left the last stage, by the host's clock; inf without a limit between
    tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What the next microbatch shall hold. Applied in this order: preempt, admit, chunks."""

    chunks: Mapping[RequestId, int] = field(default_factory=dict)
    """Positions to run of each request, in the microbatch's order; 1 for a decode."""
    admit: Mapping[RequestId, int] = field(default_factory=dict)
    """Waiting requests to start, each with the positions to reserve blocks for (at least its
    chunk); each needs a chunk too."""
    preempt: tuple[RequestId, ...] = ()
    """Running requests whose KV is given up and recomputed later."""
    wait: str = "token"
    """Why there are no chunks: "kv" when a waiting request did not fit, else "token"."""
    why: Why | None = None


class Policy(Protocol):
    """Decides what runs next. Made for one engine: it may remember what it found out, such as how
    large a microbatch is worth its time; of requests and blocks it knows what the view says."""

    name: str
    traits: Traits

    def compose(self, view: View, now: float) -> Draft:
        """The next microbatch; a draft without chunks when nothing should run now."""
        ...


class CostModel(Protocol):
    """Predicts a microbatch's time on each stage, and learns from what stages observe."""

    def predict(self, microbatch: Microbatch) -> StageCost: ...

    def seconds(self, work: Work) -> Sequence[float]:
        """As `predict`, of work that no microbatch holds yet."""
        ...

    def observe(self, index: int, stage: int, seconds: float) -> None:
        """A stage's own compute time; an index that it never predicted, or forgot, is fine."""
        ...

    def observe_head(self, index: int, seconds: float) -> None:
        """Likewise, of a head that the first stage applied (`Microbatch.head_at_first`)."""
        ...
