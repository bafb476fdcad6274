"""Real processes whose every message comes late, as between hosts far apart."""

import pytest
from late_links import LateLinks, through

from pipeserve.configs import make_config
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.run.record import meta_of_driver
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.ledger.notes import window_notes
from pipeserve.profiling.recording.recording import Ring, recording_of
from pipeserve.profiling.simulation.workloads import WorkItem

pytestmark = pytest.mark.processes

LATE_S = 0.02
"""Stages take some 10 ms."""
ITEMS = [WorkItem(prompt=(7,) * 60, max_tokens=24) for _ in range(48)]


def windows_of(window=None, late_s=LATE_S):
    """At each microbatch of a run; and what a reader is told of them."""
    config = make_config(
        {},
        {
            "model": "llama2-7b",
            "device_profile": "a100-80gb-dgx",
            "max_model_len": 1024,
            "pipeline_parallel_size": 2,
            "pipeline_window": window,
            "device": "emulated",
        },
    )
    links, ring = LateLinks(), Ring()
    try:
        with Driver(emulated_setup(config), record=ring.record, fleet=through(links)) as driver:
            links.all_late_s(late_s)
            run_items(driver, ITEMS, "", iter(range(100)))
            driver.settle()
            recording = recording_of(ring, 2, meta_of_driver(driver))
    finally:
        links.close()
    return [plan.window for plan in recording.planned], window_notes(recording)


def test_more_are_in_flight_when_links_are_slow():
    windows, notes = windows_of()
    assert windows[0] == 2 and 4 <= max(windows) <= 16
    assert notes[0].startswith(f"2 to {max(windows)} microbatches in flight")


def test_not_where_the_user_says_how_many():
    windows, notes = windows_of(window=2)
    assert set(windows) == {2} and not notes
