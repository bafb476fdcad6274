"""`pipeserve doctor`: what it finds of a run that loads nothing, and what it makes of that."""

import re
import socket
from dataclasses import replace
from itertools import combinations
from math import inf
from types import MappingProxyType, SimpleNamespace

import msgspec
import pytest
from checkpoints import tiny
from local_fleet import LocalFleet

from pipeserve.configs import make_config
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import plan_of, with_ranks
from pipeserve.driver import layer_choice
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.layout import usual_of
from pipeserve.launch import cli
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.launch.run.unloaded import without_weights
from pipeserve.launch.show.checkup import seams_table
from pipeserve.launch.verbs.checkup import check_up
from pipeserve.launch.verbs.doctor_checks import Seat, failures, notes, why_off
from pipeserve.machine import boot_id
from pipeserve.profiling.recording.recording import Ring
from pipeserve.profiling.simulation.measured_times import Seam
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.stage.checkup import CheckupCompute
from pipeserve.wire.control import Facts

FACTS = Facts(
    python="3.12.1",
    torch="2.10",
    pipeserve="0.1.0",
    kernels="C kernels (avx512)",
    cpus=(0,),
    num_threads=1,
    cpu_limit=inf,
    open_files=65536,
    shared_bytes=1 << 30,
)


def seats(*changes):
    """Of stages on hosts a and b, and what is different about each."""
    return [
        Seat(
            f"stage {stage}",
            change.pop("host", "ab"[stage % 2]),
            msgspec.structs.replace(FACTS, **{"cpus": (stage,), **change}),
            1.0,
        )
        for stage, change in enumerate(map(dict, changes))
    ]


@pytest.mark.parametrize(
    ("changes", "own", "said"),
    [
        (({}, {}), 65536, []),
        (
            ({}, {"torch": "2.9"}),
            65536,
            ["torch is not the same everywhere: 2.10 on a, 2.9 on b; install one version"],
        ),
        (({"python": "3.11.2"}, {}), 65536, ["python is not the same everywhere: 3.11.2 on a"]),
        (({}, {"open_files": 256}), 65536, ["stage 1 on b may have 256 files open, 1024 are"]),
        (({}, {}), 100, ["this process may have 100 files open, 1024 are needed; raise it with"]),
        (({"torch": ""}, {"torch": "2.9"}), 65536, []),  # a stage that computes without
    ],
)
def test_what_fails_is_a_line_each(changes, own, said):
    found = list(failures(seats(*changes), own))
    assert len(found) == len(said)
    for line, start in zip(found, said, strict=True):
        assert line.startswith(start) and "\n" not in line and ";" in line


SHARED = {"host": "a", "cpus": (0,)}


@pytest.mark.parametrize(
    ("config", "changes", "seconds", "said"),
    [
        ({}, ({}, {}), (1.0, 1.0), None),
        ({}, ({"host": "a"}, {"host": "a"}), (1.0, 1.4), None),
        ({"pipeline_parallel_size": 1}, ({},), (1.0,), "there is one stage; give -pp 2 or more"),
        ({"max_num_seqs": 1}, ({}, {}), (1.0, 1.0), "--max-num-seqs 1 is fewer requests than the"),
        ({"pipeline_window": 1}, ({}, {}), (1.0, 1.0), "--pipeline-window 1 is one microbatch"),
        ({}, (SHARED, SHARED), (1.0, 1.0), "the 2 stages on a share one core, and take turns"),
        (
            {},
            ({"host": "a", "cpu_limit": 1.0}, {"host": "a", "cpu_limit": 1.0}),
            (1.0, 1.0),
            "the 2 stages on a share one core",
        ),
        ({"device": "cuda"}, (SHARED, SHARED), (1.0, 1.0), None),  # its GPUs compute, not the core
        ({}, ({}, {}), (1.0, 9.0), "stage 1 takes 90% of the time of decodes, so the others"),
    ],
)
def test_why_stages_would_not_work_at_the_same_time(config, changes, seconds, said):
    run = make_config({}, {"model": "m", "pipeline_parallel_size": 2, **config})
    plan = replace(plan_of([4] * len(seconds)), window=run.pipeline_window or len(seconds))
    found = list(why_off(run, plan, seats(*changes), {"decodes": seconds}))
    assert [line[: len(said)] for line in found] == [said] if said else not found


def test_what_is_no_failure_is_said_too():
    run = make_config({}, {"model": "m", "pipeline_parallel_size": 2, "max_num_seqs": 64})
    plan = plan_of([4, 4])
    assert not list(notes(seats({}, {}), run, plan))
    others = seats({"kernels": "C kernels (avx2)"}, {"host": "b", "cpu_limit": 0.5})
    others[0] = others[0]._replace(cpu_share=0.5)
    kernels, robbed, quota = notes(others, run, plan)
    assert kernels.startswith("layers are computed by C kernels (avx2) on a, C kernels (avx512) on")
    assert robbed.startswith("stage 0 on a got 50% of its core")
    assert quota.startswith("a quota lets 0.5 CPUs run on b, where 1 stages are")


def test_ranks_that_add_up_over_the_network_are_said():
    """Four ranks on hosts a, b, a, b: those of each stage lie apart."""
    flags = {"model": "m", "pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    run, plan = make_config({}, flags), with_ranks(plan_of([4, 4]), 2)
    first, second = notes(seats({}, {}, {}, {}), run, plan)
    assert first.startswith("the ranks of stage 0 are on a, b: every layer adds up what they")
    assert second.startswith("the ranks of stage 1 are on a, b:")
    together = [{"host": "a"}, {"host": "a"}, {"host": "b"}, {"host": "b", "cpu_limit": 1.0}]
    (quota,) = notes(seats(*together), run, plan)
    assert quota.startswith("a quota lets 1 CPUs run on b, where 2 ranks are")


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_run_that_is_well_and_one_that_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIPESERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layer_choice, "EXAMINE_S", 0.1)
    folder = tiny("llama", tmp_path)
    doctor = ["doctor", folder, "-pp", "2"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = cli.main([*doctor, "--pipeline-layers", "auto", "--port", "0"])
        well = capsys.readouterr()
        ill_code = cli.main([*doctor, "--num-gpu-blocks-override", "9" * 8, "--port", port])
        ill = capsys.readouterr()
    assert code == 0, well.err
    assert "all checks pass" in well.out and "pipelining is " in well.out
    for seam in ("stage 0 → 1", "stage 1 → 0, tokens"):
        assert re.search(rf"{seam}.*\d ms", well.out)
    assert re.search(r"predicted: [\d,]+ output tokens/s, stages idle \d+% of the time", well.out)
    assert "plan: 4 layers over 2 stages, by times measured now" in well.err
    assert ill_code == 1
    failed = [line for line in ill.out.splitlines() if line.startswith("fails: ")]
    assert len(failed) == 2
    assert re.search(r"weights take \d+ bytes and \d+ KV blocks \d+, and .* free; give", failed[0])
    assert port in failed[1] and "; " in failed[1]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["nowhere", "--device", "emulated"], "device is emulated: there is nothing to look at"),
        (["nowhere", "-pp", "2", "--pipeline-layers", "Et|t"], "it has to end with L, the head"),
        ([], "no model"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(arguments, said, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    found = capsys.readouterr()
    assert not found.out
    (line,) = found.err.splitlines()
    assert line.startswith("error: ") and said in line


class Checked(LocalFleet):
    """Whose last stage is on another machine, by what its keeper says."""

    boot_ids = MappingProxyType({0: boot_id(), 1: "another"})

    def compute_of(self, job, tell):
        return CheckupCompute(job, tell)


def test_the_clock_of_another_machine_is_measured(tmp_path, monkeypatch):
    """It is this one's, so that what is found has to be around 0."""
    monkeypatch.setattr(layer_choice, "EXAMINE_S", 0.05)
    options = {"model": tiny("llama", tmp_path), "pipeline_parallel_size": 2}
    config = make_config({}, {**options, "dtype": "float32", "heartbeat_interval": 0.2})
    lacks, ring = [], Ring()
    setup = without_weights(checkpoint_setup(config), lacks)
    with Driver(setup, record=ring.record, fleet=Checked) as driver:
        found = check_up(driver, ring, lacks)
    assert not lacks and found.clocks[0] == (0.0, 0.0)
    ahead_s, within_s = found.clocks[1]
    assert abs(ahead_s) <= within_s
    (seam,) = found.seams
    assert seam.latency_s > 0 and seam.bytes_per_s > 0
    assert [len(seconds) for seconds in found.work_s] == [2, 2]
    assert all(0 < share <= 1 for share in found.forecast.busy)


# ---- emulated stages ----------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("slow", [1, 3])
def test_one_emulated_stage_is_slower_and_the_cut_is_the_best_there_is(slow):
    """Against every cut of 32 layers into 4 stages, by what those stages take."""
    slowdown = tuple(1.5 if stage == slow else 1.0 for stage in range(4))
    config = make_config(
        {},
        {
            "model": "llama2-7b",
            "device_profile": "a100-80gb-dgx",
            "max_model_len": 1024,
            "pipeline_parallel_size": 4,
            "device": "emulated",
            "pipeline_layers": "auto",
            "stage_slowdown": slowdown,
        },
    )
    setup = emulated_setup(config)
    plan = emulated_setup(replace(config, pipeline_layers=None)).plan
    unaware = [stage.num_layers for stage in plan.stages]
    with Driver(setup) as driver:
        found = [stage.num_layers for stage in driver.plan.stages]
        assert driver.setup.layers_by == "by times measured now"
        assert [stage.num_layers for stage in driver.stages] == found
    run = simulated_run(config)
    times = ProfiledTimes(run.profile, run.shape, run.plan, 1, config.seed, slowdown)
    parts = [times.parts(usual_of(config, 1024), stage) for stage in range(4)]

    def slowest(counts):
        seconds = [part.host + n * part.layers[0] for part, n in zip(parts, counts, strict=True)]
        return max(seconds[0] + parts[0].embedding, *seconds[1:3], seconds[3] + parts[3].head)

    cuts = combinations(range(1, 32), 3)
    best = min(slowest((a, b - a, c - b, 32 - c)) for a, b, c in cuts)
    assert slowest(found) == pytest.approx(best)
    assert slowest(unaware) > 1.2 * best and found[slow] < unaware[slow]


def test_activations_take_what_is_sent_of_them():
    """1,000 tokens of 576 numbers, float32 where the weights are bfloat16, over 1 MB/s."""
    shape = replace(load_shape("smollm2-135m"), bytes_per_value=2)
    keepers = [SimpleNamespace(host="here", boot_id="this")] * 2
    driver = SimpleNamespace(
        shape=shape, plan=plan_of([15, 15]), fleet=SimpleNamespace(keepers=keepers)
    )
    seam = Seam(latency_s=0.0, bytes_per_s=1e6)
    table = seams_table(driver, [seam], [(0.0, 0.0)] * 2, 0.0, 1000)
    assert next(table.columns[-1].cells) == "2304.00 ms"
