"""`--pipeline-layers auto`: layers where the ranks are fast, within what they have; and what was
measured, kept for runs that do not measure."""

import json
from itertools import combinations

import pytest
from checkpoints import random_prompts, tiny
from local_fleet import LocalFleet

import pipeserve.stage.worker
from pipeserve import LLM, SamplingParams
from pipeserve.configs import make_config
from pipeserve.core.work import PartSeconds
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError
from pipeserve.machine import MemoryLimit
from pipeserve.stages.timing import Timed

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 8


class Ranks:
    """What is made up of them."""

    speeds = (1.0, 1.0, 1.0)
    num_timed = 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "cache"))
    path = tiny("llama", tmp_path, num_hidden_layers=LAYERS)
    monkeypatch.setattr(Ranks, "num_timed", 0)

    def timed(config, backend, works, seconds, *, has_embedding, has_head, **types):
        Ranks.num_timed += 1
        # Stages are asked one after the other, in the order of their ranks.
        speed = Ranks.speeds[(Ranks.num_timed - 1) % len(Ranks.speeds)]
        layers = tuple(1.0 / speed for _ in range(config.num_layers))
        head = 1.2 / speed if has_head else 0.0
        return Timed((PartSeconds(layers, 0.1 * has_embedding, head),) * len(works), 1.0)

    monkeypatch.setattr(pipeserve.stage.worker, "time_parts", timed)
    return path


def opened(folder, *, layers=None, num_stages=3, **options):
    wanted = {"model": folder, "dtype": "float32", "pipeline_parallel_size": num_stages}
    wanted["head_stages"] = "both"
    config = make_config({}, {**wanted, "pipeline_layers": layers, **options})
    return Driver(checkpoint_setup(config), fleet=LocalFleet)


def counts(driver):
    return tuple(stage.num_layers for stage in driver.plan.stages)


def best(speeds):
    """By looking at every cut."""

    def slowest(cut):
        held = [b - a for a, b in zip((0, *cut), (*cut, LAYERS), strict=True)]
        loads = [count / speed for count, speed in zip(held, speeds, strict=True)]
        loads[0] += 0.1 + 0.6 / speeds[-1]
        loads[-1] += 0.6 / speeds[-1]
        return max(loads)

    return min(map(slowest, combinations(range(1, LAYERS), len(speeds) - 1)))


@pytest.mark.parametrize("speeds", [(1, 1, 1), (1, 0.5, 1), (3, 1, 1), (1, 1, 4), (0.2, 1, 0.7)])
def test_layers_go_where_they_are_fast_and_say_the_same(folder, monkeypatch, speeds):
    prompts = random_prompts(folder, (26, 9, 2))
    params = SamplingParams(temperature=0, max_tokens=6)
    monkeypatch.setattr(Ranks, "speeds", speeds)
    with LLM.on(opened(folder, layers="8", num_stages=1)) as llm:
        expected = [each.token_ids for each in llm.generate(prompts, params)]
    driver = opened(folder, layers="auto")
    found = [count / speed for count, speed in zip(counts(driver), speeds, strict=True)]
    found[0] += 0.1 + 0.6 / speeds[-1]  # both ends have half of the heads
    found[-1] += 0.6 / speeds[-1]
    assert max(found) == pytest.approx(best(speeds))
    assert driver.setup.layers_by == "by times measured now"
    assert [stage.num_layers for stage in driver.stages] == list(counts(driver))
    with LLM.on(driver) as llm:
        assert [each.token_ids for each in llm.generate(prompts, params)] == expected


def test_what_was_measured_is_taken_by_the_next_run(folder, monkeypatch):
    monkeypatch.setattr(Ranks, "speeds", (1, 0.5, 1))
    with opened(folder) as driver:
        unmeasured = counts(driver)
        assert driver.setup.layers_by == "by operations and bytes"
    with opened(folder, layers="auto") as driver:
        measured = counts(driver)
    num_timed = Ranks.num_timed
    with opened(folder) as driver:
        assert counts(driver) == measured != unmeasured
        assert driver.setup.layers_by.startswith("by times measured on 2")
    assert Ranks.num_timed == num_timed
    for other in ({"max_num_batched_tokens": 24}, {"kv_cache_dtype": "float16"}):
        with opened(folder, **other) as driver:  # of which nothing was measured
            assert driver.setup.layers_by == "by operations and bytes"
    with opened(folder, layers="3,3,2") as driver:
        assert counts(driver) == (3, 3, 2) and driver.setup.layers_by == "as listed"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "7", "\udcff"])
def test_a_file_that_is_damaged_counts_as_none_and_is_written_anew(folder, tmp_path, content):
    file = tmp_path / "cache/layer-times.json"
    file.parent.mkdir()
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with opened(folder) as driver:
        assert driver.setup.layers_by == "by operations and bytes"
    with opened(folder, layers="auto"):
        entries = json.loads(file.read_text())
    assert {"device 0", "device 2"} < {
        entry["device"] for entry in entries.values() if isinstance(entry, dict)
    }
    for entry in entries.values():  # of which one lacks what it should have
        if isinstance(entry, dict):
            entry.pop("head")
    file.write_text(json.dumps(entries))
    with opened(folder) as driver:
        assert driver.setup.layers_by == "by operations and bytes"


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with opened(folder, layers="auto") as driver:
        assert driver.setup.layers_by == "by times measured now"
    with opened(folder) as driver:
        assert driver.setup.layers_by == "by operations and bytes"


def with_memory(monkeypatch, free_bytes):
    """Of each rank's machine."""
    made = []

    def device_memory(device):
        rank = len(made) % len(free_bytes)
        made.append(rank)
        return (MemoryLimit(f"m{rank}", f"machine {rank}", 1 << 40, free_bytes[rank]),)

    monkeypatch.setattr(pipeserve.stage.worker, "device_memory", device_memory)


def test_a_fast_machine_gets_no_more_than_fits(folder, monkeypatch):
    """Four times as fast, and with room for both ends and three of the eight layers."""
    monkeypatch.setattr(Ranks, "speeds", (4, 1, 1))
    with_memory(monkeypatch, (1 << 30,) * 3)
    with opened(folder, layers="auto") as driver:
        fastest, size = counts(driver), driver.sizes[0]
    assert fastest[0] >= 5
    longest = -(-driver.limits.max_model_len // driver.limits.block_size)
    layer = size.layer_bytes[0] + longest * size.block_bytes // fastest[0]
    with_memory(monkeypatch, (sum(size.end_bytes) + int(3.5 * layer), 1 << 30, 1 << 30))
    with opened(folder, layers="auto") as driver:
        assert counts(driver)[0] == 3
    with_memory(monkeypatch, (size.end_bytes[0], 1 << 30, 1 << 30))
    with pytest.raises(ConfigError, match=r"stage 0: weights take .* free"):
        opened(folder, layers="auto")


def test_a_cut_with_more_room_for_kv_is_named(folder, monkeypatch):
    monkeypatch.setattr(Ranks, "speeds", (4, 1, 1))
    with_memory(monkeypatch, (600_000, 600_000, 600_000))
    with opened(folder, layers="auto", max_model_len=32) as driver:
        other, limits = driver.setup.other_cut, driver.limits
    assert other.layers == (3, 3, 2)
    assert other.kv_tokens > 1.02 * limits.num_blocks * limits.block_size
    loads = [count / speed for count, speed in zip(counts(driver), (4, 1, 1), strict=True)]
    taken = max(loads[0] + 0.1 + 0.6, loads[1], loads[2] + 0.6)
    assert other.slower == pytest.approx(max(3, 2 + 0.6) / taken)


def test_more_stages_than_layers_is_one_line(folder):
    with pytest.raises(ConfigError, match="9 pipeline stages are more than the model's 8 layers"):
        opened(folder, layers="auto", num_stages=9)
