"""How a run cuts its model into stages, and the limits within which its engine plans: one way for
stages that compute, that only wait, and that are simulated.
"""

from collections.abc import Callable, Sequence

from pipeserve.configs import RunConfig
from pipeserve.configs.layer_lists import AUTO
from pipeserve.core.cost.cut import StageParts
from pipeserve.core.cost.partition import plan_pipeline, usual_work, with_ranks
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import check_suits
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Limits
from pipeserve.core.work import Work

_MOST_TIMED = 512
"""Tokens of a microbatch that stands for all: with more, a stage's parts stand to each other as
there."""


def lay_out(
    config: RunConfig,
    shape: ModelShape,
    *,
    max_model_len: int,
    enable_prefix_caching: bool,
    parts: Sequence[StageParts] | None = None,
    ranks_per_stage: int = 1,
    shares_head: bool = False,
) -> tuple[PipelinePlan, Callable[[int], Limits]]:
    """The cut, and the limits with so many KV blocks: how many, follows from the stages' memory.

    Layers that the user did not list go by `parts`, what each stage takes for a usual microbatch;
    by default by operations and bytes. `shares_head`: both ends of the pipeline have the head.

    Raises ConfigError for a cut that the model does not allow, and for limits that the policy
    cannot work within.
    """
    policy, num_tokens = get_policy(config.policy), most_tokens(config, max_model_len)
    plan = plan_pipeline(
        shape,
        config.pipeline_parallel_size,
        None if config.pipeline_layers == AUTO else config.pipeline_layers,
        num_tokens,
        config.pipeline_window,
        parts,
        shares_head,
    )
    plan = with_ranks(plan, ranks_per_stage)

    def limits_with(num_blocks: int) -> Limits:
        return Limits(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            max_tbt_s=config.slo_tbt,
            order=config.serving_order,
        )

    check_suits(policy, limits_with(1))  # before anything is started
    return plan, limits_with


def most_tokens(config: RunConfig, max_model_len: int) -> int:
    """Of a microbatch."""
    return config.batched_tokens(get_policy(config.policy).traits.whole_prompts, max_model_len)


def usual_of(config: RunConfig, max_model_len: int) -> Work:
    """The microbatch by which stages are evened out."""
    return usual_work(min(most_tokens(config, max_model_len), _MOST_TIMED), max_model_len)
