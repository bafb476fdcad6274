"""Scenes on two hosts (hosts.py), in turn: what a command does when something is as it should not
be. `main` is that of a script that has some."""

import argparse
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from commands import one_of
from hosts import Hosts, why_not
from launchers import told

Play = Callable[[str, Hosts, str, Path], list[str]]
"""A scene by its name, with a model, its files in a folder: what is wrong with what came of it."""


def main(description: str, scenes: Collection[str], play: Play) -> int:
    """Plays those that the command line names; 1 if there was something wrong with one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenes",
        nargs="*",
        type=one_of(scenes),
        metavar="SCENE",
        help=f"of {', '.join(scenes)}; by default all",
    )
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"not run: {reason}")
        return 0
    num_wrong = 0
    for name in arguments.scenes or scenes:
        with tempfile.TemporaryDirectory() as place, Hosts("left", "right") as hosts:
            folder = Path(place)
            wrong = play(name, hosts, arguments.model, folder)
            left = {pid: words for host in hosts for pid, words in host.left_after(5).items()
                    if "pipeserve" in words}  # fmt: skip
            wrong += [f"left behind: {left}"] if left else []
            print(f"{name:20} {'; '.join(wrong) or 'as it should'}", flush=True)
            if wrong:
                print(told(folder))
        num_wrong += bool(wrong)
    return min(num_wrong, 1)
