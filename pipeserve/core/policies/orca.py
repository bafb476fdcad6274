"""Iteration-level batching: Orca (OSDI'22, algorithm 1).

Every iteration takes all ready decodes and as many whole prompts as fit, by arrival. A prompt
starts only when blocks for the longest that it can reach (prompt + max_tokens) are free, and they
are reserved for it; the first that does not fit ends the admissions. So a decode never lacks a
block, and nothing is preempted. Exactly P microbatches are in flight where there is work for as
many, a request in at most one of them, and whichever is composed first takes all ready decodes.

Departures. The paper caps the requests of an iteration and has no cap on its tokens; here
`max_num_seqs` caps the requests that run (as in the reimplementation in Sarathi-Serve's code), and
`max_num_batched_tokens` is a hard limit: prompts over the rest of it wait for the next microbatch.
Decodes go first and new prompts after them (that code), not both by arrival. Orca's manager
reserves slots for max_tokens alone; prompts take slots as well, so here they count.
"""

from pipeserve.core.policies.fcfs import fill, reserved_room
from pipeserve.core.view import Draft, Traits, View


class Orca:
    """See the module."""

    name = "orca"
    traits = Traits(
        plans_ahead=False, chunk_pipelining=False, one_in_flight=True, whole_prompts=True
    )

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        room = reserved_room(view, budget)
        return fill(view, room, budget - len(room.decodes), whole=True, worst_case=True)
