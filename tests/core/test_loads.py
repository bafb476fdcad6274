"""Every policy under loads that people send: see `loads.py` and `load_runs.py`.

`bench/random_loads.py` goes on from here, from any seed.
"""

import pytest
from load_runs import run
from loads import make_load, policy_of

from pipeserve.core.policies import POLICIES

QUICK, ALL = 150, 1000


def serve(policy: str, seeds: range) -> None:
    for seed in seeds:
        if policy_of(seed) != policy:
            continue
        load = make_load(seed)
        try:
            run(load)
        except Exception as error:
            error.add_note(f"{load}\nalone: python bench/random_loads.py --first {seed} --loads 1")
            raise


@pytest.mark.parametrize("policy", POLICIES)
def test_quick_loads(policy):
    serve(policy, range(QUICK))


@pytest.mark.parametrize("policy", POLICIES)
def test_more_loads(policy):
    serve(policy, range(QUICK, ALL))
