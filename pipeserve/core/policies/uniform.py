"""Ours, and the default: stall-free batching that keeps the microbatches even.

`sarathi_serve` with the pipeline used to the full (the next chunk follows at once, one microbatch
is planned ahead), plus two things that even microbatches out:

- a microbatch takes at most ceil(decoding requests / P) decodes, those that waited longest first,
  so that P microbatches share the decodes and none misses its turn (gLLM's decode cap);
- while the prompts that wait are fewer tokens than P full budgets, they are spread over P
  microbatches, so that none goes without while another has plenty; but into pieces of no fewer than
  64 tokens, below which reading the weights costs a stage more than the tokens do.

Microbatches are evened by tokens. Balancing by predicted time comes later.
"""

from itertools import islice

from pipeserve.core.policies.fcfs import fill, make_room
from pipeserve.core.view import Draft, RequestView, Traits, View

MIN_PIECE = 64


class Uniform:
    """See the module."""

    name = "uniform"
    traits = Traits(plans_ahead=True, chunk_pipelining=True, one_in_flight=False)

    def compose(self, view: View, now: float) -> Draft:
        budget = view.limits.max_num_batched_tokens
        room = make_room(view, _decodes_in_turn(view, budget))
        return fill(view, room, min(budget - len(room.decodes), _prefill_share(view)))


def _decodes_in_turn(view: View, budget: int) -> list[RequestView]:
    """This microbatch's share of the decodes.

    A decode whose token is still on its way is taken only when the window is full and the token
    comes with the oldest microbatch: then it is there about when stage 0 gets to it. Any earlier,
    stage 0 would stand still before it, and a prompt that arrives meanwhile would queue behind.
    """
    share = min(budget, -(-view.num_decoding // view.window))
    is_full = len(view.outstanding) >= view.window
    oldest = view.outstanding[0].index if is_full else None
    decodes = []
    for decode in islice(view.decodes.values(), share):
        if decode.token_from is not None and decode.token_from != oldest:
            break
        decodes.append(decode)
    return decodes


def _prefill_share(view: View) -> int:
    """Prefill tokens for one of P microbatches; those outstanding count, so the share is steady."""
    tokens = view.prefill_backlog + sum(o.num_prefill_tokens for o in view.outstanding)
    pieces = max(1, min(view.window, tokens // MIN_PIECE))
    return -(-tokens // pieces)
