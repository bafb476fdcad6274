"""`pipeserve calibrate` on real stages of a tiny model, and a simulation on its profile."""

import json

import pytest
from checkpoints import tiny_llama

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.launch import cli
from pipeserve.launch.verbs.calibrate import measured_run
from pipeserve.machine import device_name


def error(capsys, arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.processes
def test_a_profile_of_real_stages_simulates_their_model(checkpoint, tmp_path, capsys):
    profile_path, json_path = tmp_path / "p.yaml", tmp_path / "r.json"
    run = [str(checkpoint), "-pp", "2", "--dtype", "float32"]
    assert cli.main(["calibrate", *run, "--output", str(profile_path)]) == 0
    assert f"{profile_path}: {device_name()}" in capsys.readouterr().out

    profile = load_profile(str(profile_path))
    assert profile.name == device_name()
    assert profile.tables.dtype == "float32"
    assert profile.tables.model == str(checkpoint)
    assert profile.control_s > 0
    assert max(seconds for _, seconds in profile.tables.layer) > 0

    workload = ["--workload", "azure-conv", "--scale", "60", "--num-prompts", "5"]
    simulate = ["simulate", *run, *workload, "--device-profile", str(profile_path)]
    assert cli.main([*simulate, "--json", str(json_path)]) == 0
    assert json.loads(json_path.read_text())["requests"] == 5

    # On real stages the same profile is the engine's cost model, and is refused for another type.
    bench = ["bench", *run, *workload, "--device-profile", str(profile_path)]
    assert cli.main(bench) == 0
    capsys.readouterr()
    other = [*bench, "--dtype", "bfloat16"]
    assert "for dtype float32, not bfloat16" in error(capsys, other)


@pytest.mark.processes
def test_a_profile_of_another_machine_is_refused_on_real_stages(checkpoint, capsys):
    bench = ["bench", checkpoint, "--device-profile", "a100-80gb-dgx"]
    assert f"not {device_name()}" in error(capsys, bench)


def test_an_old_profile_is_not_overwritten(checkpoint, tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text("mine")
    assert "exists; give --overwrite" in error(capsys, ["calibrate", checkpoint, "--output", path])
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "layers"),
    [(30, 2, (20, 10)), (30, 3, (16, 7, 7)), (4, 4, (1, 1, 1, 1)), (5, 4, (2, 1, 1, 1))],
)
def test_calibrated_stages_differ_by_layers(num_layers, num_stages, layers):
    config = RunConfig(model="m", pipeline_parallel_size=num_stages)
    assert measured_run(config, num_layers).pipeline_layers == layers


def test_listed_layers_and_a_lone_stage_stay_as_they_are():
    listed = RunConfig(model="m", pipeline_parallel_size=2, pipeline_layers=(3, 3))
    assert measured_run(listed, 6).pipeline_layers == (3, 3)
    assert measured_run(RunConfig(model="m"), 6).pipeline_layers is None
