"""Ours, and the default: microbatches of equal predicted time on the bottleneck stage.

A token's time between tokens (TBT) is the time of all microbatches of one turn through the
pipeline, so what is budgeted is time. Without a cost model, a token counts as a unit of it.

- **Time.** A microbatch never takes longer than where larger ones hardly raise throughput, nor so
  long that a turn of them is over the limit between tokens; and none makes a decode late that is in
  it or in flight.
- **Decodes** go first, spread over the microbatches of a turn by what they cost, context length
  counted.
- **Prompts** fill the rest, in order (`core/order.py`; shortest first where the run says nothing):
  each microbatch takes an even share of those that can run, so that none goes without while another
  has plenty; where no limit between tokens is set, in pieces of which decodes and prompts together
  wait least. Those of one precedence advance side by side; chunks of one that is alone follow at
  once.
- **KV**: what is free is handed out over several turns, so that a pool that fills up slows prompts
  down little by little. Decodes take blocks as they need them; an admission leaves a free block for
  each running request.

It plans one microbatch ahead. How it came about, and what it gives: docs/schedules.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from pipeserve.core.cost.kernels import TILE
from pipeserve.core.nouns import RequestId
from pipeserve.core.policies.fcfs import make_room
from pipeserve.core.policies.mix import Mix, Price
from pipeserve.core.view import Draft, RequestView, Traits, View, Why

# "Seconds" below are tokens where there is no cost model.

MARGIN = 0.96
"""Share of the wanted time between tokens (`Limits.max_tbt_s`) that is planned for; the rest is for
what the forecast cannot know."""
KNEE = 0.98
"""A microbatch needs no more prefill tokens than it takes to reach this share of the most that any
size gives a second: larger ones only make turns longer."""
ENOUGH = 0.9
"""The same without a limit between tokens, where a turn is as long as its prompts make it: longer
pieces hold up decodes, and these are left over when no prompt is there any more to share the
reading of weights with."""
TOLERANCE = 1.08
"""A microbatch may cost so many times its budget, which is made for a mean number of decodes: else
one with a few more would not fill its last tile, that costs the same full or not."""
TURNS = 8
"""What KV has room for is prefilled over at least so many turns (gLLM's UT throttles likewise)."""
MIN_PIECE = TILE // 2
"""Smallest prefill chunk worth a microbatch: with fewer tokens than half a tile, reading the
weights costs a stage more than the tokens do."""


class Uniform:
    """See the module."""

    name = "uniform"
    traits = Traits(
        plans_ahead=True, chunk_pipelining=True, one_in_flight=False, reads_cost=True, order="sjf"
    )

    def __init__(self) -> None:
        self._knee = self._look_again_at = 0
        """The latter counts microbatches that were planned."""
        self._prompt_share = 0
        """Tokens of the largest share of prompts since there were none at hand."""

    def compose(self, view: View, now: float) -> Draft:
        price = Price(view)
        longest = self._longest(view, price)
        ready = _ready(view)
        room = make_room(view, ready[: _num_decodes(view, price, ready)])
        if room.preempted:
            return Draft(chunks=room.decodes, preempt=room.preempted)
        decodes, left = ready[: len(room.decodes)], ready[len(room.decodes) :]
        mix = Mix(price, view, decodes, now)
        bound, limit = self._budget(view, price, longest)
        due_s = _due_s(view, price, decodes, left)
        prompts = _add_prompts(view, mix, room.free_blocks, limit, longest, due_s)
        return Draft(
            chunks=prompts.chunks | room.decodes,
            admit=prompts.reserve,
            wait="kv" if prompts.out_of_blocks else "token",
            why=Why(bound, limit, due_s),
        )

    def _longest(self, view: View, price: Price) -> float:
        """What no microbatch takes longer than. The knee is looked for ever less often."""
        num_planned = view.last.index + 1 if view.last is not None else 0
        if num_planned >= self._look_again_at:
            self._knee = _knee(view, price, self._knee)
            self._look_again_at = max(8, 2 * num_planned)
        if not price.is_time:
            return view.limits.max_num_batched_tokens
        return min(TOLERANCE * price.on_bottleneck(0, 0, self._knee), _longest_in_a_turn(view))

    def _budget(self, view: View, price: Price, longest: float) -> tuple[str, float]:
        """What bounds the next microbatch, and how long it may take: its even share of the prompts
        that can run, as far as KV goes, beside a mean share of decodes.

        Without a limit between tokens no share is smaller than those before it, until no prompt is
        at hand: of what is left it would shrink, and the last prompts drag on beside decodes that
        each of their chunks holds up."""
        flying = sum([outstanding.num_prefill_tokens for outstanding in view.outstanding])
        num_prompts, num_tokens = _at_hand(view)
        total = num_tokens + flying
        pieces = max(1, min(view.window, total // MIN_PIECE))
        if view.limits.max_tbt_s is None and num_prompts:
            most = self._knee if price.is_time else view.limits.max_num_batched_tokens
            pieces = _pieces(view, price, num_prompts, total, max(pieces, -(-total // most)))
        share = -(-total // pieces)
        if view.limits.max_tbt_s is None:
            share = max(share, self._prompt_share)
            self._prompt_share = share if num_prompts else 0
        bounds = {"share": share, "kv": _room_in_kv(view, flying)}
        bound = min(bounds, key=bounds.__getitem__)
        seconds = _filled(view, price, bounds[bound])
        return (bound, seconds) if seconds <= longest else ("longest", longest)


# ---- time: how long a microbatch may take -------------------------------------------------------


def _longest_in_a_turn(view: View) -> float:
    """How long a microbatch may take so that a turn is within the limit between tokens. A turn is
    one for each that may be outstanding, and at least one for each stage, which each has to cross.
    """
    if view.limits.max_tbt_s is None:
        return inf
    return MARGIN * view.limits.max_tbt_s / max(view.window, view.forecast.num_stages)


def _knee(view: View, price: Price, last: int) -> int:
    """Prefill tokens from which on larger microbatches hardly raise throughput, of those within the
    limit between tokens. It is looked for ever less often, and stays the `last` one where that is
    nearly as good: a cost that is learnt would move it, and the length of turns, back and forth.
    One tile is never enough: the decodes beside it would begin another. Without a limit, where less
    is enough, a mean share of decodes counts with it: they share weights and tiles."""
    most = view.limits.max_num_batched_tokens
    tiles = [count << power for power in range(7) for count in (2, 3)]
    sizes = [size * TILE for size in tiles if size * TILE < most] + [most]
    share, beside, context = KNEE, 0, 0
    if view.limits.max_tbt_s is None:
        share = ENOUGH
        beside, context = _mean_decodes(view)
    seconds = {size: _of_tiles(price, size, beside, context) for size in sizes}
    allowed = max(seconds[sizes[0]], _longest_in_a_turn(view))
    rates = {size: (size + beside) / took for size, took in seconds.items() if took <= allowed}
    enough = share * max(rates.values())
    return next(
        size for size, rate in rates.items() if rate >= (KNEE * enough if size == last else enough)
    )


def _of_tiles(price: Price, num_tokens: int, beside: int, context: int) -> float:
    """What so many prefill tokens, `beside` decodes, cost in chunks of a tile each. (One long chunk
    would cost more, for its positions read each other; but its prompt has to read them anyway.)"""
    whole, rest = divmod(num_tokens, TILE)
    return max(price.of(beside, context, ((0, TILE),) * whole + ((0, rest),) * (rest > 0)))


def _due_s(
    view: View, price: Price, decodes: Sequence[RequestView], left: Sequence[RequestView]
) -> float:
    """When the microbatch has to be through, so that none of its decodes is late, nor of those that
    come behind it: ready ones that are `left`, and the next turn of those in flight. inf without a
    limit between tokens."""
    max_tbt_s = view.limits.max_tbt_s
    if max_tbt_s is None or not price.is_time:
        return inf
    mean = view.decoding_context // max(1, view.num_decoding)
    last_s = [_last_token_s(view, decode) for decode in decodes]
    if left:
        behind_s = price.on_bottleneck(len(left), len(left) * mean)
        last_s.append(_last_token_s(view, left[0]) - behind_s)
    here = {decode.token_from for decode in decodes}
    for other in view.outstanding:
        if other.num_decodes and other.index not in here:
            behind_s = price.on_bottleneck(other.num_decodes, other.num_decodes * mean)
            last_s.append(view.forecast.known_s(other.index) - behind_s)
            break  # those after it have more time
    return min(last_s, default=inf) + MARGIN * max_tbt_s


def _last_token_s(view: View, decode: RequestView) -> float:
    """When the token came that the decode goes on from, or will, by the forecast."""
    if decode.token_from is None:
        return decode.last_token_s
    return view.forecast.known_s(decode.token_from) if view.cost is not None else inf


# ---- decodes: which of them go now --------------------------------------------------------------


def _ready(view: View) -> list[RequestView]:
    """A decode whose token is still on its way is taken only when the window is full and the token
    comes with the oldest microbatch: then it is there about when stage 0 gets to it. Any earlier,
    stage 0 would stand still before it, and a prompt that comes meanwhile would queue behind."""
    is_full = len(view.outstanding) >= view.window
    oldest = view.outstanding[0].index if is_full else None
    decodes: list[RequestView] = []
    for decode in islice(view.decodes.values(), view.limits.max_num_batched_tokens):
        if decode.token_from is not None and decode.token_from != oldest:
            break
        decodes.append(decode)
    return decodes


def _num_decodes(view: View, price: Price, decodes: Sequence[RequestView]) -> int:
    """How many of `decodes`, from the first, make up one microbatch's even share of the work of all
    decodes in a turn. One that does not divide is rounded up, or one of them would miss its turn;
    what contexts differ by from group to group is not worth another."""
    per_position = _tokens_per_position(view, price)
    share = (view.num_decoding + per_position * view.decoding_context) / view.window
    for place, decode in enumerate(decodes):
        cost = 1 + per_position * decode.num_planned
        if share < cost / (2 * view.window) and place:
            return place
        share -= cost
    return len(decodes)


def _mean_decodes(view: View) -> tuple[int, int]:
    """How many decodes a microbatch of this turn has on average, and their context in all."""
    return view.num_decoding // view.window, view.decoding_context // view.window


def _tokens_per_position(view: View, price: Price) -> float:
    """What attention to one position of context costs, in tokens: as a share of what one of many
    costs in the linear layers. It is a mean over all decodes, for the slope of a learnt cost may be
    0 or less; and never below 0, or a share of a turn might be no decode at all."""
    if not price.is_time or not view.decoding_context:
        return 0.0
    num_decodes, context = view.num_decoding // view.window + 1, view.decoding_context
    reads = price.on_bottleneck(num_decodes, context) - price.on_bottleneck(num_decodes, 0)
    tokens = price.on_bottleneck(8 * TILE, 0)
    return max(0.0, reads / context / (tokens / (8 * TILE)))


# ---- prompts: how much of them, and which -------------------------------------------------------


def _at_hand(view: View) -> tuple[int, int]:
    """Prompts that have begun, and those that there is a seat for (`max_num_seqs`): how many, and
    their tokens."""
    seats = max(0, view.limits.max_num_seqs - len(view.running))
    if seats >= len(view.waiting):
        return len(view.prefills) + len(view.waiting), view.prefill_backlog
    prompts = [*view.prefills.values(), *islice(view.waiting.values(), seats)]
    return len(prompts), sum([request.num_unplanned for request in prompts])


def _pieces(view: View, price: Price, num_prompts: int, total: int, fewest: int) -> int:
    """Into how many pieces `total` tokens of prompts are cut where no limit between tokens says how
    long a turn may be: so that all wait as little as they can, together. Prompts wait for as many
    microbatches as there are pieces and, since a piece is in the way of all on one stage after the
    other, for one more at each seam between stages; decodes for what it adds to each of these.

    As long as more prompts are at hand than requests decode, it is the fewest: those that come out
    of the first pieces are held up by each of the others, and until then small ones serve hardly
    anyone. (The costs that are learnt by then are too rough to tell how few are few enough.)"""
    if num_prompts > view.num_decoding + 1:
        return fewest
    num_decodes, context = _mean_decodes(view)
    weights = 0 if price.is_time else MIN_PIECE  # reading them counts as so many tokens
    alone = weights + price.on_bottleneck(num_decodes, context)

    def wait(pieces: int) -> float:
        seconds = weights + price.on_bottleneck(num_decodes, context, -(-total // pieces))
        together = num_prompts * seconds + view.num_decoding * (seconds - alone)
        return (pieces + max(1, view.forecast.num_stages - 1)) * together

    tried = (fewest * (step << power) // 2 for power in range(6) for step in (2, 3))
    return min((pieces for pieces in tried if pieces <= total), key=wait)


def _filled(view: View, price: Price, num_prefill: int) -> float:
    """How long so many prefill tokens take beside a mean share of decodes; with a limit between
    tokens, or as many as make whole tiles, where each costs less then."""
    num_decodes, context = _mean_decodes(view)
    num_tokens = num_decodes + num_prefill
    if not price.is_time:
        return num_tokens
    seconds = price.on_bottleneck(num_decodes, context, num_prefill)
    if view.limits.max_tbt_s is not None:
        tiles = -(-num_tokens // TILE) * TILE
        whole = price.on_bottleneck(num_decodes, context, tiles - num_decodes)
        if whole * num_tokens <= seconds * tiles:
            seconds = whole
    return TOLERANCE * seconds


def _room_in_kv(view: View, flying: int) -> int:
    """Prefill tokens of a microbatch, when all that KV has room for is spread over `TURNS` turns:
    free blocks but one for each running request, and what has its blocks and is not computed."""
    begun = sum([request.num_unplanned for request in view.prefills.values()])
    free = max(0, view.free_blocks - len(view.running)) * view.limits.block_size
    return max(MIN_PIECE, (begun + free + flying) // (view.window * TURNS))


@dataclass(slots=True)
class _Prompts:
    chunks: dict[RequestId, int] = field(default_factory=dict)
    reserve: dict[RequestId, int] = field(default_factory=dict)
    out_of_blocks: bool = False


def _add_prompts(
    view: View, mix: Mix, free: int, limit: float, longest: float, due_s: float
) -> _Prompts:
    """Chunks of prompts, those that go first in front, until one does not fit whole. When KV has no
    room for a waiting prompt, those that run already go on, and no other is admitted."""
    prompts = _Prompts()
    seats = view.limits.max_num_seqs - len(view.running)

    def may_start() -> bool:
        return len(prompts.reserve) < seats and not prompts.out_of_blocks

    for request in _in_order(view, may_start):
        start, missing = request.num_planned, 0
        is_waiting = request.id in view.waiting
        if is_waiting:
            prefix = view.prefix(request.id)
            start = prefix.num_tokens
            needed = -(-request.num_known // view.limits.block_size)
            missing = needed - prefix.num_blocks + prefix.num_idle
            num_running = len(view.running) + len(prompts.reserve)
            if missing + num_running > free and num_running:
                prompts.out_of_blocks = True
                continue
        left = request.num_known - start
        tokens = mix.fitting(start, left, limit, due_s)
        if not tokens and not prompts.chunks:
            tokens = _least(view, mix, start, left, limit, longest, due_s)
        if not tokens:
            break
        mix.add(start, tokens)
        prompts.chunks[request.id] = tokens
        if is_waiting:
            prompts.reserve[request.id] = request.num_known
            free -= missing
        if tokens < left:
            break
    return prompts


def _least(
    view: View, mix: Mix, start: int, left: int, limit: float, longest: float, due_s: float
) -> int:
    """Positions of the first prompt, of which none fits into the budget: a small piece, if only
    what is before it, which it has to read, is too much for a budget that is made for chunks
    without. Whatever the limits, where waiting would not help: the decodes or the piece alone take
    longer than any microbatch may, or nothing else is under way."""
    piece = min(left, MIN_PIECE)
    alone_s = max([mix.alone_s(start, piece), *(mix.seconds() if mix.num_tokens else ())])
    if alone_s > longest or not (view.outstanding or mix.num_tokens):
        return mix.fitting(start, piece, inf, inf)
    if start and mix.fitting(0, piece, limit, due_s) == piece:
        return mix.fitting(start, piece, longest, due_s)
    return 0


def _in_order(view: View, may_start: Callable[[], bool]) -> Iterator[RequestView]:
    """Prompts that go on and, as long as `may_start` says so, that start: the first in order first.
    Of the same precedence those that go on come before those that start, and these before those
    with a chunk in flight: so as many advance side by side as microbatches are outstanding, and a
    short prompt does not wait for all of a long one."""

    def place(begun: RequestView) -> tuple[float, bool]:
        return begun.precedence, begun.num_outstanding > 0

    waiting = _startable(view)
    new = next(waiting, None)
    for begun in sorted(view.prefills.values(), key=place):
        while new is not None and (new.precedence, False) < place(begun) and may_start():
            yield new
            new = next(waiting, None)
        yield begun
    while new is not None and may_start():
        yield new
        new = next(waiting, None)


def _startable(view: View) -> Iterator[RequestView]:
    """Waiting requests, in order. One that was preempted and is still in flight cannot start yet:
    those of its precedence may, and later ones wait for it."""
    last = inf
    for request in view.waiting.values():
        if request.precedence > last:
            return
        if request.num_outstanding:
            last = request.precedence
        else:
            yield request
