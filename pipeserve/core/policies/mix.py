"""A microbatch in the making, and what it would cost."""

from collections.abc import Sequence
from math import inf

from pipeserve.core.cost.kernels import TILE
from pipeserve.core.view import RequestView, View
from pipeserve.core.work import Work, new_work

Prefills = tuple[tuple[int, int], ...]
"""Of each chunk: positions before it, and its own."""


class Price:
    """What work costs: seconds on each stage or, without a cost model, a unit for each token."""

    def __init__(self, view: View) -> None:
        self.is_time = view.cost is not None
        self._seconds = view.cost.seconds if view.cost is not None else _tokens

    def of(self, num_decodes: int, context: int, prefills: Prefills = ()) -> Sequence[float]:
        num_tokens = num_decodes + sum([tokens for _, tokens in prefills])
        num_logits = num_decodes + len(prefills)
        return self._seconds(new_work((num_tokens, num_logits, prefills, num_decodes, context)))

    def on_bottleneck(self, num_decodes: int, context: int, num_prefill: int = 0) -> float:
        """Of the slowest stage, with one chunk of `num_prefill` positions."""
        prefills = ((0, num_prefill),) if num_prefill else ()
        return max(self.of(num_decodes, context, prefills))


def _tokens(work: Work) -> tuple[float, ...]:
    return (float(work.num_tokens),)


class Mix:
    """The decodes of a microbatch, and the prefill chunks that are fitted in beside them."""

    def __init__(self, price: Price, view: View, decodes: Sequence[RequestView], now: float):
        self._price = price
        self._forecast = view.forecast
        self._most_tokens = view.limits.max_num_batched_tokens
        self._prefills: Prefills = ()
        self.num_decodes = self.num_tokens = len(decodes)
        self.context = sum([decode.num_planned + 1 for decode in decodes])
        """Positions that the decodes read."""
        self.ready_s = now
        """When the tokens that are still on their way are there, by the forecast."""
        if price.is_time:
            sources = {d.token_from for d in decodes if d.token_from is not None}
            self.ready_s = max([now, *map(view.forecast.known_s, sources)])

    def seconds(self) -> Sequence[float]:
        return self._price.of(self.num_decodes, self.context, self._prefills)

    def add(self, start: int, tokens: int) -> None:
        self._prefills += ((start, tokens),)
        self.num_tokens += tokens

    def fitting(self, start: int, most: int, limit: float, due_s: float) -> int:
        """How many of the next `most` positions of a prompt, from `start` on, fit: the microbatch
        takes no longer than `limit` on any stage and leaves the last one by `due_s`. Time steps up
        behind a whole tile: it is mostly there that no more fits, so tiles are tried first."""
        most = min(most, self._most_tokens - self.num_tokens)
        if most <= 0 or self._fits(start, most, limit, due_s):
            return max(most, 0)
        tiles = [0, *range(TILE - self.num_tokens % TILE, most, TILE), most]
        place = self._last_fitting(start, tiles[:-1], limit, due_s)
        behind = range(tiles[place], tiles[place + 1])
        if len(behind) == 1 or not self._fits(start, behind[1], limit, due_s):
            return behind[0]
        return behind[1 + self._last_fitting(start, behind[1:], limit, due_s)]

    def alone_s(self, start: int, tokens: int) -> float:
        """Of a chunk, in a microbatch of its own, on the slowest stage."""
        return max(self._price.of(0, 0, ((start, tokens),)))

    def _last_fitting(self, start: int, sizes: Sequence[int], limit: float, due_s: float) -> int:
        """Place in `sizes` of the largest that fits; the first does, what is behind the last does
        not."""
        fits, too_many = 0, len(sizes)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(start, sizes[middle], limit, due_s):
                fits = middle
            else:
                too_many = middle
        return fits

    def _fits(self, start: int, tokens: int, limit: float, due_s: float) -> bool:
        prefills = (*self._prefills, (start, tokens))
        seconds = self._price.of(self.num_decodes, self.context, prefills)
        if max(seconds) > limit:
            return False
        return due_s == inf or self._forecast.through_s(seconds, self.ready_s) <= due_s
