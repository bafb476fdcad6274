"""What launchers take on the hosts (hosts.py) that they start a job on: sshd, and Slurm."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hosts import Host

Service = Callable[[list[Host], Path], AbstractContextManager[None]]
"""While it is entered, it runs on these hosts; its files lie in the folder."""
_NOWHERE = subprocess.DEVNULL


def wait_for(is_so: Callable[[], bool], limit_s: float) -> bool:
    until_s = time.monotonic() + limit_s
    while not (so := is_so()) and time.monotonic() < until_s:
        time.sleep(0.05)
    return so


def no_service(hosts: list[Host], folder: Path) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextmanager
def ssh_between(hosts: list[Host], folder: Path) -> Iterator[None]:
    """Each lets the others in, without a question."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True)
    server = folder / "sshd_config"
    server.write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPermitRootLogin yes\n"
        "StrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )
    client = (
        f"IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    for host in hosts:
        host.write_etc("ssh/ssh_config", client)
        host.start(["/usr/sbin/sshd", "-D", "-f", str(server)], stderr=_NOWHERE)
    wait_for(lambda: all(host.running() for host in hosts), 10.0)
    time.sleep(0.5)
    yield


@contextmanager
def slurm_over(hosts: list[Host], folder: Path) -> Iterator[None]:
    """A cluster of them, whose controller is the first; all in it go by its configuration."""
    (folder / "slurm.conf").write_text(
        "ClusterName=hosts\n"
        f"SlurmctldHost={hosts[0].name}\n"
        "SlurmUser=root\n"
        f"AuthInfo=socket={folder}/munge.socket\n"
        "ProctrackType=proctrack/pgid\n"
        "TaskPlugin=task/none\n"
        "JobAcctGatherType=jobacct_gather/none\n"
        "MpiDefault=none\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\n"
        f"SlurmdPidFile={folder}/slurmd.%n.pid\n"
        f"StateSaveLocation={folder}/state\n"
        f"SlurmdSpoolDir={folder}/spool.%n\n"
        f"NodeName={','.join(host.name for host in hosts)} CPUs=2 State=UNKNOWN\n"
        "PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE\n"
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    folder.chmod(0o755)  # munged goes by it
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid",
             "log-file": "munge.log", "seed-file": "munge.seed"}  # fmt: skip
    named = [word for name, file in files.items() for word in (f"--{name}", str(folder / file))]
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munged = subprocess.Popen(["munged", "--foreground", "--force", *named], stderr=_NOWHERE)
    # A namespace has a /sys of its own, without control groups; slurmd looks, and uses none.
    slurmd = (
        "mount -t tmpfs none /sys/fs/cgroup && "
        "mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/freezer && exec slurmd -D"
    )
    try:
        hosts[0].start(["slurmctld", "-D"], stderr=_NOWHERE)
        for host in hosts:
            (folder / f"spool.{host.name}").mkdir()
            host.start(["sh", "-c", slurmd], stderr=_NOWHERE)
        wait_for(lambda: "idle" in hosts[0].run(["sinfo", "--noheader"]), 30.0)
        yield
    finally:
        munged.terminate()
        munged.wait()
        del os.environ["SLURM_CONF"]
