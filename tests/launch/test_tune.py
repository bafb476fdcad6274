"""`pipeserve tune` from the command line, on a case that is simulated in seconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from pipeserve.configs import load_recipe, make_config
from pipeserve.launch import cli
from pipeserve.launch.run.processes import processes
from pipeserve.launch.verbs import tune_search

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ["falcon-180b", "--device-profile", "a100-80gb-dgx", "--max-model-len", "2048"]
SIZES = ["-tp", "4", "-pp", "2"]
SHORT = (
    tune_search.Effort(name="short trials", num_requests=20, num_lifetimes=1),
    tune_search.Effort(name="longer trials", num_requests=30, num_lifetimes=1),
    tune_search.Effort(name="the last few", num_requests=40, num_lifetimes=1),
)


@pytest.fixture
def workload(tmp_path):
    """Long prompts: few requests are many tokens."""
    path = tmp_path / "lengths.csv"
    path.write_text("prefill,decode\n1900,4\n1700,8\n")
    return str(path)


@pytest.fixture
def run(monkeypatch, workload, tmp_path):
    """Runs a search: its exit code, and the object of --json."""
    monkeypatch.setattr(tune_search, "ROUNDS", SHORT)

    def run(*arguments):
        path = tmp_path / "result.json"
        given = ["tune", *MODEL, "--workload", workload, "--processes", "1", "--json", str(path)]
        exit_code = cli.main([*given, *arguments])
        return exit_code, json.loads(path.read_text() or "null") if path.exists() else None

    return run


@pytest.fixture
def error_of(capsys, workload):
    def error_of(*arguments, model=MODEL):
        assert cli.main(["tune", *model, "--workload", workload, *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return error_of


def test_at_a_rate_the_best_is_written_as_a_recipe_that_simulates(run, capsys, tmp_path, workload):
    recipe = tmp_path / "best.yaml"
    code, result = run(*SIZES, "--slo-tbt", "0.5", "--rate", "0.5", "--output", str(recipe))
    assert code == 0
    printed = capsys.readouterr().out
    tried = result["candidates"]
    # The run as it is, and 2 splits x 2 windows x 7 settings of 3 policies.
    assert len(tried) == 1 + 2 * 2 * 7
    assert [each["round"] for each in tried] == sorted((e["round"] for e in tried), reverse=True)
    assert {each["policy"] for each in tried if each["round"] == 2} == {
        "uniform", "sarathi_serve", "token_throttle",
    }  # fmt: skip
    best = tried[0]
    assert best["is_within"] and best["tbt_p99_s"] <= 0.5 and best["capacity_rps"] is None
    assert best["ttft_p50_s"] == min(e["ttft_p50_s"] for e in tried if e["round"] == 2)
    config = make_config(load_recipe(str(recipe)), {})
    assert {name: getattr(config, name) for name in tune_search.SEARCHED} == {
        **{name: best[name] for name in tune_search.SEARCHED},
        "pipeline_layers": best["pipeline_layers"] and tuple(best["pipeline_layers"]),
    }
    assert config.slo_tbt == 0.5 and config.max_model_len == 2048
    text = recipe.read_text()
    assert text.startswith("# By `pipeserve tune`: falcon-180b on 8 GPUs of a100-80gb-dgx")
    assert f"the best of {len(tried)} candidates" in " ".join(text.replace("#", "").split())
    assert "4x2" in printed and "token_throttle" in printed and "9 more gave less" in printed
    simulated = ["simulate", "--config", str(recipe), "--workload", workload, "--rate", "0.5"]
    assert cli.main(simulated) == 0


def test_a_capacity_is_searched_of_the_last_few_and_printed(run, capsys):
    code, result = run("--gpus", "8", "--slo-tbt", "0.5", "--policy", "uniform", "-pp", "2")
    assert code == 0
    layouts = {
        (each["tensor_parallel_size"], each["pipeline_parallel_size"])
        for each in result["candidates"]
    }
    assert layouts == {(4, 2)}
    capacities = [e["capacity_rps"] for e in result["candidates"] if e["round"] == 2]
    assert capacities == sorted(capacities, reverse=True) and capacities[0] > 0
    assert capacities[0] <= result["ceiling_rps"]
    assert all(e["capacity_rps"] is None for e in result["candidates"] if e["round"] < 2)
    printed = capsys.readouterr().out
    assert "\nmodel: falcon-180b\n" in printed and "slo_tbt: 0.5\n" in printed


def test_it_is_the_same_in_any_number_of_processes(run):
    search = ["-tp", "8", "--slo-tbt", "0.5", "--rate", "0.2", "--policy", "uniform"]
    few = [*search, "--max-num-batched-tokens", "512", "--pipeline-window", "1"]
    one = run(*few)
    assert one[1] is not None and one == run(*few, "--processes", "2")


def test_what_is_given_as_a_flag_is_not_searched(run):
    _, result = run(
        *SIZES, "--slo-tbt", "0.5", "--rate", "0.5", "--policy", "sarathi_serve",
        "--max-num-batched-tokens", "300", "--pipeline-layers", "42,38",
    )  # fmt: skip
    fixed = ("policy", "max_num_batched_tokens", "pipeline_layers")
    assert {tuple(str(each[name]) for name in fixed) for each in result["candidates"]} == {
        ("sarathi_serve", "300", "[42, 38]")
    }
    assert {each["pipeline_window"] for each in result["candidates"]} == {None, 2, 3}


def test_what_fits_nowhere_is_left_out(run, capsys, tmp_path):
    path = tmp_path / "mixed.csv"
    path.write_text("prefill,decode\n1900,4\n9000,4\n")
    more = ["--workload", str(path), *SIZES, "--policy", "uniform", "--rate", "0.5"]
    _, result = run(*more, "--slo-tbt", "0.5")
    assert (result["requests"], result["left_out"]) == (1, 1)
    assert "1 requests that fit nowhere" in capsys.readouterr().out


def test_nothing_within_the_slo_writes_nothing(run, capsys, tmp_path):
    recipe = tmp_path / "best.yaml"
    more = [*SIZES, "--policy", "uniform", "--output", str(recipe)]
    code, result = run("--slo-tbt", "0.5", "--rate", "20", *more)
    assert code == 1 and result is None and not recipe.exists()
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no candidate serves" in said.err
    assert "no" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune goes by --slo-tbt"),
        (["--slo-tbt", "0"], "slo_tbt is 0"),
        (["--slo-tbt", "1", "--gpus", "97"], "no layout of falcon-180b takes 97 GPUs"),
        (["--slo-tbt", "1", "--gpus", "4", "-pp", "3"], "no layout of 4 GPUs has the sizes"),
        (["--slo-tbt", "1", "-pp", "8", "--max-model-len", "99"], "the shortest has 1708 tokens"),
        (["--slo-tbt", "1", "--rate", "-1"], "--rate is -1"),
        (["--slo-tbt", "1", "--rate", "inf"], "--rate is inf"),
        (["--slo-tbt", "1"], "no room for KV"),
        (["--slo-tbt", "1e-6", "-pp", "8"], "on no layout is a turn"),
        (["--slo-tbt", "1", "--policy", "unform"], "there is no policy 'unform'"),
        (["--slo-tbt", "1", "--workload", "shargpt"], "no workload 'shargpt'"),
        (["--slo-tbt", "1", "--json", "no/such/folder/x"], "No such file"),
        (["--slo-tbt", "1", "--config", "falcon-180b-8xa10"], "no recipe 'falcon-180b-8xa10'"),
    ],
)
def test_what_cannot_be_is_one_line(error_of, arguments, message):
    assert message in error_of(*arguments)


def test_other_things_that_cannot_be(error_of, tmp_path):
    assert "no device profile" in error_of("--slo-tbt", "1", model=["falcon-180b"])
    there = tmp_path / "there.yaml"
    there.write_text("mine\n")
    assert "there.yaml exists" in error_of("--slo-tbt", "1", "--output", str(there))
    assert there.read_text() == "mine\n"
    one = tmp_path / "one.csv"
    one.write_text("prefill,decode\n100,1\n")
    assert "have one output token" in error_of("-pp", "8", "--slo-tbt", "1", "--workload", str(one))


@pytest.fixture
def signal_handlers():
    """As they were before, at the end."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = {ending: signal.getsignal(ending) for ending in endings}
    yield
    for ending, handler in found.items():
        signal.signal(ending, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("ending", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_what_ends_the_search_while_processes_start_waits_until_they_have(ending, raised):
    """Also where another thread, which blocks no signal, takes it."""
    started = []

    def things():
        yield 1
        os.kill(os.getpid(), ending)
        time.sleep(0.05)  # Python would handle it here
        started.append(active_children())
        yield 2

    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        with pytest.raises(raised), processes(2) as run:
            list(run(abs, things()))
    finally:
        stop.set()
        other.join()
    assert len(started) == 1 and not active_children()


@pytest.mark.usefixtures("signal_handlers")
def test_a_process_that_the_pools_thread_reaps_is_gone_too(monkeypatch):
    """Whoever reaps it, a moment passes until Python knows."""
    real, main = os.waitpid, threading.current_thread()
    reaped = []

    def waitpid(pid, options):
        result = real(pid, options)
        if threading.current_thread() is not main and result[0]:
            reaped.append(pid)
            time.sleep(0.2)
        return result

    def killed(kill):  # the pool's thread comes first
        def slowly(process):
            kill(process)
            time.sleep(0.05)

        return slowly

    monkeypatch.setattr(os, "waitpid", waitpid)
    monkeypatch.setattr(SpawnProcess, "kill", killed(SpawnProcess.kill))
    with processes(2) as run:
        assert dict(run(abs, [-1, -2, -3])) == {-1: 1, -2: 2, -3: 3}
    assert reaped and not active_children()


@pytest.mark.processes
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_search_leaves_no_process_and_no_file(tmp_path, ending):
    recipe = tmp_path / "best.yaml"
    command = [sys.executable, "-m", "pipeserve.launch.cli", "tune", "--config",
               "falcon-180b-8xa100", "--slo-tbt", "1", "--processes", "2",
               "--output", str(recipe)]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as search:  # fmt: skip
        try:
            workers = _wait(lambda: len(found := _spawned_by(search.pid)) == 2 and found, 60)
            if ending == signal.SIGINT:  # a terminal sends it to all
                os.killpg(search.pid, ending)
            else:
                search.send_signal(ending)
            said = search.communicate(timeout=30)[1].decode()  # when the last of them has ended
        finally:
            search.kill()  # or a failure would wait for the search's end
    assert search.returncode == {2: 130, 15: 143, 9: -9}[ending]
    assert ending == signal.SIGKILL or said.strip() in ("", "Aborted!")
    assert not recipe.exists()
    _wait(lambda: not any(map(_is_running, workers)), 10)


def _wait(ready, seconds):
    deadline = time.monotonic() + seconds
    while not (result := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def _spawned_by(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for each in children if "spawn_main" in Path(f"/proc/{each}/cmdline").read_text()]


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
