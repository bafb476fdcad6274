"""Sends on, while its owner computes, what the kernel does not take at once."""

import contextlib
import os
import socket
import threading
from collections import deque
from queue import SimpleQueue

_NO_LIMIT_S = 1e6
"""A timeout, so that the socket stays one that does not block, for its owner who receives on it."""


class Pump:
    """The sending half of one socket. A small message never leaves its owner's thread."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._queue: SimpleQueue[list[memoryview] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_given = 0
        self._num_done = 0
        """Of the messages that were given to the thread: nobody but it sends until they are."""

    def send(self, parts: list[memoryview]) -> None:
        """Returns at once; keeps the parts' memory until it is on its way."""
        if self._num_given == self._num_done:
            parts = self._send_now(parts)
            if not parts:
                return
        if self._thread is None:
            own = socket.socket(fileno=os.dup(self._socket.fileno()))
            own.settimeout(_NO_LIMIT_S)
            self._thread = threading.Thread(target=self._run, args=(own,), daemon=True)
            self._thread.start()
        self._num_given += 1
        self._queue.put(parts)

    def close(self) -> None:
        """What is on its way is lost."""
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # ends the thread's own wait
            self._queue.put(None)
            self._thread.join()

    def _send_now(self, parts: list[memoryview]) -> list[memoryview]:
        """What the kernel does not take of them."""
        rest = deque(parts)
        try:
            while rest:
                num_bytes = self._socket.sendmsg(rest)
                while rest and num_bytes >= rest[0].nbytes:
                    num_bytes -= rest.popleft().nbytes
                if rest:
                    rest[0] = rest[0][num_bytes:]
        except BlockingIOError:
            return list(rest)
        except OSError:  # the peer is gone: its keeper tells
            return []
        return []

    def _run(self, own: socket.socket) -> None:
        with own:
            while (parts := self._queue.get()) is not None:
                with contextlib.suppress(OSError):
                    for part in parts:
                        own.sendall(part)
                self._num_done += 1
