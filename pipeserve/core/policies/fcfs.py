"""What first-come policies share: room for decodes, then running prefills, then admissions.

Requests are admitted by arrival, with blocks for the whole prompt reserved, and the latest arrival
is preempted first, by recompute. Source: Sarathi-Serve (OSDI'24, algorithm 3) and its code,
`sarathi_scheduler.py`; the watermark is vLLM's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.core.nouns import RequestId
from pipeserve.core.view import Draft, RequestView, View

WATERMARK = 0.01
"""Share of the KV blocks kept free at an admission, for the decodes that run."""


@dataclass(frozen=True, slots=True)
class Room:
    """Decodes that have a block to write to."""

    decodes: tuple[RequestView, ...]
    preempted: tuple[RequestId, ...]
    free_blocks: int
    """Blocks left after the preemptions and the decodes' new blocks."""


def make_room(view: View, decodes: Sequence[RequestView]) -> Room:
    """Preempts the latest arrivals until each remaining decode has a block to write to.

    A request that runs alone always has one (`Engine.add` saw to it), so this ends.
    """
    needed = {d.id for d in decodes if d.num_planned == d.num_slots}
    preempted: list[RequestId] = []
    free = view.free_blocks
    latest = reversed(view.running)
    while len(needed) > free:
        preempted.append(next(latest))
        needed.discard(preempted[-1])
        free = view.free_blocks + view.freed_by(preempted)
    if preempted:
        decodes = [d for d in decodes if d.id not in preempted]
    return Room(tuple(decodes), tuple(preempted), free - len(needed))


def fill(view: View, room: Room, budget: int) -> Draft:
    """The decodes, and up to `budget` prefill tokens: running prefills first, then admissions.

    Prefill chunks stand before decodes, as in Sarathi-Serve. Nothing is admitted in a microbatch
    that preempts: it would take the place of what was just given up.
    """
    chunks: dict[RequestId, int] = {}
    for request in view.prefills.values():
        if budget <= 0:
            break
        if request.id not in room.preempted:
            chunks[request.id] = min(request.num_unplanned, budget)
            budget -= chunks[request.id]
    admit: dict[RequestId, int] = {}
    out_of_blocks = bool(room.preempted)
    if not room.preempted:
        out_of_blocks = _admit(view, room.free_blocks, budget, chunks, admit)
    chunks.update((decode.id, 1) for decode in room.decodes)
    wait = "kv" if out_of_blocks else "token"
    return Draft(chunks=chunks, admit=admit, preempt=room.preempted, wait=wait)


def _admit(
    view: View,
    free: int,
    budget: int,
    chunks: dict[RequestId, int],
    admit: dict[RequestId, int],
) -> bool:
    """Adds admissions to `chunks` and `admit`; whether it stopped because blocks ran out.

    Nothing passes the head of the queue. The watermark holds only while something runs, or a
    request that needs every block could never start. A cached block that two admissions of one
    draft share is counted for both: at worst the second one starts a microbatch later.
    """
    limits = view.limits
    for request in view.waiting.values():
        if budget <= 0 or len(view.running) + len(admit) == limits.max_num_seqs:
            return False
        if request.num_outstanding:
            return False  # preempted, and still running out
        prefix = view.prefix(request.id)
        num_blocks = -(-request.num_known // limits.block_size)
        busy = view.running or admit
        watermark = int(WATERMARK * limits.num_blocks) if busy else 0
        if num_blocks - prefix.num_blocks + prefix.num_idle + watermark > free:
            return True
        free -= num_blocks - prefix.num_blocks + prefix.num_idle
        chunks[request.id] = min(request.num_known - prefix.num_tokens, budget)
        admit[request.id] = request.num_known
        budget -= chunks[request.id]
    return False
