"""Which ranks compute which stage: the one place that knows.

A rank is one keeper and the process that it starts. A stage has one rank, or one for each shard of
its layers. Whatever goes to one process (a job, a connection, a heartbeat, a clock) goes by rank;
whatever is of the pipeline (layers, spans, predictions) goes by stage.
"""

from dataclasses import dataclass

from pipeserve.core.nouns import PipelinePlan


def ranks_of(stage: int, width: int) -> tuple[int, ...]:
    """Those of a stage that `width` ranks share, in the order of their shards: side by side, as
    Megatron-LM's `parallel_state` numbers them, so that they come to lie on one machine."""
    return tuple(range(stage * width, (stage + 1) * width))


@dataclass(frozen=True, slots=True)
class Topology:
    """Every rank from 0 on, each in one place. Raises ValueError otherwise, and when stages have
    different numbers of ranks, whose links would end nowhere."""

    ranks: tuple[tuple[int, ...], ...]
    """Of each stage, in the order of their shards."""

    def __post_init__(self) -> None:
        placed = sorted(rank for ranks in self.ranks for rank in ranks)
        if not placed or placed != list(range(len(placed))):
            raise ValueError(f"ranks {placed} of a pipeline are not 0, 1, 2 and so on")
        if len({len(ranks) for ranks in self.ranks}) > 1:
            raise ValueError(f"stages have different numbers of ranks: {self.ranks}")

    @classmethod
    def of(cls, plan: PipelinePlan) -> "Topology":
        """As `plan` has it."""
        return cls(tuple(stage.ranks for stage in plan.stages))

    @classmethod
    def in_order(cls, num_stages: int, width: int = 1) -> "Topology":
        """Stage after stage, `width` ranks each."""
        ranks = range(num_stages * width)
        return cls(tuple(tuple(ranks[at : at + width]) for at in ranks[::width]))

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.width

    def stage_of(self, rank: int) -> int:
        return self._place_of(rank)[0]

    def shard_of(self, rank: int) -> int:
        """Its place among the ranks of its stage."""
        return self._place_of(rank)[1]

    @property
    def width(self) -> int:
        """Ranks of each stage."""
        return len(self.ranks[0])

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """All ranks of its stage, itself among them."""
        return self.ranks[self.stage_of(rank)]

    def speaker(self, stage: int) -> int:
        """The rank of a stage that reports to the driver what the stage did, by its own clock."""
        return self.ranks[stage][0]

    @property
    def speakers(self) -> list[int]:
        """That of each stage."""
        return [ranks[0] for ranks in self.ranks]

    def speaks(self, rank: int) -> bool:
        """Whether it is the one of its stage that does."""
        return rank == self.speaker(self.stage_of(rank))

    def next_of(self, rank: int) -> int | None:
        """The rank of the next stage that it sends activations to; None on the last stage."""
        stage, shard = self._place_of(rank)
        return self.ranks[stage + 1][shard] if stage + 1 < self.num_stages else None

    def other_end_of(self, rank: int) -> int | None:
        """At the other end of the pipeline, the rank that it sends to what it samples; None between
        the ends."""
        stage, shard = self._place_of(rank)
        if self.num_stages == 1 or 0 < stage < self.num_stages - 1:
            return None
        return self.ranks[self.num_stages - 1 - stage][shard]

    def name(self, rank: int) -> str:
        """What a user knows it as."""
        stage = self.stage_of(rank)
        return f"stage {stage}" if len(self.ranks[stage]) == 1 else f"rank {rank} of stage {stage}"

    def __str__(self) -> str:
        each = f" of {self.width} ranks each" if self.width > 1 else ""
        return f"{self.num_stages} stage{'s' * (self.num_stages > 1)}{each}"

    def _place_of(self, rank: int) -> tuple[int, int]:
        """Its stage, and its shard there."""
        for stage, ranks in enumerate(self.ranks):
            if rank in ranks:
                return stage, ranks.index(rank)
        raise ValueError(f"there is no rank {rank}")
