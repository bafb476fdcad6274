"""From hidden states to tokens, on the last stage; logits are made for rows alone that need them.

Suffixes: R rows, D hidden size.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from pipeserve.stages.layers.ends import Head
from pipeserve.stages.sampling import SampledToken, SampleRow, sample


def draw(head: Head, hidden_RD: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token for each row: what `sample` takes of `head`'s logits."""
    drawn: list[SampledToken] = [(None, None)] * len(rows)
    likeliest = [i for i, row in enumerate(rows) if takes_likeliest(row)]
    if likeliest:
        found = head.likeliest(_rows(hidden_RD, likeliest))
        for i, highest, token in zip(likeliest, *(part.tolist() for part in found), strict=True):
            drawn[i] = (token if math.isfinite(highest) else None, None)
    others = [i for i, row in enumerate(rows) if not takes_likeliest(row)]
    if others:
        logits_RV = head(_rows(hidden_RD, others))
        for i, one in zip(others, sample(logits_RV, [rows[i] for i in others]), strict=True):
            drawn[i] = one
    return drawn


def takes_likeliest(row: SampleRow) -> bool:
    """Whether the token of the row's highest logit is all that is wanted of its logits."""
    params = row.params
    changes_logits = (
        params.allowed_token_ids is not None
        or row.bad_word_ids
        or (row.stop_ids and row.output_index < params.min_tokens)
        or params.logit_bias
        or params.repetition_penalty != 1
        or params.frequency_penalty
        or params.presence_penalty
    )
    return params.temperature == 0 and params.logprobs is None and not changes_logits


def _rows(hidden_RD: Tensor, numbers: list[int]) -> Tensor:
    return hidden_RD if len(numbers) == len(hidden_RD) else hidden_RD[numbers]
