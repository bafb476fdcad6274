"""The forecast against flow shops worked out by hand."""

from math import inf

import pytest

from pipeserve.core.forecast import Forecast


def test_microbatches_queue_at_the_stage_where_the_one_before_still_is():
    forecast = Forecast(3)
    # Stage by stage: ends at 1, 3, 4.
    forecast.planned(0, (1.0, 2.0, 1.0), 0.0)
    assert forecast.known_s(0) == 4.0
    # Stage 0 from 1 to 2, stage 1 is free at 3: to 4, stage 2 at 4: to 7.
    forecast.planned(1, (1.0, 1.0, 3.0), 0.0)
    assert forecast.known_s(1) == 7.0
    # Stage 0 from 2 to 6, stage 1 to 7, stage 2 from 7 to 8.
    assert forecast.through_s((4.0, 1.0, 1.0), 0.0) == 8.0
    # Planned at 10, when all are free.
    assert forecast.through_s((4.0, 1.0, 1.0), 10.0) == 16.0


def test_asking_changes_nothing():
    forecast = Forecast(2)
    forecast.planned(0, (1.0, 1.0), 0.0)
    assert [forecast.through_s((5.0, 5.0), 0.0) for _ in range(2)] == [11.0, 11.0]
    assert forecast.known_s(0) == 2.0


def test_a_token_on_its_way_holds_stage_0_back():
    forecast = Forecast(2)
    forecast.planned(0, (1.0, 1.0), 0.0)
    forecast.planned(1, (1.0, 1.0), forecast.known_s(0))  # needs what 0 samples, at 2
    assert forecast.known_s(1) == 4.0
    assert forecast.through_s((1.0, 1.0), 0.0) == 5.0


@pytest.mark.parametrize("late_s", [-0.5, 0.0, 2.0])
def test_what_is_behind_comes_as_much_earlier_or_later(late_s):
    forecast = Forecast(2)
    forecast.planned(0, (1.0, 1.0), 0.0)  # stages free at 1, 2
    forecast.planned(1, (1.0, 1.0), 0.0)  # at 2, 3
    forecast.completed(0, 2.0 + late_s)
    assert forecast.known_s(1) == 3.0 + late_s
    assert forecast.through_s((1.0, 1.0), 0.0) == 4.0 + late_s
    assert forecast.through_s((0.5, 1.0), 0.0) == 4.0 + late_s  # stage 1 is what it waits for
    assert forecast.through_s((2.0, 1.0), 0.0) == 5.0 + late_s  # and here stage 0
    with pytest.raises(KeyError):
        forecast.known_s(0)


def test_shifts_do_not_add_up():
    """Every microbatch 0.5 s late, each of which the one before has told already."""
    forecast = Forecast(2)
    for index in range(4):
        forecast.planned(index, (1.0, 1.0), 0.0)
    for index in range(4):
        forecast.completed(index, 2.0 + index + 0.5)
    assert forecast.through_s((1.0, 1.0), 0.0) == 6.5


def test_a_completion_that_was_never_planned_changes_nothing():
    forecast = Forecast(2)
    forecast.planned(5, (1.0, 1.0), 0.0)
    forecast.completed(3, 100.0)
    assert forecast.known_s(5) == 2.0


def test_forget_leaves_free_stages():
    forecast = Forecast(2)
    forecast.planned(0, (1.0, 9.0), 0.0)
    forecast.forget()
    assert forecast.through_s((1.0, 1.0), 3.0) == 5.0
    with pytest.raises(KeyError):
        forecast.known_s(0)


def test_an_idle_pipeline_takes_what_comes_when_it_comes():
    assert Forecast(3).through_s((1.0, 2.0, 3.0), -7.0) == -1.0
    assert Forecast(1).through_s((0.0,), -inf) == -inf
