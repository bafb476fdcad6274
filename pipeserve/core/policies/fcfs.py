"""What most policies share: room for decodes, then running prefills, then admissions.

Requests are admitted in order (`core/order.py`), and nothing passes the head of the queue. Blocks
are reserved at admission, for the whole prompt (Sarathi-Serve, OSDI'24, algorithm 3, and its code,
`sarathi_scheduler.py`; the watermark is vLLM's) or for the longest that the request can reach
(Orca). Where only the prompt has its blocks, decodes take one on demand, and the last of those that
run (`View.running`) is preempted first, by recompute.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from pipeserve.core.nouns import RequestId
from pipeserve.core.view import Draft, RequestView, View

WATERMARK = 0.01
"""Share of the KV blocks kept free at an admission, for the decodes that run."""


@dataclass(frozen=True, slots=True)
class Room:
    """Decodes that have a block to write to."""

    decodes: dict[RequestId, int]
    """Their chunks: one position each."""
    preempted: tuple[RequestId, ...]
    free_blocks: int
    """Blocks left after the preemptions and the decodes' new blocks."""


def make_room(view: View, decodes: Sequence[RequestView]) -> Room:
    """Preempts the last of `running` until each remaining decode has a block to write to.

    A request that runs alone always has one (`Engine.add` saw to it), so this ends.
    """
    needed = {d.id for d in decodes if d.num_planned == d.num_slots}
    chunks = dict.fromkeys([d.id for d in decodes], 1)
    if len(needed) <= view.free_blocks:
        return Room(chunks, (), view.free_blocks - len(needed))
    latest = list(view.running)[::-1]

    def spare(count: int) -> int:
        """Blocks left when so many are preempted; less than 0 if that is not enough."""
        given_up = latest[:count]
        free = view.free_blocks + view.freed_by(given_up)
        return free - len(needed.difference(given_up))

    # Mostly one is enough. Where requests share most of their blocks it can be hundreds.
    enough = 1
    while spare(enough) < 0:
        enough *= 2
    tried = range(enough // 2 + 1, enough)
    count = tried.start + bisect_left(tried, 0, key=spare)
    for request_id in latest[:count]:
        chunks.pop(request_id, None)
    return Room(chunks, tuple(latest[:count]), spare(count))


def reserved_room(view: View, most: int) -> Room:
    """At most `most` decodes, for policies that reserved all their blocks at admission."""
    return Room(dict.fromkeys(islice(view.decodes, most), 1), (), view.free_blocks)


def only_decodes(view: View, wait: str = "token") -> Draft:
    """All ready decodes and nothing else; the last that run are preempted to make room."""
    most = view.limits.max_num_batched_tokens
    room = make_room(view, list(islice(view.decodes.values(), most)))
    return Draft(chunks=room.decodes, preempt=room.preempted, wait=wait)


def only_prompts(
    view: View, *, whole: bool = False, worst_case: bool = False, most: int | None = None
) -> Draft:
    """A full budget of prefill tokens and nothing else. Keywords as in `fill`."""
    budget = view.limits.max_num_batched_tokens
    room = Room({}, (), view.free_blocks)
    return fill(view, room, budget, whole=whole, worst_case=worst_case, most=most)


def fill(
    view: View,
    room: Room,
    budget: int,
    *,
    whole: bool = False,
    worst_case: bool = False,
    most: int | None = None,
) -> Draft:
    """The decodes, and up to `budget` prefill tokens: running prefills first, then admissions.

    `whole`: a prompt over the rest of the budget waits; else it is cut into chunks. `worst_case`:
    an admission reserves blocks for the longest that the request can reach; else for its known
    tokens, with the watermark kept free. `most`: prompts that may be in the microbatch.

    Prefill chunks stand before decodes, as in Sarathi-Serve. Nothing is admitted in a microbatch
    that preempts: it would take the place of what was just given up.
    """
    chunks: dict[RequestId, int] = {}
    for request in view.prefills.values():
        if budget <= 0 or len(chunks) == most:
            break
        if request.id not in room.preempted:
            chunks[request.id] = min(request.num_unplanned, budget)
            budget -= chunks[request.id]
    admissions = Admitted({}, {}, out_of_blocks=bool(room.preempted))
    if not room.preempted:
        seats = view.limits.max_num_seqs - len(view.running)
        if most is not None:
            seats = min(seats, most - len(chunks))
        admissions = _admit(view, room.free_blocks, budget, seats, whole, worst_case)
    chunks |= admissions.chunks
    chunks |= room.decodes
    wait = "kv" if admissions.out_of_blocks else "token"
    return Draft(chunks=chunks, admit=admissions.reserve, preempt=room.preempted, wait=wait)


@dataclass(frozen=True, slots=True)
class Admitted:
    """Requests that start, with the positions to run and to reserve blocks for."""

    chunks: dict[RequestId, int]
    reserve: dict[RequestId, int]
    out_of_blocks: bool
    """Whether it stopped because blocks ran out."""


def _admit(
    view: View, free: int, budget: int, seats: int, whole: bool, worst_case: bool
) -> Admitted:
    """Waiting requests in order, at most `seats` of them, until the first that does not fit.

    The watermark holds only while something runs, or a request that needs every block could never
    start. A cached block that two admissions of one draft share is counted for both: at worst the
    second one starts a microbatch later.
    """
    limits = view.limits
    chunks: dict[RequestId, int] = {}
    reserve: dict[RequestId, int] = {}
    for request in view.waiting.values():
        if budget <= 0 or len(chunks) >= seats:
            break
        if request.num_outstanding:
            break  # preempted, and still running out
        prefix = view.prefix(request.id)
        num_tokens = request.num_known - prefix.num_tokens
        if whole and num_tokens > budget:
            break
        # The last token of an output is never computed, so it takes no place.
        num_positions = request.num_longest - 1 if worst_case else request.num_known
        missing = -(-num_positions // limits.block_size) - prefix.num_blocks + prefix.num_idle
        keeps_watermark = not worst_case and (view.running or chunks)
        if missing + (int(WATERMARK * limits.num_blocks) if keeps_watermark else 0) > free:
            return Admitted(chunks, reserve, out_of_blocks=True)
        free -= missing
        chunks[request.id] = min(num_tokens, budget)
        reserve[request.id] = num_positions
        budget -= chunks[request.id]
    return Admitted(chunks, reserve, out_of_blocks=False)
