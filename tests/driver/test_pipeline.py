"""The whole runtime: real processes, real links, tokens equal to transformers'.

Everything here is float32, where equal tokens are promised.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from other_engine import renew

import pipeserve
from pipeserve import SamplingParams
from pipeserve.errors import ConfigError, StageError

from checkpoints import greedy_tokens, random_prompts, tiny_llama  # isort: skip

pytestmark = pytest.mark.processes

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Llama of 4 layers, its prompts, and what transformers answers, greedily."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    prompts = random_prompts(folder, lengths=(1, 3, 17, 16, 40, 9, 33, 5))
    return folder, prompts, greedy_tokens(folder, prompts, MAX_TOKENS)


@pytest.fixture(scope="module")
def start(model):
    """layers of each stage -> an LLM with the engine that it started with; stages start once."""
    with ExitStack() as started:

        @cache
        def llm_of(*layers):
            llm = pipeserve.LLM(
                model[0],
                dtype="float32",
                pipeline_parallel_size=len(layers),
                pipeline_layers=list(layers),
                block_size=4,
                num_gpu_blocks_override=256,
            )
            return started.enter_context(llm)

        yield llm_of


def greedy(llm, prompts):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return [list(c.token_ids) for c in llm.generate(prompts, params)]


@pytest.mark.parametrize("layers", [(4,), (2, 2), (2, 0, 2), (1, 1, 1, 1)], ids=str)
def test_greedy_tokens_are_those_of_transformers(start, model, layers):
    _, prompts, expected = model
    llm = start(*layers)
    renew(llm)
    assert greedy(llm, prompts) == expected


@pytest.mark.parametrize("policy", ["uniform", "sarathi_serve"])
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_tokens_do_not_depend_on_the_budget(start, model, budget, policy):
    _, prompts, expected = model
    llm = start(2, 2)
    renew(llm, policy, max_num_batched_tokens=budget)
    assert greedy(llm, prompts) == expected


def test_tokens_survive_preemption(start, model):
    _, prompts, expected = model
    llm = start(2, 0, 2)
    renew(llm, num_blocks=20, max_model_len=80, enable_prefix_caching=False)
    assert greedy(llm, prompts) == expected
    assert llm.client.engine.stats.preemptions > 0


def test_tokens_do_not_depend_on_cached_prefixes(start, model):
    folder, prompts, _ = model
    shared = prompts[4]
    family = [shared + prompt for prompt in prompts] + [shared, shared]
    llm = start(2, 2)
    renew(llm, max_num_seqs=3)
    assert greedy(llm, family) == greedy_tokens(folder, family, MAX_TOKENS)
    assert llm.client.engine.stats.cached_prefix_tokens > len(shared)


# ---- processes ----------------------------------------------------------------------------------


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until_gone(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes left behind: {left}"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_is_one_error_and_leaves_nothing_behind(model, victim):
    folder, prompts, _ = model
    llm = pipeserve.LLM(folder, dtype="float32", pipeline_parallel_size=2, restart=False)
    pids = [stage.pid for stage in llm.client.stages]
    pids += [keeper.pid for keeper in llm.client.fleet.keepers.values()]
    os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(StageError, match=f"stage {victim} .*died: killed by SIGKILL") as caught:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    assert "\n" not in str(caught.value)
    _wait_until_gone(pids)
    with pytest.raises(StageError, match=f"has ended .stage {victim}"):  # and does not hang
        llm.generate([[3, 4, 5]])
    llm.close()


def test_a_dropped_llm_leaves_nothing_behind(model):
    folder, _, _ = model
    llm = pipeserve.LLM(folder, dtype="float32")
    pids = [llm.client.stages[0].pid, llm.client.fleet.keepers[0].pid]
    del llm
    gc.collect()
    _wait_until_gone(pids)


def test_a_kv_pool_over_the_machine_s_memory_is_refused_before_it_is_filled(model):
    folder, _, _ = model
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        pipeserve.LLM(folder, num_gpu_blocks_override=100_000_000)


def test_a_killed_driver_leaves_nothing_behind(model):
    folder, _, _ = model
    script = (
        "import pipeserve, sys, time\n"
        f"llm = pipeserve.LLM({str(folder)!r}, dtype='float32', pipeline_parallel_size=2)\n"
        "pids = [s.pid for s in llm.client.stages]\n"
        "pids += [k.pid for k in llm.client.fleet.keepers.values()]\n"
        "print(*pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 4
        assert all(_is_running(pid) for pid in pids)
    finally:
        driver.kill()
        driver.communicate()
    _wait_until_gone(pids)


def test_torchrun_starts_the_same_keepers(model, tmp_path):
    folder, prompts, expected = model
    port = _free_port()
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(_free_port()),
         "-m", "pipeserve.launch.keeper", "--control", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with pipeserve.LLM(
            folder,
            dtype="float32",
            pipeline_parallel_size=2,
            launcher="external",
            control=f"127.0.0.1:{port}",
        ) as llm:
            assert greedy(llm, prompts) == expected
        assert torchrun.wait(timeout=60) == 0
    finally:
        torchrun.terminate()
        torchrun.wait(timeout=30)


def test_a_busy_control_port_is_refused_at_once(model):
    folder, _, _ = model
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--control 127.0.0.1:{port}"):
            pipeserve.LLM(folder, control=f"127.0.0.1:{port}", launcher="external")


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
