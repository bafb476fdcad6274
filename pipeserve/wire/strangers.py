"""Who was turned away from a port: said once on stderr, and counted from then on."""

import sys
from collections import Counter

_MOST_KINDS = 64
"""That are told apart: who has many addresses shall not fill memory with them."""


class TurnedAway:
    """Of one process."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """By (port, address of the peer, why)."""
        self.last = ""
        """Why the last one was."""

    def note(self, port: str, peer: str, why: str) -> None:
        """One more."""
        kind = (port, peer, why)
        if kind not in self.counts and len(self.counts) >= _MOST_KINDS:
            kind = (port, "others", "they are too many to be told apart")
        self.counts[kind] += 1
        self.last = why
        if self.counts[kind] == 1:
            print(f"warning: {peer} was turned away from {port}: {why}", file=sys.stderr)

    def sum_up(self) -> None:
        """Say what was only counted."""
        for (port, peer, why), count in self.counts.items():
            if count > 1:
                print(
                    f"warning: {peer} was turned away from {port} {count:,} times in all: {why}",
                    file=sys.stderr,
                )
        self.counts.clear()
