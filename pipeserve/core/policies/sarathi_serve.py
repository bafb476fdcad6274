"""Stall-free batching as published: Sarathi-Serve, OSDI'24, algorithm 3.

Every ready decode first, then the rest of the token budget for chunks of running prefills, then
for newly admitted prompts. As in the published code: at most P microbatches outstanding, a request
in at most one of them (so no next chunk before the last one left the last stage), nothing planned
ahead, and whichever microbatch is composed first takes all ready decodes.

One difference. The published code lets decodes exceed the budget and then computes a negative
rest; it counts on `max_num_seqs` being below the budget. Here the budget is a hard limit, and
decodes over it wait their turn.
"""

from itertools import islice

from pipeserve.core.policies.fcfs import fill, make_room
from pipeserve.core.view import Draft, Traits, View


class SarathiServe:
    """See the module."""

    name = "sarathi_serve"
    traits = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        room = make_room(view, list(islice(view.decodes.values(), budget)))
        return fill(view, room, budget - len(room.decodes))
