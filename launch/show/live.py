"""`--live`: a run in the terminal while it goes on, a few frames a second, on stderr.

Frames are made by a process of their own at the lowest priority; the driver only hands it records,
a batch for each frame, when it has just sent a plan and the stages are busy. A batch that the
process is too slow to take is dropped: the run waits for nothing.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live

from pipeserve.core.records import Planned, Record, Recorder, ignore
from pipeserve.launch.show.live_frame import LiveFrame

FRAME_S = 0.25
_MOST_SHARE = 0.25
"""Of the drawing process's time that it draws."""
_MOST_HELD = 1000
"""Records and chunks in a batch: well under what the socket takes at once."""
_BUFFER_BYTES = 1 << 20
_CLOSE_S = 2.0


class Feed:
    """Hands records on in batches; drops those that are not taken at once."""

    def __init__(self, to: socket.socket) -> None:
        self._to = to
        to.setblocking(False)
        to.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._batch: list[Record] = []
        self._held = 0
        self._next_s = 0.0
        self.num_dropped = 0

    def record(self, record: Record) -> None:
        """The `Recorder`."""
        self._batch.append(record)
        is_plan = type(record) is Planned
        self._held += 1 + (len(record.chunks) if is_plan else 0)
        if self._held > _MOST_HELD:
            self.flush()
        elif is_plan and record.sent_s >= self._next_s:
            self._next_s = record.sent_s + FRAME_S
            self.flush()

    def flush(self) -> None:
        """Hand over what there is."""
        batch, self._batch, self._held = self._batch, [], 0
        try:
            self._to.send(pickle.dumps(batch))
        except OSError:  # its buffer is full, or it has ended
            self.num_dropped += len(batch)


@contextlib.contextmanager
def live_view(meta: Mapping[str, Any], console: Console) -> Iterator[Recorder]:
    """Shows a run while it goes on; gives the recorder to feed it with. Where `console` (on stderr)
    is no terminal, says so in one line and shows nothing."""
    if not console.is_terminal:
        console.print("--live shows nothing: stderr is no terminal")
        yield ignore
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "pipeserve.launch.show.live", str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as drawer:
        theirs.close()
        feed = Feed(ours)
        ours.send(pickle.dumps(dict(meta)))
        try:
            yield feed.record
        finally:
            feed.flush()
            ours.close()  # which ends it
            try:
                drawer.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                drawer.kill()


def draw(source: socket.socket, console: Console) -> None:
    """Draws what comes from `source` until that is closed; the last frame is wiped away."""
    source.settimeout(FRAME_S)
    view = LiveFrame(pickle.loads(source.recv(_BUFFER_BYTES)))
    next_s = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            with contextlib.suppress(TimeoutError):
                batch = source.recv(_BUFFER_BYTES)
                if not batch:
                    return
                view.take(pickle.loads(batch))
            start_s = time.monotonic()
            if start_s >= next_s:
                live.update(view.frame(start_s, console.width), refresh=True)
                spent_s = time.monotonic() - start_s
                next_s = start_s + max(FRAME_S, spent_s / _MOST_SHARE)


def main() -> None:
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends first, and closes the socket
    with socket.socket(fileno=int(sys.argv[1])) as source, contextlib.suppress(BrokenPipeError):
        draw(source, Console(stderr=True))


if __name__ == "__main__":
    main()
