"""Request-level batching: FasterTransformer, as Sarathi-Serve describes it (OSDI'24, algorithm 1).

A batch of whole prompts is prefilled in one iteration and then decodes to its end; no request joins
it, so it shrinks as its requests finish. New requests are admitted only when none is left decoding.
Blocks for the longest that a request can reach are reserved at admission; nothing is preempted.

With P stages there are up to P batches, each a microbatch of its own. A batch that is in flight
shows no ready decode, so what is ready belongs to a batch that has just come back; when nothing is
ready every batch is in flight, and while fewer than P are, a new one may start. That is what
`faster_transformer_scheduler.py` of Sarathi-Serve's code comes to. A batch has at most
ceil(max_num_seqs / P) requests, so that P of them fill the pipe (Vidur caps a microbatch likewise).

Departures. Nothing is padded to the longest of the batch (the papers' text; their code does not
either). The blocks of a request are free when it ends, not when its batch does (as that code, not
Vidur). The prompts of a batch are at most `max_num_batched_tokens` tokens, a hard limit here. Two
batches that come back before the next microbatch is planned are one from then on, up to the size of
one, as in that code: nothing distinguishes their requests.
"""

from pipeserve.core.policies.fcfs import only_prompts, reserved_room
from pipeserve.core.view import Draft, Traits, View


class RequestLevel:
    """See the module."""

    name = "request_level"
    traits = Traits(
        plans_ahead=False, chunk_pipelining=False, one_in_flight=True, whole_prompts=True
    )

    def compose(self, view: View, now: float) -> Draft:
        size = -(-view.limits.max_num_seqs // view.window)
        if view.decodes:
            return Draft(chunks=reserved_room(view, size).decodes)
        return only_prompts(view, whole=True, worst_case=True, most=size)
