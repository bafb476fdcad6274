"""Prefill first: vLLM as of its paper (SOSP'23), in Sarathi-Serve's words (OSDI'24, algorithm 2).

While the head of the queue fits, a microbatch is whole prompts and nothing else; only when none
fits is it the ready decodes, and nothing else. A prompt is admitted when its blocks are free and
1 % of all besides; decodes take a block on demand, and where there is none who came last is
preempted, goes to the front of the queue and is computed again.

Departures. Recompute is the only preemption (vLLM also swaps to host memory), as in the
reimplementation in Sarathi-Serve's code. No prompt is dropped for its length: `whole_prompts` makes
the engine refuse a token limit under the longest. Over P stages that code is followed: at most P
microbatches in flight, and whichever is composed first takes all ready decodes.
"""

from pipeserve.core.policies.fcfs import only_decodes, only_prompts
from pipeserve.core.view import Draft, Traits, View


class Vllm:
    """See the module."""

    name = "vllm"
    traits = Traits(
        plans_ahead=False, chunk_pipelining=False, one_in_flight=True, whole_prompts=True
    )

    def compose(self, view: View, now: float) -> Draft:
        prompts = only_prompts(view, whole=True)
        return prompts if prompts.chunks else only_decodes(view, prompts.wait)
