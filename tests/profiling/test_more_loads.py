"""More of `tests/core/test_loads.py`, a thousand in all."""

import pytest
from load_runs import serve

from pipeserve.core.policies import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_loads(policy):
    serve(policy, range(150, 1000))
