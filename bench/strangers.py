"""What strangers do to a running pipeline: junk and half-open connections at its ports.

    python bench/strangers.py [--num 100000] [--at-once 500] [--json]

A pipeline of emulated stages, on loopback, serves the same requests over and over. Two rounds are
left alone; then strangers come, so many in all and so many at once, to whatever of it listens: the
driver's port and local socket (those of the links are closed once the neighbour has come). Each
does one of the things in `kinds`. Printed are output tokens/s of both, whether their tokens are the
same, and of each process open files and resident memory before, at most meanwhile, and after.
"""

import argparse
import json
import os
import random
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import fmean

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, RequestId
from pipeserve.driver.driver import Driver
from pipeserve.launch.run.emulated import emulated_setup
from pipeserve.sampling_params import SamplingParams
from pipeserve.wire.control import KeeperHello, encode
from pipeserve.wire.handshake import Connecting
from pipeserve.wire.step_messages import Sampled

CONFIG = {
    "model": "llama2-7b",
    "device_profile": "a100-80gb-dgx",
    "max_model_len": 1024,
    "pipeline_parallel_size": 3,
    "device": "emulated",
}
NUM_REQUESTS = 24
_STAY_S = 0.3
"""Of those that say nothing, or not enough."""


def framed(message: bytes) -> bytes:
    return struct.pack("<4sI", b"ppsv", len(message)) + message


def kinds() -> dict[str, tuple[bytes, bool]]:
    """What a stranger says, and whether it stays to see what happens."""
    hello = Connecting(b"a guess", ("keeper",)).hello()
    keeper = encode(KeeperHello(0, 3, "here", "127.0.0.1", 1, "boot"), 0)
    return {
        "noise": (os.urandom(300), False),
        "a framed junk message": (framed(os.urandom(64)), False),
        "a frame of 4 GiB": (struct.pack("<4sI", b"ppsv", 0xFFFFFFFF), True),
        "a frame of 1 KiB, cut": (struct.pack("<4sI", b"ppsv", 1024) + b"x" * 500, True),
        "a keeper's hello, unproved": (framed(keeper), False),
        "a result, unproved": (framed(encode(Sampled(0, [1], b"\x01", [], []), 0)), False),
        "a handshake's first step": (framed(hello), True),
        "TLS": (bytes.fromhex("16030100c8010000c40303") + os.urandom(180), False),
        "HTTP": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
        "half of a prefix": (b"pps", True),
        "nothing": (b"", True),
        "nothing, and a reset": (b"", False),
    }


class Strangers:
    """They come and go, `at_once` of them at most."""

    def __init__(self, places: list[list], num: int, at_once: int) -> None:
        self._places, self._num, self._at_once = places, num, at_once
        self._draw = random.Random(0)
        self._kinds = list(kinds().items())
        self._selector = selectors.DefaultSelector()
        self._leaves_s: dict[socket.socket, float] = {}
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """All of them."""
        started = 0
        while started < self._num or self._leaves_s:
            now = time.monotonic()
            for stranger, leaves_s in list(self._leaves_s.items()):
                if leaves_s <= now:
                    self._end(stranger)
            while started < self._num and len(self._leaves_s) < self._at_once:
                self._begin()
                started += 1
            for key, _ in self._selector.select(0.005):
                self._hears(key.fileobj)

    def _begin(self) -> None:
        name, (says, stays) = self._draw.choice(self._kinds)
        family, place = self._draw.choice(self._places)
        place = place if family == socket.AF_UNIX else tuple(place)
        stranger = socket.socket(family)
        stranger.settimeout(5)
        self.counts[name] += 1
        try:
            stranger.connect(place)
            stranger.sendall(says)
        except OSError:
            self.counts["refused, or hung up on at once"] += 1
            stranger.close()
            return
        stranger.setblocking(False)
        if name.endswith("reset"):
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._leaves_s[stranger] = time.monotonic() + (_STAY_S if stays else 0.0)
        self._selector.register(stranger, selectors.EVENT_READ)

    def _hears(self, stranger: socket.socket) -> None:
        try:
            if stranger.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end(stranger)

    def _end(self, stranger: socket.socket) -> None:
        if stranger in self._leaves_s:
            del self._leaves_s[stranger]
            self._selector.unregister(stranger)
            stranger.close()


# ---- the pipeline -------------------------------------------------------------------------------


def listening(pid: int) -> Iterator[tuple[int, object]]:
    """(family, address) of what a process listens at."""
    inodes = set()
    for number in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(number)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]:
        cells = line.split()
        if cells[3] == "0A" and cells[9] in inodes:
            yield socket.AF_INET, ("127.0.0.1", int(cells[1].rpartition(":")[2], 16))
    for line in Path("/proc/net/unix").read_text("ascii").splitlines()[1:]:
        cells = line.split()
        if len(cells) == 8 and cells[3] == "00010000" and cells[6] in inodes:
            yield socket.AF_UNIX, "\0" + cells[7].removeprefix("@")


def usage(pid: int) -> tuple[int, float]:
    """Open files, and resident MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def serve(driver: Driver, ids: Iterator[int], look: Callable[[], None]) -> tuple[list, float]:
    """One round of the requests: the tokens of each, and output tokens/s."""
    started = time.monotonic()
    tokens: dict[int, list[int]] = {}
    for k in range(NUM_REQUESTS):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, seed=k)
        request = Request(id=RequestId(next(ids)), prompt=(7,) * (40 + 11 * k), params=params)
        tokens[request.id] = []
        driver.submit([request])
    looks_s = started
    while driver.engine.num_unfinished:
        for output in driver.outputs(0.5):
            tokens[output.request_id].append(output.token)
        if time.monotonic() > looks_s:
            look()
            looks_s = time.monotonic() + 0.2
    num = sum(map(len, tokens.values()))
    return list(tokens.values()), num / (time.monotonic() - started)


def nothing() -> None: ...


def attacked(num: int, at_once: int) -> dict:
    """All figures."""
    ids = count()
    with Driver(emulated_setup(make_config({}, CONFIG))) as driver:
        pids = {"driver": os.getpid()}
        pids |= {f"keeper {rank}": keeper.pid for rank, keeper in driver.fleet.keepers.items()}
        pids |= {f"stage {stage.stage}": stage.pid for stage in driver.stages}
        places = [place for pid in pids.values() for place in listening(pid)]
        serve(driver, ids, nothing)
        alone = [serve(driver, ids, nothing) for _ in range(2)]
        before = {name: usage(pid) for name, pid in pids.items()}
        most = dict(before)

        def look() -> None:
            for name, pid in pids.items():
                most[name] = tuple(map(max, most[name], usage(pid)))

        command = [sys.executable, __file__, "--num", str(num), "--at-once", str(at_once)]
        strangers = subprocess.Popen(
            [*command, "--come-to", json.dumps(places)], stdout=subprocess.PIPE, text=True
        )
        beside = []
        while strangers.poll() is None or not beside:
            beside.append(serve(driver, ids, look))
        serve(driver, ids, nothing)
        after = {name: usage(pid) for name, pid in pids.items()}
        return {
            "listening": [str(place).replace("\0", "@") for _, place in places],
            "strangers": json.loads(strangers.communicate()[0]),
            "rounds": len(beside),
            "same_tokens": all(tokens == alone[0][0] for tokens, _ in [*alone, *beside]),
            "tokens_per_s": {"alone": fmean(rate for _, rate in alone),
                             "beside_them": fmean(rate for _, rate in beside)},
            "usage": {name: [before[name], most[name], after[name]] for name in pids},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=100_000)
    parser.add_argument("--at-once", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--come-to", help="be the strangers: [[family, address], ...]")
    arguments = parser.parse_args()
    if arguments.come_to:
        strangers = Strangers(json.loads(arguments.come_to), arguments.num, arguments.at_once)
        strangers.run()
        print(json.dumps(strangers.counts))
        return
    found = attacked(arguments.num, arguments.at_once)
    if arguments.json:
        print(json.dumps(found))
        return
    print("listening:", ", ".join(found["listening"]))
    for kind, number in sorted(found["strangers"].items()):
        print(f"{number:8,} {kind}")
    rates = found["tokens_per_s"]
    print(f"the same tokens in {found['rounds']} rounds beside them: {found['same_tokens']}")
    print(f"output tokens/s: {rates['alone']:.0f} alone, {rates['beside_them']:.0f} beside them")
    columns = ["files before", "at most", "after", "MiB before", "at most", "after"]
    print(f"{'':<10}" + "".join(f"{column:>14}" for column in columns))
    for name, used in found["usage"].items():
        cells = [f"{files}" for files, _ in used] + [f"{mib:.1f}" for _, mib in used]
        print(f"{name:<10}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
