"""Kills, stops and cuts off stages of a pipeline under load, and compares every token with an
undisturbed run.

    python bench/chaos.py [MODEL] [--faults 20] [--seed 0]           one machine
    python bench/chaos.py [MODEL] --hosts 2                          network namespaces; takes root
    python bench/chaos.py [MODEL] --poison                           a request that kills its stage

Float32, three stages. A fault is a random stage's process, killed or stopped at a random moment;
with --hosts 2, where stages 1 and 2 are on another host than the driver, it may be that host: its
processes killed, its processes stopped, or its cable pulled. It is started again after 3 s, which
do not count. What is printed, also when it is interrupted: how long until the loss was named, and
until the next token came.
"""

import argparse
import contextlib
import ctypes
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import chaos_load
import hosts
from commands import script

from pipeserve.configs import RunConfig, make_config
from pipeserve.core.nouns import RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.wire.secret import VARIABLE

STAGES = 3
PORT = 29600
LONGEST_S = 120.0
"""Until a fault is over."""
AWAY_S = 3.0
"""How long a host is away."""
POISON = 4242
"""The token that a stage of --poison dies of."""
FLAGS = {
    "dtype": "float32",
    "pipeline_parallel_size": STAGES,
    "max_num_batched_tokens": 256,
    "max_model_len": 512,
    "num_gpu_blocks_override": 400,
    "max_restarts": 1000,
}


_NETWORK = 0x40000000
"""CLONE_NEWNET: of the kinds of namespace, that one."""


class OtherHost:
    """With the keepers of stages 1 and 2."""

    def __init__(self, host: hosts.Host, address: str) -> None:
        self.host, self.address = host, address
        self.stages = (1, 2)
        self.start()

    def start(self) -> None:
        for place, rank in enumerate(self.stages):
            environment = {"LOCAL_RANK": str(place), "LOCAL_WORLD_SIZE": "2"}
            self.host.start(keeper_command(self.address, rank), env={**os.environ, **environment})

    def kill(self) -> None:
        self.host.pull_cable()  # a machine without power says no goodbye
        self.host.kill_all()

    def stop(self) -> None:
        for pid in self.host.running():
            os.kill(pid, signal.SIGSTOP)

    def cut_off(self) -> None:
        self.host.pull_cable()

    def comes_back(self, after: str) -> None:
        """What was cut off runs still, and has to end by itself."""
        if after == "stop":
            self.host.kill_all()
        self.host.plug_in()
        self.start()


def keeper_command(address: str, rank: int) -> list[str]:
    place = ["--rank", str(rank), "--world-size", str(STAGES)]
    return [sys.executable, "-m", "pipeserve.launch.keeper", "--control", address, *place]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[dict, OtherHost]]:
    """This process moves to the first of them; the flags that a driver needs there."""
    if why := hosts.why_not():
        raise SystemExit(f"error: --hosts 2: {why}")
    os.environ[VARIABLE] = secrets.token_hex(32)
    with open("/proc/self/ns/net") as home, hosts.Hosts("left", "right") as (left, right):
        with open(f"/run/netns/{left.namespace}") as namespace:
            _move_to(namespace)
        address = f"{left.address}:{PORT}"
        own = subprocess.Popen(
            keeper_command(address, 0),
            env={**os.environ, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        )
        try:
            yield {"launcher": "external", "control": address}, OtherHost(right, address)
        finally:
            own.kill()
            own.wait()
            _move_to(home)  # or it would end with the host


def _move_to(namespace: IO[str]) -> None:
    """This process, as far as its network goes."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), _NETWORK):
        raise OSError(ctypes.get_errno(), f"moving to {namespace.name}")


class Chaos:
    """Faults, and what they took."""

    def __init__(self, load: chaos_load.Load, other: OtherHost | None, seed: int) -> None:
        self.load, self.other = load, other
        self.draw = random.Random(seed)
        self.named: list[float] = []
        self.served: list[float] = []
        self.falsely_named: list[int] = []

    def fault(self) -> str:
        """One; prints nothing."""
        self._run(self.draw.uniform(0.5, 3.0), least=8 * chaos_load.RUNNING)
        driver = self.load.driver
        if self.other is not None and self.draw.random() < 0.5:
            what = self.draw.choice(["kill", "stop", "cut_off"])
            named_s, served_s, lost = self._until_over(getattr(self.other, what), what)
            expected, what = set(self.other.stages), f"{what} the other host"
        else:
            stage = self.draw.randrange(STAGES)
            kind = self.draw.choice([signal.SIGKILL, signal.SIGSTOP])
            pid = driver.stages[stage].pid
            named_s, served_s, lost = self._until_over(lambda: os.kill(pid, kind))
            expected, what = {stage}, f"{kind.name} of stage {stage}"
        self.falsely_named += lost - expected
        self.named.append(named_s)
        self.served.append(served_s)
        return f"{what}: named {named_s:.2f} s, tokens {served_s:.2f} s"

    def _run(self, seconds: float, least: int) -> None:
        """And until so many tokens came: who gets fewer than four between two losses is suspected
        to be why."""
        until_s, num_tokens = time.monotonic() + seconds, 0
        while time.monotonic() < until_s or num_tokens < least:
            self.load.refill()
            num_tokens += self.load.step()

    def _until_over(
        self, strike: Callable[[], None], host_fault: str = ""
    ) -> tuple[float, float, set[int]]:
        """Seconds until it was named, and until tokens came again; the stages that were lost."""
        losses = self.load.driver.losses
        before = list(losses.counts)
        strike()
        began_s = time.monotonic()
        named_s, away_s = None, AWAY_S if host_fault else 0.0
        is_away = bool(host_fault)
        while True:
            self.load.refill()
            num_tokens = self.load.step()
            now = time.monotonic()
            if named_s is None and losses.counts != before:
                named_s = now - began_s
            if is_away and now - began_s > away_s:
                self.other.comes_back(host_fault)
                is_away = False
            if named_s is not None and not is_away and not losses.trouble and num_tokens:
                lost = {n for n in range(STAGES) if losses.counts[n] != before[n]}
                return named_s, now - began_s - away_s, lost
            if now - began_s > LONGEST_S:
                raise SystemExit(f"a fault is not over after {LONGEST_S:g} s: {losses.trouble}")


def run_faults(options: argparse.Namespace, config: RunConfig, other: OtherHost | None) -> int:
    """How much is wrong."""
    with Driver(checkpoint_setup(config)) as driver:
        load = chaos_load.Load(driver, options.seed)
        chaos = Chaos(load, other, options.seed)
        try:
            for number in range(options.faults):
                print(f"{number + 1}: {chaos.fault()}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted after {len(chaos.named)} faults")
        load.drain()
        num_leaked = load.num_blocks_leaked
    for what, seconds in (("named", chaos.named), ("tokens again", chaos.served)):
        if seconds:
            print(f"{what}: median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s")
    print(f"{num_leaked} blocks leaked; stages named that had no fault: {chaos.falsely_named}")
    return num_leaked + len(chaos.falsely_named) + compare_with_undisturbed(load, config)


def compare_with_undisturbed(load: chaos_load.Load, config: RunConfig) -> int:
    own = replace(config, launcher="spawn", control=None)
    with Driver(checkpoint_setup(own)) as driver:
        undisturbed = chaos_load.Load(driver, load.seed)
        for number in load.tokens:
            undisturbed.submit(number)
        undisturbed.drain()
    return chaos_load.compare(load, undisturbed)


def run_poison(options: argparse.Namespace, config: RunConfig) -> int:
    """How much is wrong: the poisoned request is to end alone, by an error."""
    folder = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    os.environ["POISON"] = str(POISON)
    poisoned = chaos_load.RUNNING // 2
    setup = replace(checkpoint_setup(config), module="poisoned_stage")
    with Driver(setup) as driver:
        load = chaos_load.Load(driver, options.seed)
        for number in range(chaos_load.RUNNING):
            load.submit(number, (1, POISON, 2) if number == poisoned else ())
        load.drain()
        print(f"stages were lost {sum(driver.losses.counts)} times: {driver.losses.counts}")
        num_leaked = load.num_blocks_leaked
    error = load.errors.pop(RequestId(poisoned), None)
    del load.tokens[poisoned]
    print(f"the request that kills its stage: {error}")
    return num_leaked + (error is None) + compare_with_undisturbed(load, config)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1)
    parser.add_argument("--poison", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = make_config({}, {"model": options.model, **FLAGS})
    if options.poison:
        return 1 if run_poison(options, config) else 0
    if options.hosts == 1:
        return 1 if run_faults(options, config, None) else 0
    with two_hosts() as (flags, other):
        return 1 if run_faults(options, replace(config, **flags), other) else 0


if __name__ == "__main__":
    script(main)
