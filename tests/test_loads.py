"""Every policy under loads that people send: see `loads.py` and `load_runs.py`.

`bench/random_loads.py` goes on from here, from any seed.
"""

import pytest
from load_runs import run
from loads import make_load

from pipeserve.core.policies import POLICIES

QUICK, ALL = 150, 1000


def serve(seed: int) -> None:
    load = make_load(seed)
    try:
        run(load)
    except Exception as error:
        error.add_note(f"{load}\nalone: python bench/random_loads.py --first {seed} --loads 1")
        raise


@pytest.mark.parametrize("place", range(len(POLICIES)), ids=list(POLICIES))
def test_quick_loads(place):
    for seed in range(place, QUICK, len(POLICIES)):
        serve(seed)


@pytest.mark.parametrize("place", range(len(POLICIES)), ids=list(POLICIES))
def test_more_loads(place):
    for seed in range(QUICK + place, ALL, len(POLICIES)):
        serve(seed)
