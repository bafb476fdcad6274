"""A launched job: every launcher's place is found, one command a machine starts all, all end."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import pytest
from checkpoints import greedy_tokens, tiny_llama

from pipeserve.configs import make_config
from pipeserve.driver.spawned_keepers import OwnRanks
from pipeserve.errors import ConfigError
from pipeserve.launch import cli
from pipeserve.launch.job import meeting
from pipeserve.launch.job.addresses import address_of, leaders_address
from pipeserve.launch.job.keepers import RankKeepers
from pipeserve.launch.job.meeting import Meeting, find_meeting
from pipeserve.launch.job.options import JobOptions
from pipeserve.launch.job.place import Place, expand_counts, find_place, first_host, own_port
from pipeserve.launch.job.ranks import ranks_of
from pipeserve.wire.secret import VARIABLE

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "left",
         "MASTER_PORT": "29500"}  # fmt: skip
TORCHRUN = TORCH | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = TORCH | {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77",
         "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
         "SLURM_STEP_NODELIST": "gpu[03-04]"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
LWS = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "left"}
# Of the daemon that mpirun starts on each machine by srun.
STEP_OF_DAEMON = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
RANK_5 = (5, 8, 1, 4)


@pytest.mark.parametrize(
    ("environment", "launcher", "numbers", "leader"),
    [
        (TORCHRUN, "torchrun", RANK_5, "left"),
        (TORCHRUN | SLURM, "torchrun", RANK_5, "left"),
        (DEEPSPEED, "DeepSpeed", RANK_5, "left"),
        (TORCH, "RANK and WORLD_SIZE", (5, 8, 1, 1), "left"),
        (SLURM, "Slurm", RANK_5, "gpu03"),
        (OPEN_MPI, "MPI", RANK_5, ""),
        (OPEN_MPI | STEP_OF_DAEMON, "MPI", RANK_5, ""),
        (MPICH, "MPI", RANK_5, ""),
        (MPICH | STEP_OF_DAEMON, "MPI", RANK_5, ""),
        (LWS, "LeaderWorkerSet", (1, 2, 0, 1), "left"),
        (LWS | TORCHRUN, "torchrun", RANK_5, "left"),
    ],
)
def test_every_launcher(environment, launcher, numbers, leader):
    place = find_place(environment)
    assert (place.launcher, place[1:5], place.leader) == (launcher, numbers, leader)
    assert place.num_machines == (8 if launcher.startswith("RANK") else 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        {**{name: SLURM[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")},
         "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"},  # a script of sbatch
        SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"PMI_RANK": "0", "PMI_SIZE": "8"},
    ],
)  # fmt: skip
def test_no_job(environment):
    assert find_place(environment) is None


def test_slurms_lists():
    """NVIDIA/enroot#93: `1(x2)` was read as a number. Names: pytorch-lightning#14896 (cut at the
    first comma), #5160 (no numbers), #1943 (a dash), oumi#2015 (a list in its middle)."""
    hosts = {"a": "a", "a,b": "a", "gpu[03-12,15],x": "gpu03", "n[7]": "n7", "n[1-2]-ib": "n1-ib",
             "linux[1,2]": "linux1", "jean-zay-ia810,x": "jean-zay-ia810",
             "g100n[040-041]": "g100n040", "rack[2-3]n[05,07]": "rack2n05",
             "[1-2]x": "1x"}  # fmt: skip
    assert {given: first_host(given) for given in hosts} == hosts
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]


def test_the_launchers_own_port_is_never_taken():
    assert all(own_port(port) != port and 20000 <= own_port(port) < 30000 for port in range(65536))


def test_ranks_come_out_even():
    assert ranks_of(Place("", 1, 2, 0, 1), 8) == OwnRanks(range(4, 8), 8, 0, 4)
    assert ranks_of(Place("", 5, 8, 1, 4), 8) == OwnRanks(range(5, 6), 8, 1, 4)
    assert ranks_of(Place("", 3, 4, 1, 2), 8) == OwnRanks(range(6, 8), 8, 2, 4)
    with pytest.raises(ConfigError, match=r"torchrun has 3 processes, .* has 4 ranks"):
        ranks_of(Place("torchrun", 0, 3, 0, 3), 4)


# ---- where they meet ----------------------------------------------------------------------------


def meet(place, interface=None, **flags):
    return find_meeting(place, make_config({}, {"model": "m", **flags}), interface)


def test_one_machine_needs_no_secret():
    here = Place("torchrun", 1, 2, 1, 2, "host", 21000)
    assert meet(here) == Meeting("127.0.0.1:21000", b"")
    by_hand = Place("--nnodes", 1, 2, 0, 1, "localhost", 21000)
    assert meet(by_hand) == Meeting("127.0.0.1:21000", b"")


def test_several_machines_need_a_secret(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    there = Place("torchrun", 4, 8, 0, 4, "leader", 21000)
    with pytest.raises(ConfigError) as error:
        meet(there)
    made = subprocess.run(meeting.MAKE_SECRET, shell=True, capture_output=True, text=True)
    assert meeting.MAKE_SECRET in str(error.value) and len(made.stdout.strip()) == 64
    monkeypatch.setenv(VARIABLE, "known")
    assert meet(there) == Meeting("leader:21000", b"known")
    assert meet(there, control="other:5") == Meeting("other:5", b"known")


def test_the_leader_listens_where_others_reach_it(monkeypatch):
    """pytorch#73656, pytorch#76367: the leader's own idea of its name is not the others'. A network
    of its own has no default route (dispy#98, chapel#14581); every machine may have the same
    docker0 (mesh-llm#542), and then somebody has to say which it is."""
    monkeypatch.setenv(VARIABLE, "known")
    monkeypatch.setattr(socket, "getaddrinfo", _addresses({"leader": ["127.0.1.1", "10.9.9.9"]}))
    monkeypatch.setattr("pipeserve.launch.job.addresses._is_own", lambda one: one == "10.9.9.9")
    leader = Place("torchrun", 0, 8, 0, 4, "leader", 21000)
    assert meet(leader).control == "10.9.9.9:21000"  # Debian's 127.0.1.1 is for itself
    assert meet(leader, interface="10.8.8.8").control == "10.8.8.8:21000"
    monkeypatch.setattr("pipeserve.launch.job.addresses._source_towards", lambda one: "")
    interfaces = {"lo": "127.0.0.1", "eth0": "10.9.9.9"}
    monkeypatch.setattr("pipeserve.launch.job.addresses._interfaces", lambda: list(interfaces))
    monkeypatch.setattr("pipeserve.launch.job.addresses.address_of_interface", interfaces.get)
    assert leaders_address("unknown") == "10.9.9.9"
    interfaces["docker0"] = "172.17.0.1"
    with pytest.raises(ConfigError, match="give --interface"):
        leaders_address("unknown")


def test_a_leader_that_is_localhost_to_itself_alone(monkeypatch):
    """kubeflow/trainer#2331: it would wait where nobody else can come."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(meeting, "leaders_address", lambda name: "10.9.9.9")
    pod = TORCH | {"RANK": "0", "MASTER_ADDR": "localhost", "LOCAL_RANK": "0"}
    assert meet(find_place(pod)).control == "127.0.0.1:29600"  # processes of one machine
    monkeypatch.setenv(VARIABLE, "known")
    assert meet(find_place(pod)) == Meeting("10.9.9.9:29600", b"known")
    here = find_place(pod | {"LOCAL_WORLD_SIZE": "8"})
    assert meet(here) == Meeting("127.0.0.1:29600", b"known")


def _addresses(known):
    real = socket.getaddrinfo

    def find(host, *more, **options):
        if host in known:
            return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in known[host]]
        if host in ("unknown", "leader"):
            raise socket.gaierror(-2, "unknown")
        return real(host, *more, **options)

    return find


def test_interfaces_by_name():
    assert address_of("lo") == "127.0.0.1"
    assert address_of("::1") == "::1"
    with pytest.raises(ConfigError, match=r"there are .*lo.* here"):
        address_of("nothere0")


def test_mpi_tells_the_meeting(monkeypatch):
    told = []
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(meeting.mpi, "broadcast", lambda value: told.append(value) or value)
    found = meet(Place("MPI", 0, 2, 0, 2))
    assert told == [(found.control, found.secret)] and len(found.secret) == 64
    assert found.control.startswith("127.0.0.1:")
    # What is wrong at the leader is heard by all who wait for it at the broadcast.
    monkeypatch.setattr(meeting, "leaders_address", _raise)
    with pytest.raises(ConfigError, match="no address"):
        meet(Place("MPI", 0, 2, 0, 1))
    assert told[-1] == "no address"


def _raise(name):
    raise ConfigError("no address")


# ---- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"node_rank": 1}, "for several machines"),
        ({"headless": True}, "for several machines"),
        ({"nnodes": 2}, "give --node-rank, 0 to 1"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, "must be 0 to 1"),
        ({"nnodes": 2, "node_rank": 0, "headless": True}, "--node-rank 0 runs the driver"),
        ({"nnodes": 2, "node_rank": 1}, "give --master-addr"),
        ({"nnodes": 2, "node_rank": 1, "master_addr": "a", "master_port": 0}, "1 to 65535"),
        ({"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"}, "takes a secret"),
        ({"nnodes": 3, "node_rank": 1, "master_addr": "localhost"}, "3 processes, and the pipe"),
    ],
)
def test_flags_that_are_wrong(flags, said, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    words = ["generate", "m", "-pp", "4", "--prompt", "x"]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0"])
def test_launchers_that_pass_the_local_rank(flag, capsys):
    """DeepSpeed#1291: scripts that do not know the argument end by it."""
    assert cli.main([flag, "serve", "--help"]) == 0
    assert "--nnodes" in capsys.readouterr().out


def test_an_environment_that_makes_no_sense(monkeypatch, capsys):
    for name, value in (TORCHRUN | {"WORLD_SIZE": "many"}).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["generate", "m", "--prompt", "x"]) == 2
    assert "give --launcher spawn" in capsys.readouterr().err


def test_a_place_by_hand():
    options = JobOptions(node_rank=1, master_addr="a")
    assert options.place_by_hand(2)[:6] == ("--nnodes", 1, 2, 0, 1, "a")
    assert JobOptions().place_by_hand(1) is None


# ---- all of it ----------------------------------------------------------------------------------

TOKENS = [[3, 5, 7], [9, 11]]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Words of a command, and the tokens that are to come of it."""
    folder = tmp_path_factory.mktemp("job")
    model = tiny_llama(folder / "model")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in TOKENS))
    sampling = ["--temperature", "0", "--ignore-eos", "--max-tokens", "6", "--dtype", "float32"]
    words = ["generate", model, "-pp", "2", "--prompts", str(prompts), *sampling]
    return ["pipeserve", *words], greedy_tokens(model, TOKENS, 6)


@pytest.fixture
def started():
    """Starts a command; what still runs at the end is killed."""
    processes = []

    def start(words, **environment):
        process = subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def tokens_in(out):
    results = sorted(map(json.loads, out.splitlines()), key=itemgetter("index"))
    return [result["token_ids"] for result in results]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def nothing_is_left(port):
    """Of the keepers that were told to join there."""
    return wait_for(lambda: not keepers_of(port))


def wait_for(found, wait_s=20.0):
    until_s = time.monotonic() + wait_s
    while not found() and time.monotonic() < until_s:
        time.sleep(0.02)
    return found()


def keepers_of(port):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if f"127.0.0.1:{port}".encode() in words:
                found.append(folder.name)
    return found


@pytest.mark.processes
def test_torchrun_starts_all(job, started):
    words, expected = job
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = started([*torchrun, "--master-port", str(port), "-m", *words])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert tokens_in(out) == expected
    assert f"keepers join 127.0.0.1:{own_port(port)}" in err
    assert nothing_is_left(own_port(port))


def by_hand(words, port, log_dir=None):
    """Both commands, on one machine."""
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    more = [] if log_dir is None else ["--log-dir", str(log_dir)]
    for rank, headless in ((0, []), (1, ["--headless"])):
        yield [sys.executable, "-m", *words, *place, "--node-rank", str(rank), *headless, *more]


@pytest.mark.processes
def test_one_command_a_machine_by_hand(job, started, tmp_path):
    words, expected = job
    port = free_port()
    leader, other = (started(each) for each in by_hand(words, port, tmp_path))
    out, err = leader.communicate(timeout=120)
    assert leader.returncode == 0, err
    assert tokens_in(out) == expected
    assert other.communicate(timeout=30)[0] == "" and other.returncode == 0
    assert nothing_is_left(port)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.processes
def test_a_machine_that_never_comes_is_named(job, started):
    words, _ = job
    port = free_port()
    leader, _ = by_hand(words, port)
    process = started([*leader, "--join-timeout", "2"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert f"no keeper of rank 1 (of machine 1 of 0 to 1) joined 127.0.0.1:{port} within 2 s" in err
    assert nothing_is_left(port)


@pytest.mark.processes
def test_a_leader_that_fails_before_it_listens_tells_the_others(job, started):
    """They would look for it for two minutes. (On one machine, that the leader says why is enough;
    on others they say it, too: bench/launchers.py.)"""
    words, _ = job
    port = free_port()
    leader, other = by_hand(words, port)
    waiting = started(other)
    wait_for(lambda: keepers_of(port))
    failing = started([*leader, "--prompt", "and --prompts"])
    assert failing.wait(timeout=60) == 2
    assert waiting.wait(timeout=10) == 1
    assert "give one of --prompt" in failing.communicate()[1].splitlines()[-1]
    assert nothing_is_left(port)


@pytest.mark.processes
def test_whoever_is_ended_leaves_nothing(job, started, tmp_path):
    """By SIGTERM, while it looks for its leader."""
    words, _ = job
    port = free_port()
    _, other = by_hand(words, port, tmp_path)
    process = started(other)
    wait_for(lambda: keepers_of(port))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert nothing_is_left(port)


@pytest.mark.processes
def test_a_keeper_that_is_killed_is_started_again(tmp_path, capsys):
    """And what keepers say has their rank ahead of it, and is kept."""
    port = free_port()
    own, more = OwnRanks(range(3, 4), 4, 1, 2), ["--join-timeout", "4"]
    keepers = RankKeepers(own, f"127.0.0.1:{port}", b"", more, str(tmp_path))
    try:
        (first,) = wait_for(lambda: keepers_of(port))
        os.kill(int(first), signal.SIGKILL)
        wait_for(lambda: set(keepers_of(port)) - {first})
        assert keepers.wait() == 1 and keepers.exit_codes == {3: 1}
    finally:
        keepers.end()
    restarted, late = capsys.readouterr().err.splitlines()
    prefix = f"[rank 3, {socket.gethostname()}] "
    assert restarted.startswith(f"{prefix}warning: its keeper was killed")
    assert late.startswith(
        f"{prefix}error: keeper of rank 3: no driver at 127.0.0.1:{port} within 4 s"
    )
    assert (tmp_path / "rank-3.log").read_text().splitlines()[1] == late.removeprefix(prefix)


@pytest.mark.processes
def test_inside_another_job(job, started, tmp_path):
    """As a training job does: every rank enters it, rank 0 has the Python API."""
    words, expected = job
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import pipeserve
        options = dict(pipeline_parallel_size=2, dtype="float32")
        for round in range(2):
            with pipeserve.launched({words[2]!r}, **options) as job:
                if job.leads:
                    with pipeserve.LLM(**job.keywords) as llm:
                        params = pipeserve.SamplingParams(
                            temperature=0, max_tokens=6, ignore_eos=True)
                        done = llm.generate({TOKENS!r}, params)
                    print([list(each.token_ids) for each in done], flush=True)
                else:
                    assert job.wait() == 0
""")
    )
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    ranks = [
        started([sys.executable, str(script)], RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"
    ]
    (out, err), (nothing, other_err) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], err + other_err
    assert out.splitlines() == [str(expected)] * 2 and nothing == ""
