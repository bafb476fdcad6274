"""Ablation of Sarathi-Serve (OSDI'24, table 4): hybrid batching without chunked prefills.

As `sarathi_serve`, decodes first and then prompts, but a prompt runs whole or waits; so a long one
holds up every decode that runs beside it.

Departure. The paper's artefact sets the chunk size to the longest sequence, so that a prompt over
the rest of a microbatch is still cut; here it waits for the next.
"""

from itertools import islice

from pipeserve.core.policies.fcfs import fill, make_room
from pipeserve.core.view import Draft, Traits, View


class HybridOnly:
    """See the module."""

    name = "hybrid_only"
    traits = Traits(
        plans_ahead=False, chunk_pipelining=False, one_in_flight=True, whole_prompts=True
    )

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        room = make_room(view, list(islice(view.decodes.values(), budget)))
        return fill(view, room, budget - len(room.decodes), whole=True)
