"""Every policy under loads that people send: see `loads.py` and `load_runs.py`.

`bench/random_loads.py` goes on from here, from any seed.
"""

import pytest
from load_runs import run
from loads import make_load, policy_of

from pipeserve.core.policies import POLICIES

NUM_LOADS = 250


@pytest.mark.parametrize("policy", POLICIES)
def test_loads(policy):
    for seed in range(NUM_LOADS):
        if policy_of(seed) != policy:
            continue
        load = make_load(seed)
        try:
            run(load)
        except Exception as error:
            error.add_note(f"{load}\nalone: python bench/random_loads.py --first {seed} --loads 1")
            raise
