"""Cores and threads of stages, on made-up machines; what OpenMP is told in a stage."""

import os
import subprocess
import sys

import pytest

from pipeserve.cpus import cores_of
from pipeserve.stage.placement import most_threads, place_of, stage_environment
from pipeserve.stages.devices import best_num_threads
from pipeserve.wire.secret import VARIABLE


@pytest.fixture
def machine(tmp_path):
    """Makes /sys of one: `siblings` are the kernel's words for each core, `nodes` likewise."""

    def make(siblings, nodes=()):
        system = tmp_path / "sys/devices/system"
        for text in siblings:
            for cpu in cpus_of(text):
                folder = system / f"cpu/cpu{cpu}/topology"
                folder.mkdir(parents=True)
                (folder / "thread_siblings_list").write_text(f"{text}\n")
        for number, text in enumerate(nodes):
            folder = system / f"node/node{number}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(f"{text}\n")
        return tmp_path

    return make


def cpus_of(text):
    bounds = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [cpu for ends in bounds for cpu in range(ends[0], ends[-1] + 1)]


def places(cores, ranks, quota=10**6, most=None):
    return [place_of(cores, quota / ranks, rank, ranks, most) for rank in range(ranks)]


def single(number):
    """Cores of one thread each."""
    return [(cpu,) for cpu in range(number)]


TWO_SOCKETS = ([f"{cpu},{cpu + 120}" for cpu in range(120)], ["0-59,120-179", "60-119,180-239"])


def test_stages_of_two_sockets_share_no_core_and_stay_on_a_node(machine):
    """Equal parts of the numbers 0 to 239 would give stages 0 and 2 the two threads of the same
    cores (vllm#43240: node 0 is 0-59,120-179)."""
    cores = cores_of(range(240), machine(*TWO_SOCKETS))
    got = [place.cpus for place in places(cores, 4)]
    assert got == [list(range(first, first + 29)) for first in (0, 30, 60, 90)]


def test_nodes_whose_cores_are_numbered_in_turn(machine):
    """As many servers do; sglang#26983 asks the kernel, too, which cores are near."""
    cores = cores_of(range(8), machine(map(str, range(8)), ["0,2,4,6", "1,3,5,7"]))
    assert [place.cpus for place in places(cores, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_fewer_stages_than_nodes(machine):
    """Or as many (vllm#35789: it would not start then); each on as few as hold its cores."""
    nodes = [f"{first}-{first + 3}" for first in (0, 4, 8, 12)]
    cores = cores_of(range(16), machine(map(str, range(16)), nodes))
    for ranks, most in ((1, 4), (2, 2), (4, 1)):
        got = [{cpu // 4 for cpu in place.cpus} for place in places(cores, ranks)]
        assert [len(nodes) for nodes in got] == [most] * ranks


def test_only_cores_that_this_process_may_use_count(machine):
    """Two instances on a node each (vllm#43240); vLLM gave KV transfer a core outside (#58033)."""
    second = cores_of(cpus_of("60-119,180-239"), machine(*TWO_SOCKETS))
    assert [place.cpus for place in places(second, 2)] == [
        list(range(60, 89)),
        list(range(90, 119)),
    ]


@pytest.mark.parametrize(
    ("siblings", "cpus", "cores"),
    [
        (["0-1", "2-3", "4-5"], range(6), [(0, 1), (2, 3), (4, 5)]),  # llmman#331, llama.cpp#19110
        (["0,4", "1,5", "2,6", "3,7"], [2, 4, 6], [(2, 6), (4,)]),  # cores in part
        (["0", "1", "2", "3", "4"], [2, 4], [(2,), (4,)]),  # yalantinglibs#1215
        (["0-7", "8-15"], range(16), [tuple(range(8)), tuple(range(8, 16))]),  # POWER
        ([], [0, 1, 3], [(0,), (1,), (3,)]),  # hidden, as by gVisor
    ],
)
def test_which_cpus_are_of_one_core(machine, siblings, cpus, cores):
    assert cores_of(cpus, machine(siblings)) == cores


def test_what_the_kernel_does_not_say_well_is_not_said(machine):
    root = machine(["0-1", "2"], ["0-2", "3-4"])
    (root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list").write_text("zero\xff")
    (root / "sys/devices/system/node/node1/cpulist").write_text("")
    assert cores_of([0, 1, 2], root) == [(0, 1), (2,)]


def test_this_machine():
    cpus = os.sched_getaffinity(0)
    assert sorted(cpu for core in cores_of(cpus) for cpu in core) == sorted(cpus)


@pytest.mark.parametrize(
    ("cores", "cpus", "ranks", "shares", "threads"),
    [
        (2, 2, 1, [[0, 1]], 2),
        (2, 2, 2, [[0], [1]], 1),
        (5, 5, 2, [[0, 1], [2, 3]], 2),
        (2, 2, 3, [[0, 1]] * 3, 1),
        (4, 3, 1, [[0, 1, 2, 3]], 3),
        (8, 5, 2, [[0, 1, 2, 3], [4, 5, 6, 7]], 2),
        (4, 1, 2, [[0, 1], [2, 3]], 1),
        (64, 2, 2, [list(range(31)), list(range(32, 63))], 1),
        (8, 8, 1, [list(range(8))], 8),
        (9, 9, 1, [list(range(8))], 8),  # one is left for the driver
        (19, 19, 2, [list(range(9)), list(range(9, 18))], 9),  # and here one is left over
    ],
)
def test_cores_and_threads_are_shared_out_evenly(cores, cpus, ranks, shares, threads):
    """Cores disjoint or all of them; threads no more than there is CPU time for (ollama#17916)."""
    got = places(single(cores), ranks, cpus)
    assert got == [(share, threads) for share in shares]


def test_with_fewer_cores_than_stages_threads_of_one_core_are_better_than_none():
    assert places([(0, 2), (1, 3)], 2) == [([0], 1), ([1], 1)]
    assert places([(0, 2), (1, 3)], 3) == [([0], 1), ([2], 1), ([1], 1)]
    assert places([(0, 2), (1, 3)], 5) == [([0, 2, 1, 3], 1)] * 5


@pytest.mark.parametrize(
    ("environment", "most"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, None),
    ],
)
def test_a_user_may_want_fewer_threads(environment, most):
    """And torchrun's own OMP_NUM_THREADS=1 is not a user's (vllm#6109 sets the same)."""
    assert most_threads(environment) == most
    assert places(single(4), 1, most=most) == [([0, 1, 2, 3], most or 4)]


def test_a_stage_with_kernels_has_threads_where_they_are_worth_it(monkeypatch):
    """Others' work on one of two cores makes two threads slower than one (pytorch#80777)."""
    monkeypatch.setattr("pipeserve.stages.devices.kernels", lambda: object())
    assert [best_num_threads("cpu", "auto", most) for most in (1, 2, 3, 16)] == [1, 1, 3, 16]
    assert best_num_threads("cpu", "cpu", 2) == best_num_threads("cuda", "auto", 2) == 2
    monkeypatch.setattr("pipeserve.stages.devices.kernels", lambda: None)
    assert best_num_threads("cpu", "auto", 2) == 2


def test_openmp_moves_no_thread_of_a_stage():
    """By GOMP_CPU_AFFINITY all stages would compute on one CPU (pytorch#49971, #149422)."""
    users = {
        "GOMP_CPU_AFFINITY": "0-15",
        "OMP_PLACES": "cores",
        "OMP_PROC_BIND": "true",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "OMP_NUM_THREADS": "16",
        VARIABLE: "secret",
        "GOMP_SPINCOUNT": "7",
        "HOME": "/root",
    }
    assert stage_environment(users, 3, 1, 2) == {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "GOMP_SPINCOUNT": "7",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HOME": "/root",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "OMP_NUM_THREADS": "2",
    }
    assert int(stage_environment({}, 0, 0, 1)["GOMP_SPINCOUNT"]) <= 10_000  # not a millisecond


def test_a_stages_threads_stay_where_its_keeper_put_it():
    """What GOMP_CPU_AFFINITY does to a process with PyTorch, and that a stage is free of it."""
    cpu = max(os.sched_getaffinity(0))
    if cpu == 0:
        pytest.skip("CPU 0 alone may be used here")
    report = "import os, torch; torch.ones(9) + 1; print(sorted(os.sched_getaffinity(0)))"
    pinned = f"import os; os.sched_setaffinity(0, {{{cpu}}}); {report}"
    bound = {**os.environ, "GOMP_CPU_AFFINITY": "0"}
    environment = stage_environment(bound, 0, 0, 1)
    done = subprocess.run([sys.executable, "-c", pinned], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == f"[{cpu}]"


def test_a_stage_that_may_not_be_pinned_runs_all_the_same():
    """Where that is forbidden (vllm#10556, #45438: their own placing ended the worker in Docker),
    or a CPU was taken away (numactl#204)."""
    command = [sys.executable, "-m", "pipeserve.stage.process", str(os.getpid()), "1000", "this"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Zen of Python" in done.stdout
