"""What a start goes through, and how long each of it took: a line for each phase on stderr when it
is over, and while it lasts a line on a terminal that says how far it is.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """What it gives is called with how far the start is: `loading weights: 0.1 of 0.3 GB` is of the
    phase "loading weights", which ends when another one begins."""
    from rich.console import Console
    from rich.text import Text

    phase, began_s = _phase_of(text), time.monotonic()

    def say(text: str) -> None:
        shown.update(Text(text))  # names may have [brackets]
        begin(_phase_of(text))

    def begin(following: str) -> None:
        nonlocal phase, began_s
        if following != phase:
            now = time.monotonic()
            print(f"{phase}: {now - began_s:.1f} s", file=sys.stderr, flush=True)
            phase, began_s = following, now

    with Console(stderr=True).status(text) as shown:
        yield say
        begin("")


def _phase_of(text: str) -> str:
    return text.partition(":")[0]
