"""What a run of real stages predicts with."""

import pytest
from checkpoints import tiny_llama

from pipeserve.configs import RunConfig
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH_CPU
from pipeserve.core.policies import POLICIES
from pipeserve.driver.checkpoint import checkpoint_setup


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_costs_are_learnt_for_who_asks_for_them(tmp_path, policy, width):
    """Whatever the limit between tokens; other policies do not pay for it."""
    config = RunConfig(
        model=tiny_llama(tmp_path),
        policy=policy,
        pipeline_parallel_size=2,
        tensor_parallel_size=width,
    )
    cost = checkpoint_setup(config).cost
    if POLICIES[policy].traits.reads_cost:
        assert isinstance(cost, PipelineCost) and cost.profile is ROUGH_CPU
    else:
        assert cost is None
