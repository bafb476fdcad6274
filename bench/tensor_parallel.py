"""Every family over 1 to 4 ranks a stage and 1 to 3 stages: tokens against transformers', draws
against one rank's; and SmolLM2 with 3 ranks.

    python bench/tensor_parallel.py

It is tests/driver/test_tensor_parallel.py, asked for all: texts that part at a gap of two logits
under 1e-4 are told, and counted at the end. About a quarter of an hour of one core.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/driver/test_tensor_parallel.py"
PROMPT = "The capital of France is"


def main() -> int:
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rP", "-q", "-p", "no:randomly", TEST],
        cwd=ROOT,
        env={**os.environ, "PIPESERVE_TENSOR_PARALLEL_ALL": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    parted = [line for line in done.stdout.splitlines() if " texts part at gaps of " in line]
    texts = sum(int(re.search(r"(\d+) texts part", line)[1]) for line in parted)
    print(*parted, done.stdout.splitlines()[-1], sep="\n")
    print(f"{texts} texts parted at a gap under 1e-4; {time.monotonic() - begin_s:.0f} s")
    return done.returncode or smollm2()


def smollm2() -> int:
    """9 heads over 3, so with 3 ranks; each rank a process."""
    said = [
        subprocess.run(
            [
                *(sys.executable, "-m", "pipeserve", "generate", "smollm2-135m"),
                *("--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0"),
                *("--dtype", "float32", *sizes),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for sizes in ((), ("-tp", "3"))
    ]
    print(f"SmolLM2, 1 rank and 3: {'alike' if said[0] == said[1] else said}")
    return int(said[0] != said[1])


if __name__ == "__main__":
    sys.exit(main())
