"""The Falcon-180B job: what docs/falcon-180b.md says of memory, and the job itself, emulated."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeserve.configs import load_recipe, make_config
from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.memory import weight_bytes
from pipeserve.driver.layout import lay_out
from pipeserve.launch.run.simulated import simulated_run

PAGE = Path(__file__).parents[2] / "docs" / "falcon-180b.md"
GPU_BYTES = load_profile("a100-80gb-dgx").memory_bytes


def rows(recipe, emulated_as):
    """Of the page's table, from the code that cuts the model and sizes the pools."""
    shape = load_shape("falcon-180b")
    config = make_config(load_recipe(recipe), {})
    size = config.tensor_parallel_size
    plan, _ = lay_out(
        config, shape, max_model_len=2048, enable_prefix_caching=True, ranks_per_stage=size
    )
    emulated = simulated_run(make_config(load_recipe(emulated_as), {}))
    assert emulated.plan == plan
    usable = config.gpu_memory_utilization * GPU_BYTES
    shard = shape.shard(size)
    for stage in plan.stages:
        weights = weight_bytes(shard, stage)
        block = stage.num_layers * config.block_size * shard.kv_bytes_per_token_per_layer
        most = config.max_num_seqs * 2048 // config.block_size
        pool = min(emulated.limits.num_blocks, most) * block
        assert weights + pool <= usable
        holds = ["embedding"] * stage.has_embedding + ["head"] * stage.has_head
        layers = f"{stage.first_layer} to {stage.stop_layer - 1}"
        held = [f"{n / 1e9:.1f}" for n in (weights, pool)]
        yield [", ".join(map(str, stage.ranks)), layers, *(holds or [""]), *held]


@pytest.mark.parametrize(
    "recipes",
    [("falcon-180b", "falcon-180b-8xa100"), ("falcon-180b-tp4pp2", "falcon-180b-2x4xa100")],
)
def test_the_budget_is_what_the_page_says(recipes):
    text = PAGE.read_text()
    for row in rows(*recipes):
        assert f"| {' | '.join(map(str, row))} |" in text, row


def test_a_cut_over_two_machines_crosses_once():
    """Four ranks on each."""
    recipe = load_recipe("falcon-180b-8xa100")
    run = simulated_run(make_config(recipe, {"device_profile": "nc96ads-a100-v4"}))
    slowest = max(run.times.latency_s)
    assert [s == slowest for s in run.times.latency_s] == [False] * 3 + [True] + [False] * 3


@pytest.mark.processes
def test_the_job_emulated_over_torchrun(tmp_path):
    """All its processes, and a few short requests."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "8",
         "--master-port", str(port), "-m", "pipeserve", "bench", "--config", "falcon-180b-8xa100",
         "--device", "emulated", "--workload", "sharegpt", "--scale", "64", "--num-prompts", "6",
         "--json", str(figures)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert (found["kind"], found["requests"]) == ("emulated", 6)
    assert [stage["layers"] for stage in found["stages"]] == [10] * 8
