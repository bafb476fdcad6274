"""What a driver runs: a model cut into stages, its limits, and what each stage's process is told.

Made of a checkpoint (`checkpoint.py`), or of a recipe alone where stages are emulated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.shape import ModelShape
from pipeserve.core.view import CostModel, Limits

if TYPE_CHECKING:
    from pipeserve.stages.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Of one driver; all that it needs to know of the model."""

    kind: str
    """"real" or "emulated"."""
    config: RunConfig
    shape: ModelShape
    dtype: str
    plan: PipelinePlan
    limits: Limits
    cost: CostModel | None
    """What the policy predicts with; it learns, so it is for one engine."""
    module: str
    """The program of every stage, run as `python -m`."""
    works: tuple[bytes, ...]
    """What each stage's program is told that it is to compute."""
    model_folder: Path | None = None
    model_config: "ModelConfig | None" = None
    """These two of a checkpoint alone."""
