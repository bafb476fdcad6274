"""Ours, and the default: microbatches of equal predicted time on the bottleneck stage.

A token's time between tokens (TBT) is the time of all microbatches of one turn through the
pipeline, so what is budgeted is time. Without a cost model, a token counts as a unit of it.

- **How long** a microbatch may take (`_Budget`): its even share of the prompts that can run, spread
  over some turns, so that none goes without while another has plenty; never longer than P times of
  it fit into the limit between tokens or, without a limit, than where larger ones hardly raise
  throughput; nor longer than KV sustains, for slow turns keep more requests alive.
- **Decodes** go first, spread over the microbatches of a turn by what they cost, context length
  counted. With a limit between tokens all that are ready go at once, unless there are so many more
  than a share that they are evened out, and none is late for it.
- **Prompts** fill the rest, in order (`core/order.py`; shortest first where the run says nothing).
  Chunks of one prompt follow one another at once, and are cut so that no decode of this
  microbatch, or of those in flight, is predicted to come late.
- **KV** is taken as decodes need it; an admission leaves a free block for each running request.
- **In a lull**, where decodes alone would make many microbatches that mostly read weights, decodes
  wait for the next to complete and go with it, as long as the turn stays well within the time that
  it takes under load. Only with a limit between tokens, which says how long a turn may be.

It plans one microbatch ahead. How it came about, and what it gives: docs/schedules.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from math import inf

from pipeserve.core.cost.kernels import TILE
from pipeserve.core.nouns import RequestId
from pipeserve.core.policies.fcfs import make_room
from pipeserve.core.policies.mix import Mix, Price
from pipeserve.core.view import Draft, RequestView, Traits, View, Why

# What a microbatch may cost. "Seconds" below are tokens where there is no cost model.

MARGIN = 0.96
"""Share of the wanted time between tokens (`Limits.max_tbt_s`) that is planned for; the rest is for
what the forecast cannot know."""
KNEE = 0.98
"""A microbatch needs no more prefill tokens than it takes to reach this share of the most that any
size gives a second: larger ones only make turns longer."""
SPREAD = 4
"""Prompts are spread over so many turns. Prefilled at once they leave microbatches of few decodes
behind them, and while one stage has a large microbatch, the next has a small one and then waits."""
ENOUGH = 0.85
"""They are spread only so far that a microbatch has as many tokens as it takes to reach this share
of the most that any size gives a second: smaller ones mostly read weights."""
TOLERANCE = 1.08
"""A microbatch may cost so many times its budget: matrix products work in whole tiles, so a chunk
may fill the tile that it has begun."""
ROUND_UP = 0.7
"""Where a budget ends inside a tile, at least 1 - ROUND_UP of the tile must be within the budget
for it to be filled; else the budget ends with the tile before."""
MIN_PIECE = TILE // 2
"""Smallest prefill chunk worth a microbatch: with fewer tokens than half a tile, reading the
weights costs a stage more than the tokens do."""

# How much prefill the KV pool can take.

SUSTAINED = 0.95
"""Share of the KV pool that decodes should fill when every microbatch is full."""
ENOUGH_ENDED = 20
"""So many requests must have ended before their outputs count as typical of the run."""
TURNS = 8
"""What KV has room for is prefilled over at least so many turns of the pipeline (gLLM's UT
throttles likewise)."""
MIN_THROTTLED = 3 * MIN_PIECE
"""Fewest prefill tokens that KV restricts a microbatch to: smaller ones cost more than the uneven
flow that they avoid."""

# How long a turn may be: the time until the same requests decode again. "Under load" is the turn of
# microbatches that are full.

LONGEST_TURN = 1.25
"""However long the limit between tokens is, a decode comes round within so many turns under load:
else a burst of prompts would hold up decodes, which occupy KV meanwhile."""
LONGEST_LULL = 0.55
"""In a lull, decodes may wait for others to go with only while their turn stays within this share
of a turn under load."""
SAVED_PER_DELAY = 0.25
"""Two groups of decodes are merged if that saves so many seconds of stage time for each second that
it adds to their turn. (Where reading weights is what takes long, one group costs hardly more.)"""
SPLIT_BELOW = 0.75
"""Ready decodes are split, so that a share of them goes alone, only if that share takes less than
so much of the time of all."""


class Uniform:
    """See the module."""

    name = "uniform"
    traits = Traits(
        plans_ahead=True, chunk_pipelining=True, one_in_flight=False, reads_cost=True, order="sjf"
    )

    def __init__(self) -> None:
        self._least = self._knee = self._looked_again_at = 0

    def compose(self, view: View, now: float) -> Draft:
        price = Price(view)
        num_planned = view.last.index + 1 if view.last is not None else 0
        if num_planned >= self._looked_again_at:
            self._least, self._knee = _least(view, price), _knee(view, price)
            self._looked_again_at = max(8, 2 * num_planned)
        budget = _Budget(view, price, self._least, self._knee)
        room = make_room(view, _decodes_in_turn(view, price, budget, now))
        if room.preempted:
            return Draft(chunks=room.decodes, preempt=room.preempted)
        decodes = [view.decodes[request_id] for request_id in room.decodes]
        mix = Mix(price, view, decodes, now)
        last_s = min((_last_token_s(view, decode) for decode in decodes), default=inf)
        if decodes and _waits_for_more(view, price, budget, mix, last_s):
            return Draft(wait="token")
        bound, limit = budget.of_this()
        due_s = _due_s(view, price, budget, decodes, last_s)
        if budget.is_hopeless(mix):
            limit, due_s = budget.of_piece(mix), inf
        longest = max(limit, budget.longest)
        prompts = _add_prompts(view, mix, room.free_blocks, limit, longest, due_s)
        return Draft(
            chunks=prompts.chunks | room.decodes,
            admit=prompts.reserve,
            wait="kv" if prompts.out_of_blocks else "token",
            why=Why(bound, limit, due_s),
        )


# ---- how long a microbatch may take -------------------------------------------------------------


class _Budget:
    """How long a microbatch may take: seconds on the bottleneck stage (tokens, without a cost
    model).

    A turn is the time until the same requests decode again: `in_turn` microbatches."""

    def __init__(self, view: View, price: Price, least: int, knee: int) -> None:
        self._view, self._price, self._least, self._knee = view, price, least, knee
        # What a mean microbatch of the turn holds.
        self._num_decodes = view.num_decoding // view.window
        self._context = view.decoding_context // view.window
        self.in_turn = max(view.window, view.forecast.num_stages)
        """A turn takes as long as so many microbatches: one for each that may be outstanding, and
        at least one for each stage, which every microbatch has to cross."""
        self.longest = self._longest()
        """No microbatch may take longer, however much there is to do."""

    def of_this(self) -> tuple[str, float]:
        """The name of what bounds the next microbatch, and how long it may take."""
        view = self._view
        flying = sum([outstanding.num_prefill_tokens for outstanding in view.outstanding])
        bounds: dict[str, float] = {
            "share": self._share(self._at_hand() + flying),
            "kv": self._throttled(flying),
        }
        if view.num_decoding:
            bounds["kv at length"] = self._sustained()
        bound = min(bounds, key=bounds.__getitem__)
        even, longest = self._filled(int(bounds[bound])), self.longest
        return (bound, even) if even <= longest else ("longest", longest)

    def _share(self, total: int) -> int:
        """Prefill tokens of a microbatch, when `total` of them are spread out evenly: over a turn
        or, where no limit between tokens says how long that may be, over `SPREAD` of them, if a
        mean microbatch has enough tokens for that with its decodes."""
        window = self._view.window
        pieces = min(window, total // MIN_PIECE)
        if self._view.limits.max_tbt_s is None:
            # A decode reads its context and has a row in the head: about two tokens of a prompt.
            least = max(self._least - 2 * self._num_decodes, self._least // 4, 1)
            pieces = max(pieces, min(window * SPREAD, total // least))
        return -(-total // max(1, pieces))

    def of_full(self) -> float:
        """How long a microbatch takes under load, when there are always prompts to fill it with."""
        view = self._view
        most: float = view.limits.max_num_batched_tokens
        if view.num_decoding:
            most = min(most, self._sustained())
        return min(self.longest, self._filled(int(most)))

    def _longest(self) -> float:
        view = self._view
        if not self._price.is_time:
            return view.limits.max_num_batched_tokens
        knee = TOLERANCE * self._price.on_bottleneck(0, 0, self._knee)
        if view.limits.max_tbt_s is None:
            return knee
        return min(knee, MARGIN * view.limits.max_tbt_s / self.in_turn)

    def is_hopeless(self, mix: Mix) -> bool:
        """Whether the limit between tokens cannot be kept, however small the microbatch. Prompts
        then go on in the smallest pieces."""
        least = max(mix.seconds()) if mix.num_decodes else self.of_piece(mix)
        return least > self.longest

    def of_piece(self, mix: Mix) -> float:
        """How long the decodes take with the smallest chunk that is worth it."""
        return self._price.on_bottleneck(mix.num_decodes, mix.context, MIN_PIECE)

    def _at_hand(self) -> int:
        """Tokens of the prompts that have begun, and of those that there is a seat for: that may
        run beside the others (`max_num_seqs`)."""
        view = self._view
        seats = max(0, view.limits.max_num_seqs - len(view.running))
        if seats >= len(view.waiting):
            return view.prefill_backlog
        prompts = chain(view.prefills.values(), islice(view.waiting.values(), seats))
        return sum([request.num_unplanned for request in prompts])

    def _throttled(self, flying: int) -> int:
        """Prefill tokens of a microbatch, when what KV has room for is spread over `TURNS`
        turns."""
        view = self._view
        begun = sum([request.num_unplanned for request in view.prefills.values()])
        free = max(0, view.free_blocks - len(view.running)) * view.limits.block_size
        return max(MIN_THROTTLED, (begun + free + flying) // (view.window * TURNS))

    def _sustained(self) -> float:
        """Prefill tokens of a microbatch whose decodes fill the pool, by now's mean of KV and the
        run's mix of prompt and output: with more, KV fills up, and what was gained is lost waiting
        for room. While outputs have hardly begun to end nobody knows how long they are; and no
        number of prompts fills the pool with decodes while every request ends with its first token.
        """
        view, flow = self._view, self._view.flow
        if flow.ended < ENOUGH_ENDED or not flow.decodes:
            return inf
        pool = view.limits.num_blocks * view.limits.block_size
        by_kv = pool * view.num_decoding / view.decoding_context
        num_decodes = SUSTAINED * min(by_kv, view.limits.max_num_seqs) / view.window
        # Prompts come first: until as many requests end as begin, there are too few decodes yet.
        mix = flow.prefill_tokens / flow.decodes * min(1.0, flow.ended / flow.admitted)
        return max(MIN_THROTTLED, num_decodes * mix)

    def _filled(self, num_prefill: int) -> float:
        """How long `num_prefill` tokens take beside a mean share of decodes; or as many tokens as
        make whole tiles, where these cost less per token."""
        price, num_decodes, context = self._price, self._num_decodes, self._context
        even = price.on_bottleneck(num_decodes, context, num_prefill)
        if not price.is_time:
            return even
        num_tokens = num_decodes + num_prefill
        tiles = max(1, int(num_tokens / TILE + ROUND_UP)) * TILE
        whole = price.on_bottleneck(num_decodes, context, max(tiles - num_decodes, 0))
        return TOLERANCE * (whole if whole * num_tokens <= even * tiles else even)


def _least(view: View, price: Price) -> int:
    """Tokens from which on a microbatch is large enough."""
    return _reaching(view, price, ENOUGH, MIN_PIECE)


def _knee(view: View, price: Price) -> int:
    """Prefill tokens from which on larger microbatches hardly raise throughput. One tile is never
    enough: the decodes beside it would begin another."""
    return _reaching(view, price, KNEE, 2 * TILE)


def _reaching(view: View, price: Price, share: float, first: int) -> int:
    """The least of `first`, twice it, and so on, that reaches this share of the most prefill tokens
    that any of them gives a second. It is looked for ever less often: a cost model that learns
    would move it back and forth, and the length of turns with it."""
    most = view.limits.max_num_batched_tokens
    sizes = [first << power for power in range(10) if first << power < most] + [most]
    rates = [size / _of_tiles(price, size) for size in sizes]
    enough = share * max(rates)
    return next(size for size, rate in zip(sizes, rates, strict=True) if rate >= enough)


def _of_tiles(price: Price, num_tokens: int) -> float:
    """What so many prefill tokens cost in chunks of one tile each. (One long chunk would cost more,
    for its positions read each other; but its prompt has to read them anyway.)"""
    whole, rest = divmod(num_tokens, TILE)
    return max(price.of(0, 0, ((0, TILE),) * whole + ((0, rest),) * (rest > 0)))


# ---- decodes ------------------------------------------------------------------------------------


def _decodes_in_turn(
    view: View, price: Price, budget: _Budget, now: float
) -> Sequence[RequestView]:
    """The decodes of this microbatch: their even share of a turn or, with a limit between tokens,
    all that are ready.

    With a limit, too, it is the share alone where that takes much less time than all, and the
    others, which then go with the next microbatch, will not be late. Else requests that came
    together would decode together for good, in uneven groups, or in one group with one stage busy
    at a time. (Where reading weights is what takes long, nothing is gained by splitting.)"""
    decodes = _ready(view)
    share = decodes[: _share(view, price, decodes)]
    if view.limits.max_tbt_s is None or not price.is_time or len(share) == len(decodes):
        return share
    all_s, share_s = (
        price.of(len(some), sum([each.num_planned + 1 for each in some]))
        for some in (decodes, share)
    )
    if max(share_s) >= SPLIT_BELOW * max(all_s):
        return decodes
    next_s = view.forecast.through_s(share_s, now) + max(share_s)
    due_s = _last_token_s(view, decodes[len(share)]) + MARGIN * view.limits.max_tbt_s
    return share if max(all_s) > budget.longest or next_s <= due_s else decodes


def _ready(view: View) -> list[RequestView]:
    """A decode whose token is still on its way is taken only when the window is full and the token
    comes with the oldest microbatch: then it is there about when stage 0 gets to it. Any earlier,
    stage 0 would stand still before it, and a prompt that arrives meanwhile would queue behind.
    """
    is_full = len(view.outstanding) >= view.window
    oldest = view.outstanding[0].index if is_full else None
    decodes: list[RequestView] = []
    for decode in islice(view.decodes.values(), view.limits.max_num_batched_tokens):
        if decode.token_from is not None and decode.token_from != oldest:
            break
        decodes.append(decode)
    return decodes


def _share(view: View, price: Price, decodes: Sequence[RequestView]) -> int:
    """How many of `decodes`, from the first, make up one microbatch's even share of the work of all
    decodes in a turn."""
    per_position = _tokens_per_position(view, price)
    share = (view.num_decoding + per_position * view.decoding_context) / view.window
    for place, decode in enumerate(decodes):
        if share <= 0:
            return place
        share -= 1 + per_position * decode.num_planned
    return len(decodes)


def _tokens_per_position(view: View, price: Price) -> float:
    """What attention to one position of context costs, in tokens: as a share of what a token costs
    in the linear layers when there are many. It is a mean over all decodes, for the slope of a
    learnt cost may be 0 or less; and never below 0, or a share of a turn might be no decode at
    all."""
    if not price.is_time or not view.decoding_context:
        return 0.0
    num_decodes, context = view.num_decoding // view.window + 1, view.decoding_context
    reads = price.on_bottleneck(num_decodes, context) - price.on_bottleneck(num_decodes, 0)
    tokens = price.on_bottleneck(8 * TILE, 0)
    return max(0.0, reads / context / (tokens / (8 * TILE)))


def _last_token_s(view: View, decode: RequestView) -> float:
    """When the token came that the decode goes on from, or will, by the forecast."""
    if decode.token_from is None:
        return decode.last_token_s
    return view.forecast.known_s(decode.token_from) if view.cost is not None else inf


def _due_s(
    view: View, price: Price, budget: _Budget, decodes: Sequence[RequestView], last_s: float
) -> float:
    """When the microbatch has to be through: for its own decodes, and for those in flight, whose
    next turn comes behind it. inf without a limit between tokens."""
    max_tbt_s = view.limits.max_tbt_s
    if max_tbt_s is None or not price.is_time:
        return inf
    here = {decode.token_from for decode in decodes}
    mean = view.decoding_context // max(1, view.num_decoding)
    for other in view.outstanding:
        num_decodes = other.num_decodes
        if num_decodes and other.index not in here:
            turn_s = price.on_bottleneck(num_decodes, num_decodes * mean)
            last_s = min(last_s, view.forecast.known_s(other.index) - turn_s)
            break  # those behind it have more time
    return last_s + min(MARGIN * max_tbt_s, LONGEST_TURN * budget.in_turn * budget.of_full())


def _waits_for_more(view: View, price: Price, budget: _Budget, mix: Mix, last_s: float) -> bool:
    """Whether the decodes can go with those of the oldest microbatch in flight, and that pays."""
    if view.limits.max_tbt_s is None or not price.is_time:
        return False
    if view.prefill_backlog or not view.outstanding or not view.outstanding[0].num_decodes:
        return False
    oldest = view.outstanding[0]
    num_decodes = mix.num_decodes + oldest.num_decodes
    if num_decodes > view.limits.max_num_batched_tokens:
        return False
    context = mix.context + oldest.num_decodes * (view.decoding_context // view.num_decoding)
    seconds, full_s = price.of(num_decodes, context), budget.of_full()
    alone_s = price.on_bottleneck(oldest.num_decodes, context - mix.context)
    here_s, merged_s = max(mix.seconds()), max(seconds)
    saved_s, longer_s = here_s + alone_s - merged_s, merged_s - max(here_s, alone_s)
    if saved_s < SAVED_PER_DELAY * budget.in_turn * longer_s:
        return False
    through_s = view.forecast.through_s(seconds, view.forecast.known_s(oldest.index))
    turn_s = min(MARGIN * view.limits.max_tbt_s, LONGEST_LULL * budget.in_turn * full_s)
    return merged_s <= full_s and through_s <= last_s + turn_s


# ---- prompts ------------------------------------------------------------------------------------


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
            tokens = _behind_prefix(view, mix, start, left, limit, longest, due_s)
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


def _behind_prefix(
    view: View, mix: Mix, start: int, left: int, limit: float, longest: float, due_s: float
) -> int:
    """Positions of a prompt of which none fits within the limits, if only because its chunk has to
    read a long prefix: budgets are made for chunks without one, so a small piece is let through.
    Where nothing else runs and waiting would not help, whatever the limits."""
    piece = min(left, MIN_PIECE)
    if mix.alone_s(start, piece) > longest or not (view.outstanding or mix.num_tokens):
        return mix.fitting(start, piece, inf, inf)
    if start and mix.fitting(0, piece, limit, due_s) == piece:
        return mix.fitting(start, piece, longest, due_s)
    return 0


def _in_order(view: View, may_start: Callable[[], bool]) -> Iterator[RequestView]:
    """Prompts that go on and, as long as `may_start` says so, that start: the first in order first,
    and of the same precedence those that go on."""
    waiting = _startable(view)
    new = next(waiting, None)
    for begun in view.prefills.values():
        while new is not None and new.precedence < begun.precedence and may_start():
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
