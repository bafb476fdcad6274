"""What a layer's linear work takes by number of tokens, beside reading its weights: as a profile
has it, corrected by size. Pure.

Libraries pick another kernel for another number of tiles, on all stages alike; so each size has a
factor. More tokens never take less time: what a size would have them take less than a smaller one
is not believed.
"""

from collections.abc import Callable
from math import exp

from pipeserve.core.cost.kernels import TILE

_WEIGHT = 0.1
"""Of the latest observation."""
_OCTAVES = (TILE // 2).bit_length()
"""Sizes up to half a tile, by powers of two; then each tile, up to `_MOST_TILES`."""
_MOST_TILES = 64


class TokenCurve:
    """`of` gives seconds twice: as if time rose evenly from one whole tile to the next, and as the
    profile steps."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        """`seconds`: of one layer, by number of tokens, weights and all."""
        self._seconds = seconds
        self.weights_s = seconds(1)
        self._known: dict[int, tuple[int, float, float]] = {}  # size, even and stepped seconds
        self._levels = [0.0] * (_OCTAVES + _MOST_TILES + 1)
        self._factors = [1.0] * len(self._levels)
        ends = [(1 << octave) - 1 for octave in range(_OCTAVES)] + [TILE // 2]
        ends += [TILE * tiles for tiles in range(1, _MOST_TILES + 1)]
        self._at_ends = [self._found(end)[1:] for end in ends]
        self._floors = [(0.0, 0.0), *[(-1.0, -1.0)] * (len(ends) - 1)]
        self._refloor(0)

    def of(self, num_tokens: int) -> tuple[float, float]:
        size, even, stepped = self._found(num_tokens)
        factor = self._factors[size]
        even, stepped = factor * even, factor * stepped
        least_even, least_stepped = self._floors[size]
        return (
            even if even > least_even else least_even,
            stepped if stepped > least_stepped else least_stepped,
        )

    def learn(self, num_tokens: int, error: float) -> None:
        """`error`: by what share of the whole prediction it was off because of the tokens."""
        size, *_ = self._found(num_tokens)
        self._levels[size] += _WEIGHT * error
        self._factors[size] = exp(self._levels[size])
        self._refloor(size)

    def _refloor(self, first: int) -> None:
        """No size takes less than the end of the one before."""
        for size in range(first, len(self._floors) - 1):
            factor, (even, stepped) = self._factors[size], self._at_ends[size]
            least_even, least_stepped = self._floors[size]
            found = max(factor * even, least_even), max(factor * stepped, least_stepped)
            if found == self._floors[size + 1]:
                return
            self._floors[size + 1] = found

    def _found(self, num_tokens: int) -> tuple[int, float, float]:
        found = self._known.get(num_tokens)
        if found is None:
            below = num_tokens // TILE * TILE
            low, high = (self._seconds(max(tokens, 1)) for tokens in (below, below + TILE))
            least = max(below, 1)
            share = (num_tokens - least) / (below + TILE - least)
            stepped = self._seconds(num_tokens) - self.weights_s
            even = low + share * (high - low) - self.weights_s
            found = self._known[num_tokens] = _size(num_tokens), max(even, 0.0), max(stepped, 0.0)
        return found


def _size(num_tokens: int) -> int:
    if num_tokens <= TILE // 2:
        return min(num_tokens.bit_length(), _OCTAVES)
    return _OCTAVES + min(-(-num_tokens // TILE), _MOST_TILES)
