"""How scripts here end, and the `pipeserve` command as they run it, on this machine's CPU."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from pipeserve.errors import PipeserveError

LIMITS = ["--max-model-len", "2048", "--num-gpu-blocks-override", "2048"]


def script(main: Callable[[], int | None]) -> NoReturn:
    """A script to its end; what it was given that is wrong, or not there, ends it with one line."""
    try:
        sys.exit(main())
    except (PipeserveError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """The type of an argument: a name of these. (`choices` would refuse none where any number is
    asked for.)"""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {text}; choose of {', '.join(known)}")
        return text

    return name


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a flag: names of these, with commas."""
    name = one_of(known)
    return lambda text: [name(part) for part in text.split(",")]


def pipeserve(*arguments: str) -> None:
    """Runs it without showing what it prints; what it fails with ends the script."""
    command = [sys.executable, "-m", "pipeserve.launch.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr.strip()}")


def result(path: Path, *arguments: str) -> dict:
    """What it writes to `--json`, which is `path`."""
    pipeserve(*arguments, "--json", str(path))
    return json.loads(path.read_text())


def stage_flags(description: str, policies: str) -> argparse.ArgumentParser:
    """Flags of a script that runs policies, one after the other, on a model's stages."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--policies", default=policies)
    return parser


def profile_of(args: argparse.Namespace, folder: Path) -> Path:
    """The device profile that was given; else this machine is calibrated, into `folder`."""
    if args.profile is not None:
        return args.profile
    path = folder / "profile.yaml"
    pipeserve("calibrate", args.model, "-pp", args.stages, "--output", str(path))
    return path
