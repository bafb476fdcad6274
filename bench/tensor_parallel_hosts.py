"""Stages that several ranks share, over two hosts: the tokens of one process.

    python bench/tensor_parallel_hosts.py [each across lost no_dns ...]

`each` has two stages of two ranks, one stage on each host, between which activations go in parts;
`across` has one stage, half of its four ranks on each host, so that every sum crosses; `lost` is
that, and a rank on the other host is killed in the midst of it. In `no_dns`, which is `across`
again, the server of names does not answer (pytorch#159007: ranks take minutes to meet). The hosts
are network namespaces (hosts.py), one command a host; the model is a tiny one, in float32.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from commands import one_of
from hosts import Host, Hosts, why_not
from launchers import by_hand, secret_in, start, tokens_in, told
from services import wait_for

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from checkpoints import tiny

SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1000,
    "vocab_size": 1001,
    "max_position_embeddings": 4096,
}
LENGTHS = (700, 3, 40, 620)
"""Of prompts: two are large enough to go to the other host in parts."""
LIMIT_S, UP_S = 240.0, 120.0
STAGE = "pipeserve.stage.process"


class Scene(NamedTuple):
    """What is run, and what befalls it."""

    sizes: tuple[str, ...]
    max_tokens: int = 32
    prepare: Callable[[list[Host]], None] = lambda hosts: None
    befalls: Callable[[list[Host], Path], str] = lambda hosts, folder: ""
    """Returns why it could not."""


def silence_names(hosts: list[Host]) -> None:
    """A server of names that hears, and does not answer."""
    code = "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 53)); "
    hosts[0].start([sys.executable, "-c", f"{code}time.sleep(600)"])
    for host in hosts:
        host.write_etc("resolv.conf", f"nameserver {hosts[0].address}\n")


def lose_a_rank(hosts: list[Host], folder: Path) -> str:
    """Of the other host, when tokens come."""
    if not wait_for(lambda: "connecting stages" in (folder / "0.err").read_text(), UP_S):
        return "it did not come up"
    time.sleep(2.0)
    stages = [pid for pid, words in hosts[1].running().items() if STAGE in words]
    os.kill(max(stages), signal.SIGKILL)
    return ""


SCENES = {
    "each": Scene(("-tp", "2", "-pp", "2")),
    "across": Scene(("-tp", "4", "-pp", "1")),
    "no_dns": Scene(("-tp", "4", "-pp", "1"), prepare=silence_names),
    "lost": Scene(("-tp", "4", "-pp", "1"), max_tokens=200, befalls=lose_a_rank),
}


def verb_of(model: str, scene: Scene, folder: Path) -> list[str]:
    rng, prompts = Random(0), folder / "prompts.jsonl"
    lines = [{"prompt_token_ids": [rng.randrange(3, 1000) for _ in range(n)]} for n in LENGTHS]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sampling = ["--temperature", "0", "--ignore-eos", "--max-tokens", str(scene.max_tokens)]
    return ["pipeserve", "generate", model, *sampling, "--prompts", str(prompts),
            "--dtype", "float32"]  # fmt: skip


def tried(scene: Scene, model: str) -> str:
    """What is wrong; empty: nothing."""
    with tempfile.TemporaryDirectory() as name, Hosts("left", "right") as both:
        folder, hosts = Path(name), list(both)
        verb = verb_of(model, scene, folder)
        alone = subprocess.run(
            [sys.executable, "-m", *verb], check=True, capture_output=True, text=True
        )
        scene.prepare(hosts)
        secret = ["--control-secret", str(secret_in(folder)), "--join-timeout", "60"]
        started = start(by_hand(hosts, [*verb, *scene.sizes, *secret], folder), folder)
        wrong = scene.befalls(hosts, folder)
        wait_for(lambda: all(process.poll() is not None for process in started), LIMIT_S)
        codes = [process.poll() for process in started]
        if any(code != 0 for code in codes):
            wrong = wrong or f"exit codes {codes}"
        elif tokens_in((folder / "0.out").read_text()) != tokens_in(alone.stdout):
            wrong = wrong or "not the tokens of one process"
        left = {pid: words for host in hosts for pid, words in host.left_after(10).items()
                if "pipeserve" in words}  # fmt: skip
        wrong = wrong or (f"left behind: {left}" if left else "")
        for line in (folder / "0.err").read_text().splitlines():
            if re.search("is started again|there again|starting stages", line):
                print(f"  {line}")
        return f"{wrong}\n{told(folder)}" if wrong else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenes",
        nargs="*",
        type=one_of(SCENES),
        metavar="SCENE",
        help=f"of {', '.join(SCENES)}; by default all",
    )
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"not run: {reason}")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    num_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        model = tiny("llama", Path(folder), **SIZES)
        for name in arguments.scenes or SCENES:
            began_s = time.monotonic()
            wrong = tried(SCENES[name], model)
            num_wrong += bool(wrong)
            took_s = time.monotonic() - began_s
            print(f"{name:8} {took_s:6.1f} s  {wrong or 'as it should'}", flush=True)
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
