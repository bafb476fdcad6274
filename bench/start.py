"""From the command to the first token, by phase, against what cannot be had for less: as many
concurrent `python -c 'import torch'` as there are stages, and one read of the weights.

    python bench/start.py [MODEL] [-pp 2] [--rounds 3]

Rounds alternate between the two. A phase ends when the command says so on stderr; what is before
the first of them is the interpreter and its imports.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from commands import script

from pipeserve.stages.checkpoint.sources import resolve

TARGET = 1.5
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("-pp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    weights = sorted(resolve(arguments.model).glob("*.safetensors"))
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        theirs.append(least(arguments.pp, weights))
        ours.append(start(arguments.model, arguments.pp))
    for phase in ours[0]:
        print(f"{statistics.median(each.get(phase, 0.0) for each in ours):7.2f} s  {phase}")
    total = statistics.median(sum(each.values()) for each in ours)
    imports, read = (statistics.median(each) for each in zip(*theirs, strict=True))
    print(f"{total:7.2f} s  from the command to the first token")
    print(f"{imports:7.2f} s  {arguments.pp} x python -c 'import torch', concurrently")
    print(f"{read:7.2f} s  one read of the weights")
    ratio = total / (imports + read)
    print(f"{ratio:7.2f}    times as long as these two (target: {TARGET})")
    return 0 if ratio <= TARGET else 1


def start(model: str, num_stages: int) -> dict[str, float]:
    """Seconds of each phase."""
    flags = ["--prompt", "The sea", "--max-tokens", "2", "-pp", str(num_stages)]
    began_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeserve", "generate", model, *flags],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said: list[tuple[str, float, float]] = []

    def listen() -> None:
        for line in process.stderr:
            phase, _, seconds = line.decode().strip().rpartition(": ")
            if seconds.endswith(" s") and seconds[:-2].replace(".", "").isdigit():
                said.append((phase, float(seconds[:-2]), time.monotonic()))

    listening = threading.Thread(target=listen)
    listening.start()
    process.stdout.read(1)
    token_s = time.monotonic()
    process.communicate()
    listening.join()
    (first, took_s, at_s), *rest = said
    phases = {"interpreter and imports": at_s - took_s - began_s, first: took_s}
    for phase, _, ended_s in rest:
        phases[phase] = ended_s - at_s
        at_s = ended_s
    phases["first token"] = token_s - at_s
    return phases


def least(num_stages: int, weights: list[Path]) -> tuple[float, float]:
    """Seconds that the imports take together, and the read."""
    began_s = time.monotonic()
    importing = [
        subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(num_stages)
    ]
    for process in importing:
        process.wait()
    imported_s = time.monotonic()
    piece = bytearray(8 << 20)
    for path in weights:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return imported_s - began_s, time.monotonic() - imported_s


if __name__ == "__main__":
    script(main)
