"""The search for the best schedule of small instances (`bench/optimum.py`)."""

from random import Random

import pytest
from optimum import KINDS, LIMITS, Times, best_of, instances

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine
from pipeserve.core.policies import get_policy
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, Simulation


@pytest.mark.parametrize("name", ["makespan", "latency"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_the_best_found_lies_between_uniform_and_the_bound(num_stages, name):
    instance = instances(num_stages, seed=0)[name]
    served, _ = instance.run({})
    best = best_of(instance, KINDS, 15, Random(0))
    assert instance.least(instance) <= best <= instance.figure(served)


def test_without_choices_it_is_uniform():
    instance, times = instances(2, seed=1)["latency"], Times(2)
    engine = Engine(split_layers(2, 2), get_policy("uniform"), LIMITS, times)
    simulation = Simulation(SimulatedPipeline(engine, times), instance.arrivals)
    simulation.run_until()
    assert instance.run({})[0] == simulation.served


def test_other_choices_are_other_schedules_that_serve_all():
    instance = instances(4, seed=2)["makespan"]
    rng = Random(0)
    figures = set()
    for _ in range(10):
        choices = {(n, kind): rng.randint(0, 8) for n in range(40) for kind in KINDS}
        served, _ = instance.run(choices)
        assert all(each.finished for each in served)
        figures.add(instance.figure(served))
    assert len(figures) > 5
