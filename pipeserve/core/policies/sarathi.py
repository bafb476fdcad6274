"""Decode-maximal batching: SARATHI (arXiv:2308.16369, section 4).

A microbatch is one chunk of one prompt and up to B - 1 decodes that ride along. The chunk is what
the decodes leave of the token budget, so that the sum is the budget, and a multiple of the GPU's
128-wide matrix tile where the budget is one; the last chunk of a prompt is what is left of it. Out
of prompts, a microbatch is up to B decodes; out of decodes, it is a chunk alone.

B is max_num_seqs / P, rounded down: the paper's 27 for GPT-3 over 8 stages is the batch of one
microbatch, of which 8 are in flight. As in the paper, a request's blocks are reserved at admission
for the longest that it can reach, and nothing is preempted.

The paper's Orca baseline at its best, one full prompt that overlaps running decodes, is this policy
with a budget of the longest sequence.

Departures. The paper takes requests of equal length and says nothing of their order: here prompts
go by arrival, and the decodes that waited longest go first. Where B - 1 decodes would fill the
budget, one position is kept for the chunk.
"""

from pipeserve.core.policies.fcfs import fill, reserved_room
from pipeserve.core.view import Draft, Traits, View


class Sarathi:
    """See the module."""

    name = "sarathi"
    traits = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        size = min(budget, max(1, view.limits.max_num_seqs // view.window))
        beside = reserved_room(view, size - 1)
        draft = fill(view, beside, budget - len(beside.decodes), worst_case=True, most=1)
        if len(draft.chunks) > len(beside.decodes):
            return draft
        return Draft(chunks=reserved_room(view, size).decodes, wait=draft.wait)
