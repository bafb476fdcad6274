"""Two hosts, two stages on each, one command a host: by every launcher the tokens of one process,
and no process is left behind, however the job ends.

    python bench/launchers.py [hand torchrun mpirun ...] [--ending done int term rank leader]

The hosts are network namespaces (hosts.py), which takes root, and of Debian openmpi-bin,
openssh-server, pdsh and slurm-wlm; what is missing is said, and not run. MPICH is taken from where
its `mpiexec.hydra` is found, such as the bin folder of an environment with PyPI's mpich. A job is
done; or the launcher gets Ctrl-C or SIGTERM; or one rank's process, or the leader's, is killed; or,
by hand, the other host's command never comes (launchers wait for that before they start anything).
"""

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from commands import one_of
from hosts import Host, Hosts, why_not
from services import Service, no_service, slurm_over, ssh_between, wait_for

STAGES, EACH = 4, 2
NUM_PROMPTS, MANY = 4, 5000
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
BESIDE = Path(sys.executable).parent
"""Where torchrun and deepspeed are."""
ENDINGS = ("done", "int", "term", "rank", "leader", "absent")
SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM}
UP_S, END_S = 180.0, 90.0
"""For a job to be up; and to be gone, for which launchers give their ranks 30 s."""
IS_RANK = re.compile(r"\S*python\S* (-u )?-m pipeserve ")

Commands = list[tuple[Host, list[str]]]
"""Of one job, the one that starts the leader first."""


class Launcher(NamedTuple):
    """How one starts a job on two hosts."""

    needs: tuple[str, ...]
    """Programs."""
    commands: Callable[[list[Host], list[str], Path], Commands]
    service: Service = no_service
    """That it takes on the hosts."""
    num_interrupts: int = 1
    """Ctrl-C, within a second, that end a job."""


def torchrun(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    place = ["--nnodes", "2", "--nproc-per-node", str(EACH), "--master-addr", "left"]
    return [
        (host, [str(BESIDE / "torchrun"), *place, "--node-rank", str(rank), "-m", *verb])
        for rank, host in enumerate(hosts)
    ]


def elastic(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    """torchrun that numbers its machines itself: the first one need not be where they meet
    (pytorch#137402)."""
    place = ["--nnodes", "2", "--nproc-per-node", str(EACH), "--rdzv-backend", "c10d"]
    place += ["--rdzv-endpoint", f"{hosts[-1].name}:29400", "--rdzv-id", "job"]
    return [(host, [str(BESIDE / "torchrun"), *place, "-m", *verb]) for host in hosts]


def by_hand(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    left, right = (
        [sys.executable, "-m", *verb, "--nnodes", "2", "--node-rank", str(rank)] for rank in (0, 1)
    )
    place = ["--master-addr", "left"]
    return [(hosts[0], [*left, *place]), (hosts[1], [*right, *place, "--headless"])]


def mpirun(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    where = ["--host", ",".join(f"{host.name}:{EACH}" for host in hosts), "-x", "PYTHONPATH"]
    return [(hosts[0], ["mpirun", "--allow-run-as-root", *where, sys.executable, "-m", *verb])]


def mpich(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    launcher = Path(shutil.which("mpiexec.hydra"))
    library = launcher.parents[1] / "lib" / "libmpi.so.12"
    where = ["-hosts", ",".join(host.name for host in hosts), "-ppn", str(EACH)]
    where += ["-n", str(STAGES), "-genv", "MPI4PY_LIBMPI", str(library)]
    return [(hosts[0], [str(launcher), *where, sys.executable, "-m", *verb])]


def deepspeed(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={EACH}\n" for host in hosts))
    return [(hosts[0], [str(BESIDE / "deepspeed"), "--hostfile", str(hostfile), "--module", *verb])]


def by_interface(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    """By hand, over the second network: the first one, which names lead to, is unplugged."""
    for host in hosts:
        host.pull_cable(0)
    words = [sys.executable, "-m", *verb, "--nnodes", "2", "--interface", "eth1"]
    leaders = (hosts[0].name, hosts[0].addresses[1])
    return [
        (host, [*words, "--node-rank", str(rank), "--master-addr", leaders[rank]])
        for rank, host in enumerate(hosts)
    ]


def srun(hosts: list[Host], verb: list[str], folder: Path) -> Commands:
    where = ["--nodes", str(len(hosts)), "--ntasks-per-node", str(EACH)]
    return [(hosts[0], ["srun", *where, sys.executable, "-m", *verb])]


LAUNCHERS = {
    "hand": Launcher((), by_hand),
    "interface": Launcher((), by_interface),
    "torchrun": Launcher((str(BESIDE / "torchrun"),), torchrun),
    "elastic": Launcher((str(BESIDE / "torchrun"),), elastic),
    "mpirun": Launcher(("mpirun", "sshd"), mpirun, ssh_between),
    "mpich": Launcher(("mpiexec.hydra", "sshd"), mpich, ssh_between),
    "deepspeed": Launcher((str(BESIDE / "deepspeed"), "pdsh", "sshd"), deepspeed, ssh_between),
    "srun": Launcher(("srun", "slurmctld", "slurmd", "munged"), srun, slurm_over, 2),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "launchers",
        nargs="*",
        type=one_of(LAUNCHERS),
        metavar="LAUNCHER",
        help=f"of {', '.join(LAUNCHERS)}; by default all",
    )
    parser.add_argument("--ending", nargs="*", choices=ENDINGS, default=ENDINGS)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"not run: {reason}")
        return 0
    expected = alone(arguments.model)
    num_wrong = 0
    for name in arguments.launchers or LAUNCHERS:
        launcher = LAUNCHERS[name]
        missing = [tool for tool in launcher.needs if shutil.which(tool) is None]
        if missing:
            print(f"{name:10} not run: there is no {', '.join(missing)}")
            continue
        for ending in arguments.ending:
            if ending == "absent" and name != "hand":
                continue
            began_s = time.monotonic()
            wrong = tried(launcher, arguments.model, ending, expected)
            num_wrong += bool(wrong)
            took_s = time.monotonic() - began_s
            print(f"{name:10} {ending:7} {took_s:6.1f} s  {wrong or 'as it should'}", flush=True)
    return min(num_wrong, 1)


def verb_of(model: str, stages: int, num_prompts: int, folder: Path) -> list[str]:
    """Its results have the ids of their tokens."""
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt_token_ids": [5 + number % 7, 9, 11]} for number in range(num_prompts)]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sampling = ["--temperature", "0", "--ignore-eos", "--max-tokens", "16"]
    run = ["--prompts", str(prompts), "--dtype", "float32", "-pp", str(stages)]
    return ["pipeserve", "generate", model, *sampling, *run]


def alone(model: str) -> list[list[int]]:
    """The tokens of one process that has all the layers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *verb_of(model, 1, NUM_PROMPTS, Path(folder))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return tokens_in(done.stdout)


def tokens_in(out: str) -> list[list[int]]:
    """Of each prompt, whatever else a launcher says there."""
    results = [
        json.loads(line.partition("{")[1] + line.partition("{")[2])
        for line in out.splitlines()
        if '"token_ids"' in line
    ]
    return [result["token_ids"] for result in sorted(results, key=itemgetter("index"))]


def tried(launcher: Launcher, model: str, ending: str, expected: list[list[int]]) -> str:
    """What went wrong; empty: nothing."""
    with tempfile.TemporaryDirectory() as name, Hosts("left", "right", networks=2) as both:
        folder, hosts = Path(name), list(both)
        with launcher.service(hosts, folder):
            mine = [host.running().keys() for host in hosts]
            num_prompts = NUM_PROMPTS if ending == "done" else MANY
            verb = verb_of(model, STAGES, num_prompts, folder)
            verb += ["--join-timeout", "4" if ending == "absent" else "30"]
            verb += ["--control-secret", str(secret_in(folder))]
            commands = launcher.commands(hosts, verb, folder)
            started = start(commands[:1] if ending == "absent" else commands, folder)
            wrong = end(launcher, hosts, started, ending, folder)
            left = what_is_left(hosts, mine)
            codes = [process.poll() for process in started]
            wrong = wrong or (
                f"left behind: {left}" if left else judge(ending, codes, folder, expected)
            )
            return f"{wrong}; exit codes {codes}\n{told(folder)}" if wrong else ""


def secret_in(folder: Path) -> Path:
    file = folder / "secret"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex())
    return file


def start(commands: Commands, folder: Path) -> list[subprocess.Popen]:
    """What each prints goes into files of its number."""
    started = []
    for number, (host, command) in enumerate(commands):
        with (
            (folder / f"{number}.out").open("wb") as out,
            (folder / f"{number}.err").open("wb") as err,
        ):
            started.append(
                host.start(
                    command,
                    cwd=folder,
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                )
            )
    return started


def end(
    launcher: Launcher,
    hosts: list[Host],
    started: list[subprocess.Popen],
    ending: str,
    folder: Path,
) -> str:
    """Bring the job to its end. Returns what kept it from one."""
    if ending not in ("done", "absent"):
        if not wait_for(lambda: "stages of" in (folder / "0.err").read_text(), UP_S):
            return "it did not come up"
        time.sleep(1.0)
        if ending in SIGNALS:
            for _ in range(launcher.num_interrupts if ending == "int" else 1):
                started[0].send_signal(SIGNALS[ending])
                time.sleep(0.2)
        else:
            host = hosts[0] if ending == "leader" else hosts[1]
            ranks = [pid for pid, words in host.running().items() if IS_RANK.match(words)]
            os.kill(min(ranks), signal.SIGKILL)
    limit_s = UP_S if ending in ("done", "absent") else END_S
    if not wait_for(lambda: all(process.poll() is not None for process in started), limit_s):
        return f"its commands still run after {limit_s:g} s"
    return ""


def judge(ending: str, codes: list[int], folder: Path, expected: list[list[int]]) -> str:
    """What is wrong with what it said at its end."""
    out, err = (folder / "0.out").read_text(), (folder / "0.err").read_text()
    if ending == "done":
        if any(codes):
            return "an exit code is not 0"
        if tokens_in(out) != expected:
            return "not the tokens of one process"
    elif codes[0] == 0:
        return "its exit code is 0"
    elif ending == "absent" and not re.search(r"ranks 2, 3 \(of machine 1 of 0 to 1\)", err):
        return "it does not say who is missing"
    return ""


def what_is_left(hosts: list[Host], others: list) -> dict[int, str]:
    """Of the job, in all hosts, a while after it has ended."""

    def left() -> dict[int, str]:
        return {
            pid: words
            for host, known in zip(hosts, others, strict=True)
            for pid, words in host.running().items()
            if pid not in known
        }

    wait_for(lambda: not left(), END_S)
    return left()


def told(folder: Path) -> str:
    return "\n".join(
        f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(folder.glob("?.*"))
    )


if __name__ == "__main__":
    sys.exit(main())
