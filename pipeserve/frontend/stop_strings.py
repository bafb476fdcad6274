"""Stop strings: where growing text ends, however it was cut into pieces."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Cuts growing text at the stop string that is complete first, and holds back what may be the
    beginning of one.

    Of several that are complete at the same character, the one that begins first counts. So the
    result depends on the text alone.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """`include`: the text keeps the stop string. Nothing need be held back then."""
        self._matcher = _matcher(tuple(stop)) if stop else None
        self._include = include
        self._state = 0
        self._held = ""
        self.found = ""
        """The stop string that ended the text."""

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that is now safe to show. Where a stop string becomes complete in `text`, sets
        `found`, and the text ends there. Unless it may not end yet: what is complete with this
        piece is no stop string then, but what begins in it may become one."""
        matcher, state = self._matcher, self._state
        if matcher is None:
            return text
        held = self._held + text
        for place, char in enumerate(text, start=1 + len(self._held)):
            state = matcher.next(state, char)
            matched = matcher.matched[state]
            if matched and may_end:  # some of it may have been shown already
                self.found, self._held = matched, ""
                return held[: place if self._include else place - len(matched)]
        self._state = state
        num_safe = len(held) - (0 if self._include else matcher.depth[state])
        self._held = held[num_safe:]
        return held[:num_safe]

    def flush(self) -> str:
        """What was held back, when no stop string came of it."""
        text, self._held = self._held, ""
        return text


class _Matcher:
    """Finds any of several strings in a text that comes letter by letter, in constant time each.

    States are the beginnings of the strings; a text is in the state of the longest one that it ends
    with. Source: Aho, Corasick, "Efficient string matching", CACM 18(6), 1975.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]  # of each state: letters of its beginning
        self.matched = [""]  # the longest string that it ends with
        self._fall = [0]  # the longest other state that it ends with
        self._next: list[dict[str, int]] = [{}]
        for string in strings:
            self._add(string)
        self._link()

    def next(self, state: int, char: str) -> int:
        """The state of a text in `state` and one more letter."""
        while char not in self._next[state]:
            if not state:
                return 0
            state = self._fall[state]
        return self._next[state][char]

    def _add(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self.matched.append("")
                self._fall.append(0)
                self._next.append({})
            state = self._next[state][char]
        self.matched[state] = string

    def _link(self) -> None:
        """By rising depth, so that what a state falls back to is known before it is asked for."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self.matched[state] = self.matched[state] or self.matched[self._fall[state]]
            for char, child in self._next[state].items():
                self._fall[child] = self.next(self._fall[state], char)
                queue.append(child)


@lru_cache(maxsize=64)
def _matcher(strings: tuple[str, ...]) -> _Matcher:
    """The same for all requests that stop at the same strings."""
    return _Matcher(strings)
