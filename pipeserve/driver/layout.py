"""How a run cuts its model into stages, and the limits within which its engine plans: one way for
stages that compute, that only wait, and that are simulated.
"""

from collections.abc import Callable

from pipeserve.configs import RunConfig
from pipeserve.core.cost.partition import plan_pipeline
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import check_suits
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.policies import get_policy
from pipeserve.core.view import Limits


def lay_out(
    config: RunConfig,
    shape: ModelShape,
    *,
    max_model_len: int,
    enable_prefix_caching: bool,
) -> tuple[PipelinePlan, Callable[[int], Limits]]:
    """The cut, and the limits with so many KV blocks: how many, follows from the stages' memory.

    Raises ConfigError for a cut that the model does not allow, and for limits that the policy
    cannot work within.
    """
    policy = get_policy(config.policy)
    num_tokens = config.batched_tokens(policy.traits.whole_prompts, max_model_len)
    plan = plan_pipeline(
        shape,
        config.pipeline_parallel_size,
        config.pipeline_layers,
        num_tokens,
        config.pipeline_window,
    )

    def limits_with(num_blocks: int) -> Limits:
        return Limits(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            max_tbt_s=config.slo_tbt,
            order=config.order,
        )

    check_suits(policy, limits_with(1))  # before anything is started
    return plan, limits_with
