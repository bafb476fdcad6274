"""Who has given no sign of life for how long."""

from collections.abc import Hashable, Iterable

_GAP_S = 0.5
"""Who has not looked for so long was busy, or stood still: that time does not count."""


class Silence:
    """Of those who are asked for a sign of life, now and then. Reads no clock."""

    def __init__(self, longest_s: float) -> None:
        """From the moment at which one falls silent to that at which it is found: a quarter until
        it is asked, a half to answer, and the rest for two looks that come late."""
        self._period_s, self._patience_s = longest_s / 4, longest_s / 2
        self.look_s = min(longest_s / 8, _GAP_S / 2)
        """Between two looks, at most."""
        self._next_ask_s = float("-inf")
        self._since_s: dict[Hashable, float] = {}
        """When each was asked what it has not answered."""
        self._looked_s = float("inf")

    def is_time_to_ask(self, now: float, most_s: float = float("inf")) -> bool:
        """Once in a while; `most_s` is the longest while."""
        if now < self._next_ask_s:
            return False
        self._next_ask_s = now + min(self._period_s, most_s)
        return True

    def asked(self, who: Iterable[Hashable], now: float) -> None:
        for each in who:
            self._since_s.setdefault(each, now)

    def broken(self, who: Hashable) -> None:
        """It has given one, or is of no interest any more."""
        self._since_s.pop(who, None)

    def clear(self) -> None:
        self._since_s.clear()

    def lasts_s(self, who: Hashable, now: float) -> float:
        return now - self._since_s.get(who, now)

    def excuse(self, who: Hashable, seconds: float) -> None:
        """For so long it could not have given one."""
        if who in self._since_s:
            self._since_s[who] += seconds

    def too_long(self, now: float) -> list[tuple[Hashable, float]]:
        """Who has been silent for too long, and for how long. `now`: all that came before it is
        known."""
        gap_s = now - self._looked_s
        if gap_s > _GAP_S:
            for who in self._since_s:
                self._since_s[who] += gap_s
        self._looked_s = now
        silent = [(who, now - since_s) for who, since_s in self._since_s.items()]
        return [(who, lasts_s) for who, lasts_s in silent if lasts_s > self._patience_s]
