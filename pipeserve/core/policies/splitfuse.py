"""Dynamic SplitFuse: DeepSpeed-FastGen (arXiv:2401.08671), as MII's `ragged_batching.py` does it.

Every ready decode first, then prompts by arrival; a prompt is cut so that the forward has exactly
`max_num_batched_tokens` tokens. Blocks are taken as positions are run, not for a whole prompt at
admission; but a prompt is run only while the KV cache can hold all of its remaining input, and the
first one that it cannot hold ends the forward. A decode without a block sits out.

When something runs, nothing can be scheduled and nothing is outstanding that could free a block,
the code calls it a deadlock and resets: every request gives up its KV and is computed again. There
is no other preemption.

Departures. MII has no pipeline, so at most one of its prompts is part-done. Over P stages several
are, and a new prompt starts only if the KV cache can hold its whole input and what is left of
theirs: otherwise two prompts can stop each other, be reset, and stop each other for ever. With one
stage that is MII's rule. MII takes up to 513 sequences where it means 512. The number of requests
that run is bounded by `max_num_seqs`; MII bounds none.
"""

from itertools import islice

from pipeserve.core.nouns import RequestId
from pipeserve.core.policies.fcfs import Admitted
from pipeserve.core.view import Draft, RequestView, Traits, View

MAX_SEQUENCES = 512
"""Of one forward: `max_ragged_sequence_count`."""


class SplitFuse:
    """See the module."""

    name = "splitfuse"
    traits = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)

    def compose(self, view: View, now: float) -> Draft:
        decodes, free = _decodes(view)
        budget = view.limits.max_num_batched_tokens - len(decodes)
        most = MAX_SEQUENCES - len(decodes)
        prompts, fits = _continued(view, free, budget, most)
        new = Admitted({}, {}, out_of_blocks=not fits)
        if fits:
            new = _start(view, budget - sum(prompts.values()), most - len(prompts))
        chunks = decodes | prompts | new.chunks
        if not chunks and view.running and not view.outstanding:
            return Draft(preempt=tuple(view.running)[::-1])  # the reset; the first stays first
        # Without chunks, a decode that is ready has found no block.
        out_of_blocks = new.out_of_blocks or view.decodes
        return Draft(chunks=chunks, admit=new.reserve, wait="kv" if out_of_blocks else "token")


def _decodes(view: View) -> tuple[dict[RequestId, int], int]:
    """The ready decodes that have a block to write to, and the free blocks that they leave."""
    most = min(view.limits.max_num_batched_tokens, MAX_SEQUENCES)
    ready = list(islice(view.decodes.values(), most))
    needy = [d.id for d in ready if d.num_planned == d.num_slots]
    decodes = dict.fromkeys([d.id for d in ready], 1)
    for request_id in needy[view.free_blocks :]:
        del decodes[request_id]
    return decodes, max(0, view.free_blocks - len(needy))


def _continued(view: View, free: int, budget: int, most: int) -> tuple[dict[RequestId, int], bool]:
    """Chunks of prompts that run already; False when the KV cache cannot hold one to its end."""
    chunks: dict[RequestId, int] = {}
    for request in view.prefills.values():
        if budget <= 0 or len(chunks) >= most:
            break
        if _num_missing(view, request, request.num_known) > free:
            return chunks, False
        chunks[request.id] = min(request.num_unplanned, budget)
        free -= _num_missing(view, request, request.num_planned + chunks[request.id])
        budget -= chunks[request.id]
    return chunks, True


def _start(view: View, budget: int, most: int) -> Admitted:
    """New prompts, by arrival, until the first that does not fit.

    `free` is what is left when all that runs has KV for all its known tokens.
    """
    size = view.limits.block_size
    chunks: dict[RequestId, int] = {}
    reserve: dict[RequestId, int] = {}
    seats = min(view.limits.max_num_seqs - len(view.running), most)
    if not view.waiting or budget <= 0 or seats <= 0:
        return Admitted(chunks, reserve, out_of_blocks=False)
    short = [r.num_slots - r.num_known for r in view.running.values() if r.num_slots < r.num_known]
    free = view.free_blocks + sum([positions // size for positions in short])
    for request in view.waiting.values():
        if budget <= 0 or len(chunks) == seats or request.num_outstanding:
            break  # one that was preempted and still runs out cannot start yet
        prefix = view.prefix(request.id)
        missing = -(-request.num_known // size) - prefix.num_blocks + prefix.num_idle
        if missing > free:
            return Admitted(chunks, reserve, out_of_blocks=True)
        free -= missing
        chunks[request.id] = min(request.num_known - prefix.num_tokens, budget)
        reserve[request.id] = prefix.num_tokens + chunks[request.id]
        budget -= chunks[request.id]
    return Admitted(chunks, reserve, out_of_blocks=False)


def _num_missing(view: View, request: RequestView, num_positions: int) -> int:
    """Blocks that a running request lacks for that many positions."""
    return max(0, -((request.num_slots - num_positions) // view.limits.block_size))
