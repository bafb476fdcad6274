"""Every policy under loads that people send: see `loads.py` and `load_runs.py`.

`tests/profiling/test_more_loads.py` goes on from here, and `bench/random_loads.py` from any seed.
"""

import pytest
from load_runs import serve

from pipeserve.core.policies import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_loads(policy):
    serve(policy, range(150))
