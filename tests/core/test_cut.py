"""The cut whose slowest stage is fastest, against every cut that there is."""

from collections.abc import Iterator
from itertools import combinations
from random import Random

import pytest

from pipeserve.core.cost.cut import Room, StageParts, best_cut, stage_seconds


def every_cut(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cut in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(b - a for a, b in zip((0, *cut), (*cut, num_layers), strict=True))


def fits(stages, rooms, counts) -> bool:
    taken, first = [], 0
    for stage, count in zip(stages, counts, strict=True):
        taken.append(stage.other_bytes + sum(stage.layer_bytes[first : first + count]))
        first += count
    return all(sum(taken[stage] for stage in room.stages) <= room.num_bytes for room in rooms)


def random_case(rng: Random) -> tuple[list[StageParts], list[Room]]:
    """Unequal layers, stages and memories; times that are often the same, and rooms that stages
    share, alone or one inside another, as containers of one machine do."""
    num_layers = rng.randint(1, 9)
    num_stages = rng.randint(1, min(num_layers, 5))
    seconds = rng.choice([lambda: float(rng.randint(1, 3)), rng.random])
    stages = [
        StageParts(
            tuple(seconds() for _ in range(num_layers)),
            rng.choice([0.0, 3 * rng.random()]),
            tuple(rng.randint(1, 9) for _ in range(num_layers)),
            rng.randint(0, 9),
        )
        for _ in range(num_stages)
    ]
    rooms = [
        Room(rng.randint(5, 60), tuple(sorted(rng.sample(range(num_stages), size))))
        for size in (rng.randint(1, num_stages) for _ in range(rng.randint(0, 3)))
    ]
    return stages, rooms


@pytest.mark.parametrize("seed", range(4))
def test_no_cut_that_fits_has_a_faster_slowest_stage(seed):
    rng, num_without = Random(seed), 0
    for _ in range(250):
        stages, rooms = random_case(rng)
        num_layers = len(stages[0].layer_s)
        fitting = [c for c in every_cut(num_layers, len(stages)) if fits(stages, rooms, c)]
        found = best_cut(stages, rooms)
        if not fitting:
            assert found is None
            num_without += 1
            continue
        assert found in fitting
        best_s = min(max(stage_seconds(stages, counts)) for counts in fitting)
        assert max(stage_seconds(stages, found)) == pytest.approx(best_s)
    assert 5 < num_without < 150  # both are met


def test_a_slower_device_gets_fewer_layers():
    stages = [StageParts((1.0,) * 31), StageParts((1.5,) * 31), StageParts((1.0,) * 31)]
    assert best_cut(stages) == (12, 8, 11)


def test_of_the_fastest_cuts_few_stages_are_the_slowest():
    """Ten layers on four stages: two have three. Not one with four, nor three with three."""
    assert best_cut([StageParts((1.0,) * 10)] * 4) == (3, 3, 2, 2)


def test_memory_of_one_machine_is_shared_by_its_stages():
    """The second machine holds five layers in all, whichever of its stages has them."""
    stages = [StageParts((1.0,) * 12, layer_bytes=(10,) * 12)] * 4
    assert best_cut(stages) == (3, 3, 3, 3)
    assert best_cut(stages, [Room(1000, (0, 1)), Room(50, (2, 3))]) == (4, 3, 3, 2)


def test_layers_of_different_kinds_count_as_what_they_take():
    """Every sixth sees all of a context, the others a window."""
    layer_s = tuple(5.0 if number % 6 == 5 else 1.0 for number in range(12))
    assert best_cut([StageParts(layer_s)] * 2) == (6, 6)
    assert best_cut([StageParts(layer_s[:3] + (9.0,) + layer_s[4:])] * 2) == (5, 7)
