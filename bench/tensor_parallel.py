"""Stages that several ranks share.

    python bench/tensor_parallel.py tokens    every family, 1 to 4 ranks a stage, 1 to 3 stages
    python bench/tensor_parallel.py smollm2   SmolLM2 with 3 ranks, as processes, against 1
    python bench/tensor_parallel.py losses    of 3 ranks two are killed and one is stopped

`tokens` is tests/driver/test_tensor_parallel.py, asked for all: texts that part at a gap of two
logits under 1e-4 are told, and counted at the end. A few minutes of two cores.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pipeserve
from pipeserve import SamplingParams
from pipeserve.core.nouns import Request

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver

ROOT = Path(__file__).resolve().parent.parent
TEST = "tests/driver/test_tensor_parallel.py"
PROMPT = "The capital of France is"
RANKS = 3


def tokens() -> int:
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
    return done.returncode


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


def losses() -> int:
    """Seconds from each loss until it was named, and until the next token; and what of the cores'
    time the new processes had taken by then, which other work on the machine changes less."""
    import_s = _import_s()
    with pipeserve.LLM("smollm2-135m", dtype="float32", tensor_parallel_size=RANKS) as llm:
        driver = llm.client
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, seed=0)
        prompt = tuple(range(100, 140))
        driver.submit([Request(id=number, prompt=prompt, params=params) for number in range(4)])
        for rank, number in ((1, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL)):
            _wait_for_tokens(driver, 40)
            begin_s = time.monotonic()
            os.kill(_stage_pid(driver, rank), number)
            while not driver.losses.trouble:
                driver.outputs(0.05)
            named_s, why = time.monotonic() - begin_s, driver.losses.trouble
            _wait_for_tokens(driver, 1)
            again_s = time.monotonic() - begin_s
            cpu_s = [_cpu_s(_stage_pid(driver, each)) for each in range(RANKS)]
            print(
                f"rank {rank}, {number.name}: named after {named_s:.2f} s, tokens again after "
                f"{again_s:.2f} s, {', '.join(f'{each:.1f}' for each in cpu_s)} s of CPU of each "
                f"rank (importing megatron-core takes {import_s:.2f} s); {why}"
            )
    return 0


def _import_s() -> float:
    """As a rank does it, of one process alone, beside what every stage imports."""
    code = (
        "import time, pipeserve.stage.worker as _; t = time.process_time(); "
        "import pipeserve.stages.tensor_parallel.layers; print(time.process_time() - t)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(found.stdout.split()[-1])


def _wait_for_tokens(driver: "Driver", number: int) -> None:
    while number > 0:
        number -= len(driver.outputs(0.05))


def _stage_pid(driver: "Driver", rank: int) -> int:
    keeper = driver.fleet.keepers[rank].pid
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


def _cpu_s(pid: int) -> float:
    """Of all its threads, since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"tokens": tokens, "smollm2": smollm2, "losses": losses}
    parser.add_argument("what", choices=kinds)
    return kinds[parser.parse_args().what]()


if __name__ == "__main__":
    sys.exit(main())
