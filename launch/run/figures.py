"""What becomes of the stages' time while a server runs, for its metrics.

A process of its own makes the figures (`figures_process.py`); the driver only packs its records and
hands them over. It waits for nothing: what is not taken in time is dropped, and counts as unknown.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections import deque

import msgspec

from pipeserve.core.records import Record
from pipeserve.launch.run.figures_process import BROKEN, MODULE, MOST_BYTES, WHOLE
from pipeserve.profiling.recording.packed import pack
from pipeserve.wire.client import StageFigures

_PAGE_BYTES = 1 << 15
_MOST_PAGES = 64
"""That wait to be taken."""
_END_S = 2.0

_decode = msgspec.msgpack.Decoder(list[StageFigures]).decode


class RunningFigures:
    """The driver's side. `record` is its recorder, and `latest` what it tells its client."""

    def __init__(self, num_stages: int) -> None:
        self._latest: list[StageFigures] = []
        self._page = bytearray([WHOLE])
        self._pages: deque[bytearray] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno()), str(num_stages)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # it solves for five unknowns
            )

    def record(self, record: Record) -> None:
        page = self._page
        pack(record, page)
        if len(page) >= _PAGE_BYTES:
            self._hand_over()

    def latest(self) -> list[StageFigures]:
        """Of each stage, as they were a few seconds ago; nothing before the first ones, nor after
        their process has ended. The first call says that the stages are up."""
        if len(self._page) > 1 or not self._latest:
            self._hand_over()
        try:
            while answer := self._socket.recv(MOST_BYTES):
                self._latest = _decode(answer)
            self._latest = []
        except BlockingIOError:
            pass  # it says no more now
        except OSError:
            self._latest = []
        return self._latest

    def _hand_over(self) -> None:
        self._pages.append(self._page)
        with contextlib.suppress(OSError):  # its buffer is full, or it has ended
            while self._pages:
                self._socket.send(self._pages[0])
                self._pages.popleft()
        is_full = len(self._pages) > _MOST_PAGES
        if is_full:
            self._pages.pop()
        self._page = bytearray([BROKEN if is_full else WHOLE])

    def close(self) -> None:
        """Ends the process."""
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "RunningFigures":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
