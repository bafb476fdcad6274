"""Ablation of Sarathi-Serve (OSDI'24, table 4): chunked prefills without hybrid batches.

Prefill turns, of chunks up to the token budget, and decode turns, of all ready decodes, strictly
alternate; a turn with nothing to run goes to the other kind. Admission and preemption are those of
`sarathi_serve`. Turns are counted over the whole pipeline: with P stages, every other microbatch is
a prefill turn.

Departures from the code (`simple_chunking_scheduler.py`). There a turn that continues running
prompts admits none, even if budget is left; here it is filled up. There a decode turn without a
ready decode is an empty step.
"""

from pipeserve.core.policies.fcfs import only_decodes, only_prompts
from pipeserve.core.view import Draft, Traits, View


class ChunkedOnly:
    """See the module."""

    name = "chunked_only"
    traits = Traits(plans_ahead=False, chunk_pipelining=False, one_in_flight=True)

    def compose(self, view: View, now: float) -> Draft:
        if view.decodes and view.last is not None and view.last.num_prefill_tokens:
            return only_decodes(view)
        prompts = only_prompts(view)
        return prompts if prompts.chunks else only_decodes(view, prompts.wait)
