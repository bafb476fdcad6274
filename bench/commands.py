"""The `pipeserve` command as the scripts here run it, on the CPU stages of this machine."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LIMITS = ["--max-model-len", "2048", "--num-gpu-blocks-override", "2048"]


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
    parser = argparse.ArgumentParser(description=description)
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
