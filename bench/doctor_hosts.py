"""What `pipeserve doctor` says of two hosts, each time that something is as it is not on one
machine: a clock that is off, a slow link, other versions, a port that is taken, a host that never
comes, a leader that fails.

    python bench/doctor_hosts.py [clock link facts version port absent leader] [--model MODEL]

The hosts are network namespaces (hosts.py), two stages each, one command a host. The right one's
monotonic clock, by which stages measure, is 1000 s ahead (a time namespace). The link is slow
by a process between the two (late_network.py). Another version is a copy of the project with that
number in it.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import scenes
from hosts import Hosts
from launchers import by_hand, secret_in, start
from services import wait_for

ROOT = Path(__file__).parents[1]
AHEAD_S, LATE_S = 1000, 0.005
LIMIT_S = 120.0


class Said(NamedTuple):
    """By the commands of both hosts, once they have ended."""

    codes: list[int]
    out: str
    """Of the leader."""
    errors: list[str]
    took_s: float


Scene = Callable[[Hosts, list[str], Path], list[str]]
"""What is wrong with it, in words."""


def doctor(
    hosts: Hosts, verb: list[str], folder: Path, *, only: int | None = None, **paths: Path
) -> Said:
    """One command a host, or of one host `only`. `paths`: of other projects, by host."""
    commands = by_hand(list(hosts), [*verb, "--control-secret", str(secret_in(folder))], folder)
    commands = [
        (host, ["env", "COLUMNS=160", f"PYTHONPATH={paths.get(host.name, ROOT)}", *words])
        for host, words in commands
    ]
    began_s = time.monotonic()
    started = start(commands if only is None else [commands[only]], folder)
    wait_for(lambda: all(process.poll() is not None for process in started), LIMIT_S)
    took_s = time.monotonic() - began_s
    codes = [process.poll() for process in started]
    errors = [(folder / f"{number}.err").read_text() for number in range(len(started))]
    return Said(codes, (folder / "0.out").read_text(), errors, took_s)


def lacks(said: Said, codes: list[int], *patterns: str) -> list[str]:
    """Of what should be there, in the leader's output or on anybody's stderr."""
    text = "\n".join([said.out, *said.errors])
    found = [f"nothing like {each!r}" for each in patterns if not re.search(each, text)]
    return found + ([f"exit codes {said.codes}, not {codes}"] if said.codes != codes else [])


def clock(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    said = doctor(hosts, verb, folder)
    wrong = lacks(said, [0, 0], "all checks pass")
    lines = re.findall(
        r"clock of stage (\d) is ([+-][\d.]+) ms off .* within ([\d.]+) ms", said.out
    )
    for stage, ahead, within in lines:
        off_ms = abs(float(ahead) - AHEAD_S * 1e3)
        print(f"  stage {stage}: {ahead} ms ± {within}, {off_ms:.3f} ms from what it is")
        if off_ms > float(within):
            wrong.append(f"stage {stage}: it is {AHEAD_S * 1e3} ms")
    if [stage for stage, *_ in lines] != ["2", "3"]:
        wrong.append("not the clocks of stages 2 and 3")
    return wrong + latencies(said, 0.0)


def link(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    hosts.delay(LATE_S)
    said = doctor(hosts, verb, folder)
    return lacks(said, [0, 0], "all checks pass") + latencies(said, LATE_S * 1e3)


def latencies(said: Said, late_ms: float) -> list[str]:
    """Only from stage 1 to 2, and back from 3 to 0, are there `late_ms`."""
    seams = re.findall(r"stage (\d) → (\d)\S*.*?([\d.]+)(?: ± ([\d.]+))? ms", said.out)
    wrong = [] if len(seams) == 4 else ["not four links"]
    for here, there, measured, within in seams:
        crosses = {here, there} in ({"1", "2"}, {"3", "0"})
        expected, known_ms = late_ms if crosses else 0.0, float(within or 0)
        print(f"  stage {here} → {there}: {measured} ms ± {known_ms}; it is at least {expected:g}")
        if not -known_ms <= float(measured) - expected < 2.0 + known_ms or crosses != bool(within):
            wrong.append(f"stage {here} → {there} is {measured} ms ± {known_ms}")
    return wrong


def facts(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    """Same messages, other Python: as told by the other host's stages."""
    other = copied(folder, "stage/facts.py", "platform.python_version()", '"3.9.99"')
    said = doctor(hosts, verb, folder, right=other)
    return lacks(
        said, [1, 0], r"fails: python is not the same everywhere: \S+ on left, 3.9.99 on right"
    )


def version(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    other = copied(folder, "__init__.py", '__version__ = "', '__version__ = "9.9.')
    said = doctor(hosts, [*verb, "--join-timeout", "8"], folder, right=other)
    told_here = "no keeper of ranks 2, 3 .*turned away, the last: who connects runs pipeserve 9.9"
    return lacks(said, [1, 2], "rank 2: refused by .*who connects runs pipeserve 9.9", told_here)


def port(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    """That serve would listen at."""
    left, _ = hosts
    server = "import socket, time; s = socket.create_server(('127.0.0.1', 8000)); time.sleep(300)"
    left.start([sys.executable, "-c", server])
    time.sleep(1.0)
    said = doctor(hosts, verb, folder)
    return lacks(said, [1, 0], "fails: .*8000")


def absent(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    said = doctor(hosts, [*verb, "--join-timeout", "5"], folder, only=0)
    return lacks(
        said, [1], r"no keeper of ranks 2, 3 \(of machine 1 of 0 to 1\).* within 5 s; 2 came"
    )


def leader(hosts: Hosts, verb: list[str], folder: Path) -> list[str]:
    """It fails before it can look at anything: there is no such model on its machine."""
    verb = ["/nowhere" if word == verb[2] else word for word in verb]
    said = doctor(hosts, verb, folder)
    print(f"  all ended after {said.took_s:.1f} s")
    wrong = lacks(said, [2, 1], "rank 2: the driver at left:29600 has ended the run: '/nowhere' is")
    return wrong + (["that took long"] if said.took_s > 60 else [])


SCENES: dict[str, Scene] = {
    each.__name__: each for each in (clock, link, facts, version, port, absent, leader)
}


def copied(folder: Path, file: str, old: str, new: str) -> Path:
    """The project, with something else in one of its files."""
    copy = folder / "other"
    for name in ("pipeserve", "stages", "profiling", "launch", "configs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True)
    changed = copy / "pipeserve" / file
    text = changed.read_text()
    assert old in text, (file, old)
    changed.write_text(text.replace(old, new))
    return copy


def play(name: str, hosts: Hosts, model: str, folder: Path) -> list[str]:
    _, right = hosts
    right.ahead_s = AHEAD_S
    return SCENES[name](hosts, ["pipeserve", "doctor", model, "-pp", "4"], folder)


if __name__ == "__main__":
    sys.exit(scenes.main(__doc__, SCENES, play))
