"""Token throttling: gLLM (SC'25), which evens out both kinds of token over a pipeline.

A microbatch has at most

    #P = max(min(#WP / #T, #MaxP * (KVfree - KVthresh) / (1 - KVthresh)), #MinP)   prefill tokens
    #D = #RD / #depth                                                              decodes

#WP: prefill tokens that wait, to be worked off in #T microbatches; KVfree: the share of KV blocks
that are free; #RD: requests that decode, in flight or not. Defaults are the code's (`--iterp` 8,
`--minp` 32, `--kvthresh` 0.05); #MaxP is the token budget. #RD / #depth is rounded down after
adding a jitter of 0 .. depth - 1, so that no decode is left over when depth does not divide #RD.

Departures from the code (gllm/scheduler.py at bc91d98). The jitter there is random; here it rotates
with the microbatch's index. The code uses #WP only when more than one prompt waits, holds back
pages that running decodes will want (a ratio that adapts, in place of KVthresh) and, once free KV
is down to what it holds back, stops prefill; the paper's #MinP goes on, and is what is built here.
Blocks are reserved for a whole prompt at admission, with 1 % kept free, where gLLM takes pages
chunk by chunk: KVfree falls earlier here. Decodes and prefill tokens share
`max_num_batched_tokens`; in gLLM #MaxP bounds prefill alone. Who was admitted last is preempted
first, as in the other policies.
"""

from itertools import islice

from pipeserve.core.policies.fcfs import fill, make_room
from pipeserve.core.view import Draft, Traits, View

ITERATIONS = 8
MIN_PREFILL = 32
KV_THRESHOLD = 0.05


class TokenThrottle:
    """See the module."""

    name = "token_throttle"
    traits = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        most = min(budget, _num_decodes(view))
        room = make_room(view, list(islice(view.decodes.values(), most)))
        return fill(view, room, min(budget - len(room.decodes), _num_prefill_tokens(view)))


def _num_decodes(view: View) -> int:
    """#D; at least 1, as in the code: the jitter turns only with what is planned."""
    next_index = 0 if view.last is None else view.last.index + 1
    return max(1, (view.num_decoding + next_index % view.window) // view.window)


def _num_prefill_tokens(view: View) -> int:
    """#P."""
    kv_free = view.free_blocks / view.limits.num_blocks
    headroom = (kv_free - KV_THRESHOLD) / (1 - KV_THRESHOLD)
    by_kv = int(view.limits.max_num_batched_tokens * headroom)
    return max(min(view.prefill_backlog // ITERATIONS, by_kv), MIN_PREFILL)
