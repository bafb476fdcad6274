"""What HTTP costs: the same requests through the offline API and through the server, in turn.

    python bench/http_overhead.py MODEL [--streams 200] [--prompt 64] [--output 64] [--rounds 5]

Both have a pipeline of their own on the same cores, started once; the one that waits computes
nothing. In each round so many requests of new random ids are asked for at once, of
    offline   `LLM.stream`, driver and text in one process, this one;
    http      `pipeserve serve`, each a stream of its own, this process being the client;
    no text   the server's driver alone, as the server speaks to it: ids come, and nothing is made
              of them.
Rounds go forwards and backwards in turn. Tokens/s are from asking to the last token, TTFT is from
asking to a first token; ratios are of neighbours, and their median counts. CPU seconds are of each
process, so that work of others on the machine matters little; the stages' are told, too: what the
rest takes of their cores they take longer for. Planning is what the driver's records say of each
microbatch, from where it begins to plan until its messages are sent, by the clock.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from commands import script
from report import plain_table
from server_streams import address, descendants

import pipeserve
from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId
from pipeserve.launch.run.http_load import Server, run_load
from pipeserve.profiling.recording.summary import percentiles
from pipeserve.profiling.simulation.workloads import WorkItem
from pipeserve.sampling_params import SamplingParams
from pipeserve.server.metrics import Metrics
from pipeserve.server.pipeline import Pipeline

_IDS = 1000
"""Drawn ids are below it: every model has them."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, _sides(args, folder) as sides:
        for number in range(-1, args.rounds):
            items = _items(args, number)
            for side in sides[:: -1 if number % 2 else 1]:
                figures = side.run(items)
                if number >= 0:  # the first is to warm up
                    rounds.setdefault(side.name, []).append(figures)
                    _say(number, side.name, figures)
    print(_summary(rounds))
    if args.json is not None:
        args.json.write_text(json.dumps(rounds, indent=2) + "\n")
    return 0


def _items(args: argparse.Namespace, number: int) -> list[WorkItem]:
    draw = Random(f"overhead/{number}").randrange
    return [
        WorkItem(prompt=tuple(draw(_IDS) for _ in range(args.prompt)), max_tokens=args.output)
        for _ in range(args.streams)
    ]


# ---- the sides ----------------------------------------------------------------------------------


class Offline:
    """`LLM.stream` in this process."""

    name = "offline"

    def __init__(self, llm: pipeserve.LLM) -> None:
        self._llm = llm
        self._cpu = Cpu({"offline": [os.getpid()], "stages": descendants(os.getpid())})

    def run(self, items: Sequence[WorkItem]) -> dict[str, float]:
        prompts = [{"prompt_token_ids": list(item.prompt)} for item in items]
        params = [_params(item) for item in items]
        first_s, num_tokens = {}, 0
        with self._cpu.measured() as used:
            start_s = time.monotonic()
            for delta in self._llm.stream(prompts, params):
                first_s.setdefault(delta.index, time.monotonic() - start_s)
                num_tokens += len(delta.token_ids)
            seconds = time.monotonic() - start_s
        return _figures(num_tokens, seconds, list(first_s.values()), used)


class Http:
    """A server, and this process as its client."""

    name = "http"

    def __init__(self, url: str, pid: int, planning: Path) -> None:
        self._server, self._planning = Server(url, None, None), Planning(planning)
        (driver,) = children(pid)
        figures, *keepers = sorted(children(driver))
        stages = [stage for keeper in keepers for stage in children(keeper)]
        self._cpu = Cpu(
            {
                "server": [pid],
                "driver": [driver],
                "figures": [figures],
                "client": [os.getpid()],
                "stages": stages,
            }
        )

    def run(self, items: Sequence[WorkItem]) -> dict[str, float]:
        with self._cpu.measured() as used:
            answers = run_load(self._server, items)
        wrong = [answer.error for answer in answers if answer.error]
        if wrong:
            raise SystemExit(f"{len(wrong)} of {len(answers)} requests failed: {wrong[0]}")
        seconds = max(answer.event_times_s[-1] - answer.due_s for answer in answers)
        ttft_s = [answer.event_times_s[0] - answer.due_s for answer in answers]
        num_tokens = sum(answer.num_output_tokens for answer in answers)
        return _figures(num_tokens, seconds, ttft_s, used) | self._planning.since()


class NoText:
    """A server's driver, and nobody who makes text."""

    name = "no text"

    def __init__(self, loop: asyncio.AbstractEventLoop, pipeline: Pipeline, planning: Path) -> None:
        self._loop, self._pipeline, self._planning = loop, pipeline, Planning(planning)
        self._next_id = 0
        driver = pipeline._process.pid
        figures, *keepers = sorted(children(driver))
        stages = [stage for keeper in keepers for stage in children(keeper)]
        self._cpu = Cpu(
            {
                "driver": [driver],
                "figures": [figures],
                "client": [os.getpid()],
                "stages": stages,
            }
        )

    def run(self, items: Sequence[WorkItem]) -> dict[str, float]:
        with self._cpu.measured() as used:
            num_tokens, seconds, ttft_s = self._loop.run_until_complete(self._ask(items))
        return _figures(num_tokens, seconds, ttft_s, used) | self._planning.since()

    async def _ask(self, items: Sequence[WorkItem]) -> tuple[int, float, list[float]]:
        start_s = time.monotonic()
        silent = [Silent(self._request(item)) for item in items]
        ttft_s, num_tokens = [], 0
        with self._pipeline.submit(silent) as stream:
            async for deltas in stream:
                num_tokens += len(deltas)
                ttft_s += [time.monotonic() - start_s for delta in deltas if delta.begins]
        return num_tokens, time.monotonic() - start_s, ttft_s

    def _request(self, item: WorkItem) -> Request:
        self._next_id += 1
        return Request(id=RequestId(self._next_id), prompt=item.prompt, params=_params(item))


class Silent:
    """In place of a Generation: tokens are told, and no text."""

    class Delta:
        def __init__(self, output: Any) -> None:
            self.finish_reason, self.begins = output.finish_reason, output.begun is not None
            self.error = None
            self.token_ids = (output.token,)

    def __init__(self, request: Request) -> None:
        self.request = request

    def take(self, output: Any) -> "Silent.Delta":
        return self.Delta(output)


def _params(item: WorkItem) -> SamplingParams:
    return SamplingParams(max_tokens=item.max_tokens, temperature=0, ignore_eos=True, seed=0)


@contextmanager
def _sides(args: argparse.Namespace, folder: str) -> Iterator[list[Any]]:
    flags = {"pipeline_parallel_size": args.stages, "dtype": args.dtype}
    config = make_config({}, {"model": args.model, **flags})
    loop, pipeline = asyncio.new_event_loop(), Pipeline(Metrics("no text"))
    log, with_text, without = Path(folder, "log"), Path(folder, "text"), Path(folder, "no text")
    with pipeserve.LLM(args.model, **flags) as llm:
        offline = Offline(llm)
        with _server(args, log, with_text) as server:
            http = Http(address(server, str(log)), server.pid, with_text)
            os.environ[PLANNING] = str(without)
            try:
                program = [sys.executable, __file__, "--as-driver"]
                loop.run_until_complete(pipeline.start(config, program))
                yield [offline, http, NoText(loop, pipeline, without)]
            finally:
                loop.run_until_complete(pipeline.close())


@contextmanager
def _server(args: argparse.Namespace, log: Path, planning: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, __file__, "--as-server", "serve", args.model]
    command += ["-pp", str(args.stages), "--dtype", args.dtype, "--port", "0"]
    with log.open("w") as file:
        environment = {**os.environ, PLANNING: str(planning)}
        server = subprocess.Popen(command, stderr=file, env=environment)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(60)


# ---- planning -----------------------------------------------------------------------------------

PLANNING = "OVERHEAD_PLANNING"
"""Names the file in which a driver keeps the seconds of each of its plans."""


def as_server() -> int:
    """`pipeserve serve`, whose driver keeps them."""
    from pipeserve.launch import cli

    del sys.argv[1]
    Pipeline.start = _with_own_driver(Pipeline.start)
    return cli.main()


def _with_own_driver(start: Any) -> Any:
    async def started(self: Pipeline, config: Any, program: Sequence[str]) -> None:
        await start(self, config, [sys.executable, __file__, "--as-driver"])

    return started


def as_driver() -> int:
    """A server's driver that keeps them."""
    from pipeserve.core.records import Planned
    from pipeserve.launch.run import driver_process, figures

    record = figures.RunningFigures.record
    kept = Path(os.environ[PLANNING]).open("w", buffering=1)  # noqa: SIM115

    def keep(self: figures.RunningFigures, told: Any) -> None:
        if type(told) is Planned:
            kept.write(f"{told.sent_s - told.start_s:.6f}\n")
        record(self, told)

    figures.RunningFigures.record = keep
    return driver_process.main()


class Planning:
    """What a driver has kept, a run at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._num_read = path, 0

    def since(self) -> dict[str, float]:
        seconds = [float(line) for line in self._path.read_text().splitlines() if line]
        new, self._num_read = seconds[self._num_read :], len(seconds)
        told = percentiles(new)
        return {"plan P50": told.p50 * 1e3, "plan P99": told.p99 * 1e3}


# ---- CPU time -----------------------------------------------------------------------------------


class Cpu:
    """CPU seconds of some processes, by name."""

    def __init__(self, pids: dict[str, list[int]]) -> None:
        self._pids = pids

    @contextmanager
    def measured(self) -> Iterator[dict[str, float]]:
        before, used = self._now(), {}
        yield used
        used.update({name: now - before[name] for name, now in self._now().items()})

    def _now(self) -> dict[str, float]:
        return {name: sum(map(cpu_s, pids)) for name, pids in self._pids.items()}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


# ---- what is told -------------------------------------------------------------------------------


def _figures(
    num_tokens: int, seconds: float, ttft_s: list[float], used: dict[str, float]
) -> dict[str, float]:
    cpu = {f"cpu {name}": 1e3 * own / num_tokens for name, own in used.items()}
    return {"tokens/s": num_tokens / seconds, "TTFT P50": percentiles(ttft_s).p50, **cpu}


def _say(number: int, name: str, figures: dict[str, float]) -> None:
    told = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
    print(f"round {number}, {name}: {told}", flush=True)


def _summary(rounds: dict[str, list[dict[str, float]]]) -> str:
    names = list(dict.fromkeys(key for its in rounds.values() for key in its[0]))
    rows = [
        [side, *(_median(its, name) if name in its[0] else "" for name in names)]
        for side, its in rounds.items()
    ]
    lines = ["\nmedians; CPU seconds are of 1,000 tokens, planning is in ms\n"]
    lines.append(plain_table(["", *names], rows))
    for name in ("tokens/s", "TTFT P50"):
        ratios = sorted(
            ours[name] / offline[name]
            for ours, offline in zip(rounds["http"], rounds["offline"], strict=True)
        )
        told = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        lines.append(f"{name}, http over offline: {told}")
    return "\n".join(lines)


def _median(its: list[dict[str, float]], name: str) -> str:
    return f"{statistics.median(figures[name] for figures in its):.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--output", type=int, default=64, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-pp", "--stages", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    programs = {"--as-driver": as_driver, "--as-server": as_server}
    script(programs.get(sys.argv[1] if len(sys.argv) > 1 else "", main))
