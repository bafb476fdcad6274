"""Joining over two hosts whose networks and names are not as one would like, each as somebody has
reported it of another engine or launcher: the tokens have to come all the same, or it has to end
soon, with a line that says why.

    python bench/odd_networks.py [ipv6_alone no_ipv6 ...] [--model smollm2-135m]

The hosts are network namespaces (hosts.py), two stages each, one command a host.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import scenes
from hosts import Host, Hosts
from launchers import NUM_PROMPTS, by_hand, secret_in, start, tokens_in, verb_of
from services import wait_for

LIMIT_S = 240.0
ADDRESSES = {"left": "fd00::1", "right": "fd00::2"}
Scene = Callable[["Job"], str]
"""What is wrong; empty: nothing."""


class Job:
    """`generate` on both hosts, of which a scene changes something first."""

    def __init__(self, left: Host, right: Host, folder: Path, model: str) -> None:
        self.left, self.right, self.folder = left, right, folder
        self.verb = verb_of(model, 4, NUM_PROMPTS, folder)
        self.verb += ["--control-secret", str(secret_in(folder)), "--join-timeout", "60"]
        self.leader = "left"
        """What the other host is told that it is called."""

    def start(self) -> list[subprocess.Popen]:
        commands = by_hand([self.left, self.right], self.verb, self.folder)
        return start([(host, self._named(words)) for host, words in commands], self.folder)

    def _named(self, words: list[str]) -> list[str]:
        place = words.index("--master-addr") + 1
        return [*words[:place], self.leader, *words[place + 1 :]]

    def done(self, started: list[subprocess.Popen] | None = None) -> str:
        """It has to be, with a result for each prompt."""
        started = started or self.start()
        wait_for(lambda: all(process.poll() is not None for process in started), LIMIT_S)
        codes = [process.poll() for process in started]
        results = tokens_in((self.folder / "0.out").read_text())
        if any(codes) or len(results) != NUM_PROMPTS:
            return f"exit codes {codes}, {len(results)} results"
        return ""


def ipv6_alone(job: Job) -> str:
    """sglang#7478, pytorch#107563, vllm#18986: addresses of IPv6 are cut at their colons."""
    for host in (job.left, job.right):
        within(host, "ip", "-6", "address", "add", f"{ADDRESSES[host.name]}/64", "dev", "eth0",
               "nodad")  # fmt: skip
        within(host, "ip", "-4", "address", "flush", "dev", "eth0")
    job.leader = ADDRESSES["left"]
    return job.done()


def no_ipv6(job: Job) -> str:
    """pytorch#121807, sglang#294: nothing starts where the kernel has it switched off."""
    for host in (job.left, job.right):
        within(host, "sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=1")
    return job.done()


def dead_ipv6(job: Job) -> str:
    """pytorch#131691: a name has two addresses, and only the one of IPv6 is tried."""
    for host in (job.left, job.right):
        host.write_etc("hosts", "127.0.0.1 localhost\nfd00::99 left\n10.77.0.1 left\n")
        within(host, "ip", "-6", "address", "add", f"{ADDRESSES[host.name]}/64", "dev", "eth0",
               "nodad")  # fmt: skip
    return job.done()


def same_docker0(job: Job) -> str:
    """mesh-llm#542: each host has a docker0 with the same address, and tells it to the others."""
    for host in (job.left, job.right):
        within(host, "ip", "link", "add", "docker0", "type", "bridge")
        within(host, "ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
        within(host, "ip", "link", "set", "docker0", "up")
    return job.done()


def late_name(job: Job) -> str:
    """ms-swift#6368: the leader's name is not known yet where the other host's command starts."""
    known = f"127.0.0.1 localhost\n{job.left.address} left\n"
    job.right.write_etc("hosts", "127.0.0.1 localhost\n")
    started = job.start()
    time.sleep(3.0)
    job.right.write_etc("hosts", known)
    return job.done(started)


def unknown_own_names(job: Job) -> str:
    """animate-x#15, Grendel-GS#9: neither localhost nor the host's own name stands for anything."""
    for host in (job.left, job.right):
        host.write_etc("hosts", f"{job.left.address} leader\n")
    job.leader = "leader"
    return job.done()


def own_name_is_loopback(job: Job) -> str:
    """dispy#98, chapel#14581: the leader's own name is 127.0.1.1 there; and no default route."""
    job.left.write_etc("hosts", "127.0.0.1 localhost\n127.0.1.1 left\n")
    return job.done()


def killed_leader(job: Job) -> str:
    """sglang#3099, pytorch#41665: the other host goes on for ever when the leader has gone."""
    started = job.start()
    if not wait_for(lambda: "plan:" in (job.folder / "0.err").read_text(), LIMIT_S):
        return "it did not come so far"
    os.kill(min(job.left.running()), signal.SIGKILL)
    if not wait_for(lambda: all(process.poll() is not None for process in started), 15.0):
        return "its commands still run after 15 s"
    said = (job.folder / "1.err").read_text()
    return "" if "rank 2: the driver at left:29600 is gone" in said else "no word of it"


SCENES: dict[str, Scene] = {
    each.__name__: each
    for each in (
        *(ipv6_alone, no_ipv6, dead_ipv6, same_docker0),
        *(late_name, unknown_own_names, own_name_is_loopback, killed_leader),
    )
}


def within(host: Host, *command: str) -> None:
    into = ["ip", "netns", "exec", host.namespace]
    subprocess.run([*into, *command], check=True, capture_output=True)


def play(name: str, hosts: Hosts, model: str, folder: Path) -> list[str]:
    left, right = hosts
    wrong = SCENES[name](Job(left, right, folder, model))
    return [wrong] if wrong else []


if __name__ == "__main__":
    sys.exit(scenes.main(__doc__, SCENES, play))
