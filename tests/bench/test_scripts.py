"""Every script of bench/ still finds what it names in the project.

All of them import and answer `--help`, and what they name of the project's modules is there. Those
that stand in for parts of a driver, an engine or a stage run in their smallest form, since no
import would miss what they name there.
"""

import ast
import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from inspect import isclass, ismodule
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import tiny_llama
from fake_client import byte_tokenizer
from local_fleet import LocalFleet
from schedule_ablation import WITHOUT, at_once

from pipeserve.configs import make_config
from pipeserve.core.nouns import RequestId
from pipeserve.core.policies import uniform
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.figures import RunningFigures
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.simulation.workloads import random_items
from pipeserve.stages.backends.cpu.library import kernels

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted([*BENCH.glob("*.py"), *BENCH.glob("*/*.py")])
OF_STAGES = {"loading_stage": "LOAD_S", "poisoned_stage": "POISON"}
"""Programs that a keeper starts, and nobody else, and what they take from the environment."""


def is_run(path: Path) -> bool:
    return path.stem not in OF_STAGES and '__name__ == "__main__"' in path.read_text()


@pytest.fixture
def run_script(monkeypatch):
    """Runs one in this process with these arguments; returns its exit code."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()

    def run(path: Path, *arguments: str) -> int | str | None:
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    yield run
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*filter(is_run, SCRIPTS)], ids=lambda path: path.name)
def test_it_answers_help(run_script, capsys, path):
    assert run_script(path, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: {path.name} ")
    description = ast.get_docstring(ast.parse(path.read_text()))
    assert path.parent != BENCH or " ".join(description.split()) in said


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_it_names_of_the_project_is_there(path):
    """In functions, too, and where something else is put in its place."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    owners = dict(imported(nodes))
    for node in nodes:  # an argument or a variable of the same name is something else
        if isinstance(node, ast.arg):
            owners.pop(node.arg, None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            owners.pop(node.id, None)
    missing = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in owners
        and not has(owners[node.value.id], node.attr)
    ]
    assert not missing


def imported(nodes: list[ast.AST]) -> Iterator[tuple[str, object]]:
    """Modules and classes of the project, by what the script calls them. Fails where one is not
    there."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeserve":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found = getattr(module, alias.name)
                if ismodule(found) or isclass(found):
                    yield alias.asname or alias.name, found


def has(owner: object, name: str) -> bool:
    annotated = isclass(owner) and any(
        name in vars(each).get("__annotations__", {}) for each in owner.__mro__
    )
    return hasattr(owner, name) or annotated


@pytest.mark.parametrize(("name", "variable"), OF_STAGES.items())
def test_what_a_stage_program_overrides_is_there(monkeypatch, name, variable):
    monkeypatch.setenv(variable, "1")
    (made,) = (
        each
        for each in vars(importlib.import_module(name)).values()
        if isclass(each) and each.__module__ == name
    )
    own = [each for each in vars(made) if not each.startswith("__")]
    assert own and all(hasattr(made.__base__, each) for each in own)


# ---- those that look into a driver, an engine or a stage ----------------------------------------

need_kernels = pytest.mark.skipif(kernels() is None, reason="no C kernels were compiled")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Scripts draw ids below 40,000."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_llama(folder, vocab_size=40_000, num_hidden_layers=2, max_position_embeddings=2048)


@contextmanager
def local_driver(model: str) -> Iterator[Driver]:
    options = {
        "model": model,
        "dtype": "float32",
        "pipeline_parallel_size": 2,
        "num_gpu_blocks_override": 256,
    }
    with Driver(checkpoint_setup(make_config({}, options)), fleet=LocalFleet) as driver:
        yield driver


@need_kernels
@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("microbatch_parts", ["--microbatches", "1", "--pair-rate", "1"], "prompts and decodes: "),
        ("stage_parts", ["--turns", "1"], "496 tokens, 16 decodes, float32: ms"),
        ("stage", ["--layers", "0:1", "--prefill", "8", "--seconds", "0.01"], "stage "),
    ],
)
def test_parts_of_a_stage(run_script, capsys, model, name, arguments, told):
    assert run_script(BENCH / f"{name}.py", model, *arguments) is None
    assert told in capsys.readouterr().out


def test_pauses(model):
    import pauses

    with local_driver(model) as driver:
        watch = pauses.Watch(driver)
        items = random_items([(8, 8)] * 4, 1, 1000, Random(0))
        run_items(driver, items, "", map(RequestId, count()))
    assert len(watch.between.cpu_s) > 8 and len(watch.planning.cpu_s) > 8
    assert sum(watch.num_results) > 8


def test_metrics_cost(model, monkeypatch):
    import metrics_cost

    monkeypatch.setattr(metrics_cost, "_MAX_TOKENS", 1000)
    with RunningFigures(2) as figures, local_driver(model) as driver:
        serving = metrics_cost.Serving(driver, figures)
        serving.begin(2)
        assert metrics_cost.resident_mib(figures._process.pid) > 0
        cpu_s, num_microbatches = serving.run(0.1, is_watched=True)
        assert cpu_s > 0 and num_microbatches > 1
        assert {"Planned", "Span"} <= {type(each).__name__ for each in serving.records(0.1)}
        assert metrics_cost.server_costs(driver, figures.latest())


def test_recording_cost(model, monkeypatch, capsys):
    import recording_cost

    monkeypatch.setattr(recording_cost, "Driver", partial(Driver, fleet=LocalFleet))
    flags = ["--rounds", "1", "--requests", "2", "--prompt", "4", "--output", "4"]
    monkeypatch.setattr(sys, "argv", ["recording_cost.py", model, *flags])
    recording_cost.main()
    assert "bytes of files a microbatch, of 2 stages" in capsys.readouterr().out


def test_learnt_costs(capsys, run_script):
    flags = ["--cells", "CPU", "--only", "the right", "--seeds", "1", "--minutes", "1"]
    assert run_script(BENCH / "learnt_costs.py", *flags) is None
    assert "| CPU PP2 | the right profile | " in capsys.readouterr().out


def test_learning_of_schedules(monkeypatch):
    import schedule_loads
    from schedule_cases import Case

    monkeypatch.setattr(schedule_loads, "LEARNING_S", 20.0)
    case = Case("TP4xPP2", "sharegpt", "uniform", (("max_num_batched_tokens", 2048),), 1.0)
    assert schedule_loads.learnt_after(case, None, 1.0) is not None


@pytest.mark.parametrize("row", WITHOUT)
def test_schedule_ablation(monkeypatch, row):
    for name, value in WITHOUT[row].items():
        *owners, last = name.split(".")
        monkeypatch.setattr(reduce(getattr, owners, uniform), last, value)
    assert at_once(None, seed=1, number=8).trial.output_tokens_per_s > 0


def test_growth():
    import growth

    cell = growth.measure(2, 10, 1)
    assert cell.plan_us > 0 and cell.message_bytes > 0


@pytest.mark.processes
def test_http_overhead(run_script, capsys, model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    byte_tokenizer(tmp_path)
    flags = ["-pp", "1", "--streams", "1", "--prompt", "4", "--output", "4", "--rounds", "1"]
    assert run_script(BENCH / "http_overhead.py", str(tmp_path), *flags) in (None, 0)
    assert "| no text |" in capsys.readouterr().out
