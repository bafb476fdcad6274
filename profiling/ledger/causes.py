"""The causes that idle time is put down to. docs/timeline.md has a paragraph on each."""

CAUSES = {
    "fill": "the first microbatches of the run were still on their way to this stage",
    "drain": "the run was ending: nothing was left for this stage",
    "no_requests": "fewer requests than stages were there to be served",
    "too_few_microbatches": "requests enough, but in fewer microbatches than stages",
    "kv_full": "a request waited until KV blocks came free",
    "prefill_length": "a microbatch had more prefill than the one before (PB1)",
    "prefill_vs_decode": "a microbatch with prefill ran behind one without (PB2)",
    "context_length": "a microbatch's decodes had longer contexts (PB3)",
    "decode_count": "a microbatch had more decodes",
    "stage_imbalance": "a stage takes longer than the others for the same microbatch",
    "head_and_sampling": "the last stage had the vocabulary head and the sampling to do",
    "all_reduce": "the ranks of a stage were adding up what each had computed",
    "rank_wait": "the ranks of a stage waited for the slowest of them",
    "token_feedback": "sampled tokens were on their way to the first stage",
    "planning": "the driver was planning, or busy with something else",
    "control": "messages between driver and stages, and the stage's own work between microbatches",
    "link": "activations were on their way",
    "jitter": "what nothing in the microbatch explains: a core taken by others, a late wake-up",
    "fault": "a stage was lost",
    "unknown": "the recording does not say",
}
"""Cause -> what happened, in the order in which they are shown."""
