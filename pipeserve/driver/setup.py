"""What a driver runs: a model cut into stages, its limits, and what each stage's process gets.

Made of a checkpoint (`checkpoint.py`), or of a recipe alone where stages are emulated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.view import CostModel, Limits

if TYPE_CHECKING:
    from pipeserve.stages.config.model_config import ModelConfig
    from pipeserve.wire.control import KeeperHello, StageSized


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Of one driver; all that it needs to know of the model."""

    kind: str
    """"real" or "emulated"."""
    config: RunConfig
    shape: ModelShape
    dtype: str
    """Of weights, products, KV and what links carry."""
    plan: PipelinePlan
    limits_for: "Callable[[Sequence[StageSized]], Limits]"
    """Within which the engine plans, by what each rank says that it takes. Raises ConfigError when
    that does not fit where it is."""
    cost: CostModel | None
    """What the policy predicts with; it learns, so it is for one engine."""
    module: str
    """The program of every stage, run as `python -m`."""
    works: tuple[bytes, ...]
    """For each stage's program, what it is to compute."""
    model_folder: Path | None = None
    model_config: "ModelConfig | None" = None
    dtype_why: str = ""
    """Where the user left the dtype to us."""
    dtype_warning: str = ""
    native_dtypes: tuple[tuple[str, ...], ...] = ()
    """Of each rank, by which the dtype was chosen."""
    for_ranks: "Callable[[Sequence[KeeperHello]], Setup] | None" = None
    """The same for the ranks that have joined, which may multiply other types natively.

    These and the two before are of a checkpoint alone."""
