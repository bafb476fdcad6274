"""Many streams at once against a server, with clients that hang up: is every token right, and is
nothing left behind?

    python bench/server_streams.py MODEL --streams 500 --seconds 300

Starts `pipeserve serve MODEL -pp 2 --dtype float32` and keeps so many streams open for so long, of
30 distinct prompts; of each ten, three hang up at once or after a few tokens. Greedy. Every
stream's tokens are held against those of the same prompt alone; where they part, the gap between
the two likeliest tokens there is looked at: under 1e-3 it is a tie, counted and printed. At the
end no request, block or file descriptor may be left, and memory be flat. With a `--max-queue` below
`--streams` some are refused, and each has to be told so.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp

_TIE = 1e-3
_NUM_PROMPTS = 30
_MAX_TOKENS = 48
_FEWEST_IDS = 250
"""Every model has as many."""
_HANG_UP = 0.3
_WARM_S = 300.0
"""A shorter run says nothing of memory, which grows until all buffers were used."""
_FLAT = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-queue", type=int, help="of the server; below --streams some are refused"
    )
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", arguments.model]
    command += ["-pp", "2", "--dtype", "float32", "--port", "0"]
    if arguments.max_queue is not None:
        command += ["--max-queue", str(arguments.max_queue)]
    log = tempfile.NamedTemporaryFile("r", suffix=".log", delete=False)  # noqa: SIM115
    server = subprocess.Popen(command, stderr=open(log.name, "w"))  # noqa: SIM115
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # the server ends all the same
    try:
        report = asyncio.run(run(address(server, log.name), server.pid, arguments))
    finally:
        server.terminate()
        exit_code = server.wait(60)
    report["server's exit code"] = exit_code
    for name, value in report.items():
        print(f"{name}: {value:+.2%}" if isinstance(value, float) else f"{name}: {value}")
    growth = report["memory, last third against the one before"]
    is_flat = arguments.seconds < _WARM_S or growth <= _FLAT
    is_right = report["wrong"] == 0 and report["left"] == "nothing" and exit_code == 0
    return 0 if is_right and is_flat else 1


def address(server: subprocess.Popen, log: str) -> str:
    """Once it serves. What it logs goes to a file: nobody reads a pipe meanwhile, which would be
    full one day, and the server would wait."""
    while server.poll() is None:
        if found := re.search(r"at (http\S+)/v1", Path(log).read_text()):
            return found[1]
        time.sleep(0.2)
    raise SystemExit(Path(log).read_text())


async def run(url: str, pid: int, arguments: argparse.Namespace) -> dict:
    rng = random.Random(arguments.seed)
    prompts = [
        [rng.randrange(_FEWEST_IDS) for _ in range(rng.choice((5, 20, 60, 200)))]
        for _ in range(_NUM_PROMPTS)
    ]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    counts: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        alone = [await whole(session, url, prompt) for prompt in prompts]
        stop_s = time.monotonic() + arguments.seconds
        memory: list[tuple[float, int]] = []

        async def client(number: int) -> None:
            own = random.Random(f"{arguments.seed}/{number}")
            while time.monotonic() < stop_s:
                place = own.randrange(_NUM_PROMPTS)
                hangs_up = own.random() < _HANG_UP
                most = own.randrange(20) if hangs_up else None
                try:
                    outcome = await stream(session, url, prompts[place], alone[place], most)
                except aiohttp.ClientError as error:
                    outcome = "wrong"
                    print(repr(error), file=sys.stderr)
                counts[outcome] += 1
                if outcome == "refused":
                    await asyncio.sleep(own.random())

        async def watch() -> None:
            while time.monotonic() < stop_s:
                memory.append((time.monotonic(), sum(map(resident, [pid, *descendants(pid)]))))
                await asyncio.sleep(5)

        before = {each: num_files(each) for each in (pid, *descendants(pid))}
        await asyncio.gather(watch(), *map(client, range(arguments.streams)))
    async with aiohttp.ClientSession(timeout=timeout) as session:  # with none of those connections
        left = await what_is_left(session, url, before)
    third = len(memory) // 3
    early = [size for _, size in memory[third : 2 * third]] or [size for _, size in memory]
    late = [size for _, size in memory[2 * third :]]
    growth = sum(late) / len(late) / (sum(early) / len(early)) - 1
    return {
        "streams": sum(counts.values()),
        **{name: counts[name] for name in ("right", "hung up", "refused", "tie", "wrong")},
        "memory, last third against the one before": growth,
        "left": left,
    }


def body(prompt: list[int], **more) -> dict:
    wanted = {"max_tokens": _MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"prompt": prompt, **wanted, "return_token_ids": True, "logprobs": 2, **more}


async def whole(session: aiohttp.ClientSession, url: str, prompt: list[int]) -> dict:
    """Tokens of the prompt alone, and at each the gap between the two likeliest."""
    async with session.post(f"{url}/v1/completions", json=body(prompt)) as response:
        (choice,) = (await response.json())["choices"]
    gaps = []
    for top in choice["logprobs"]["top_logprobs"]:
        first, second, *_ = (*sorted(top.values(), reverse=True), float("-inf"))
        gaps.append(first - second)
    return {"tokens": choice["token_ids"], "gaps": gaps}


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], alone: dict, most: int | None
) -> str:
    """What came of one stream, that hangs up after `most` tokens."""
    tokens: list[int] = []
    ended = False
    asked = body(prompt, stream=True)
    async with session.post(f"{url}/v1/completions", json=asked) as response:
        if response.status == 429:
            told = (await response.json())["error"]["message"]
            return "refused" if told and "Retry-After" in response.headers else "wrong"
        if most == 0:
            response.close()
            return "hung up"
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if not data or data.startswith(b":"):  # a sign of life
                continue
            if data == b"[DONE]":
                ended = True
                break
            event = json.loads(data)
            if "error" in event:
                return "wrong"
            tokens += event["choices"][0]["token_ids"]
            if most is not None and len(tokens) >= most:
                response.close()
                break
    expected = alone["tokens"][: len(tokens)]
    if len(tokens) != _MAX_TOKENS if most is None else len(tokens) < most:
        return "wrong"
    if most is None and not ended:
        return "wrong"
    if tokens == expected:
        return "right" if most is None else "hung up"
    place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
    gap = alone["gaps"][place]
    print(f"a stream parts at token {place}, where the gap is {gap:.1e}", file=sys.stderr)
    return "tie" if gap < _TIE else "wrong"


async def what_is_left(session: aiohttp.ClientSession, url: str, before: dict[int, int]) -> str:
    """Behind the last stream, within 20 s."""
    left = {}
    for _ in range(40):
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        left = {
            name: value
            for key, value in values.items()
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if key.startswith(f"vllm:{name}") and float(value)
        }
        more = {pid: num_files(pid) - count for pid, count in before.items()}
        left |= {f"files of {pid}": count for pid, count in more.items() if count > 2}
        if not left:
            return "nothing"
        await asyncio.sleep(0.5)
    return str(left)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    sys.exit(main())
