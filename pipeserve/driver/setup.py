"""What a driver runs: a model cut into stages, its limits, and what each stage's process gets.

Made of a checkpoint (`checkpoint.py`), or of a recipe alone where stages are emulated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeserve.configs import RunConfig
from pipeserve.core.cost.cut import StageParts
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.view import CostModel, Limits
from pipeserve.core.work import Work

if TYPE_CHECKING:
    from pipeserve.stages.config.model_config import ModelConfig
    from pipeserve.wire.control import Examined, KeeperHello, StageSized


class OtherCut(NamedTuple):
    """A cut that was not taken, and what it would change."""

    layers: tuple[int, ...]
    slower: float
    """Its slowest stage takes so many times as long."""
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """What the layers are placed by (`layer_choice.py`), where the user did not list them."""

    by: str
    """In words, for "layers by ..."."""
    parts: tuple[StageParts, ...]
    """Of each stage: seconds, or what is proportional to them."""
    max_model_len: int
    with_layers: "Callable[[tuple[int, ...]], Setup]"
    """The same run with so many layers on each stage."""
    works: tuple[Work, ...] = ()
    """Microbatches that the ranks are to time first; none where `parts` hold."""
    of_times: "Callable[[Sequence[Examined]], tuple[str, tuple[StageParts, ...]]] | None" = None
    """`by` and `parts` of what the ranks, one a stage, found then."""
    sizes: "tuple[StageSized, ...] | None" = None
    """What the stages' devices have and would take, where the stages themselves take nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Of one driver; all that it needs to know of the model."""

    kind: str
    """"real" or "emulated"."""
    config: RunConfig
    shape: ModelShape
    dtype: str
    """Of weights, products and KV. Links carry float32, as layers add up in."""
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
    devices: tuple[str, ...] = ()
    """Of each rank (`KeeperHello.device`); empty where they are not known before they join."""
    layers_by: str = "as listed"
    """How the layers were placed, or will be."""
    choice: LayerChoice | None = None
    """What is to place them, once the ranks have said what they have; None: they are placed."""
    other_cut: OtherCut | None = None
    """With more KV, where there is one."""
    for_ranks: "Callable[[Sequence[KeeperHello]], Setup] | None" = None
    """The same for the ranks that have joined, which may multiply other types natively.

    That, the two dtype texts, and which types are native are of a checkpoint alone."""
