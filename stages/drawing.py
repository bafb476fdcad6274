"""From hidden states to tokens, on a stage that has the head; logits are made for rows alone that
need them.

Suffixes: R rows, D hidden size.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipeserve.stages.sampling import SampledToken, SampleRow, sample, sample_of


class AnyHead(Protocol):
    """`Head`, or that of several ranks."""

    decides: bool

    def __call__(self, x_RD: Tensor) -> Tensor: ...

    def likeliest(self, x_RD: Tensor) -> tuple[Tensor, Tensor]: ...

    def highest(self, x_RD: Tensor, num: int) -> tuple[Tensor, Tensor] | None: ...

    def agreed(self, tokens: list[int | None]) -> list[int | None]: ...


def draw(head: AnyHead, hidden_RD: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """One token for each row: what `sample` takes of `head`'s logits."""
    drawn: list[SampledToken] = [(None, None)] * len(rows)
    numbers = range(len(rows))
    likeliest = [i for i in numbers if takes_likeliest(rows[i])]
    of_highest = [i for i in numbers if takes_of_highest(rows[i])]
    if likeliest:
        found = head.likeliest(_rows(hidden_RD, likeliest))
        for i, highest, token in zip(likeliest, *(part.tolist() for part in found), strict=True):
            drawn[i] = (token if math.isfinite(highest) else None, None)
    if of_highest:
        most = max(rows[i].params.top_k for i in of_highest)
        few = head.highest(_rows(hidden_RD, of_highest), most)
        if few is None:
            of_highest = []
        elif head.decides:
            own = [rows[i] for i in of_highest]
            for i, token in zip(of_highest, sample_of(*few, own), strict=True):
                drawn[i] = (token, None)
    others = sorted({*numbers} - {*likeliest, *of_highest})
    if others:
        logits_RV = head(_rows(hidden_RD, others))
        if head.decides:
            for i, one in zip(others, sample(logits_RV, [rows[i] for i in others]), strict=True):
                drawn[i] = one
    tokens = head.agreed([token for token, _ in drawn])
    return [(token, logprobs) for token, (_, logprobs) in zip(tokens, drawn, strict=True)]


def takes_likeliest(row: SampleRow) -> bool:
    """Whether the token of the row's highest logit is all that is wanted of its logits."""
    return row.params.temperature == 0 and _takes_logits_as_they_are(row)


def takes_of_highest(row: SampleRow) -> bool:
    """Whether the `top_k` highest logits are all that is."""
    params = row.params
    return params.temperature > 0 and params.top_k > 0 and _takes_logits_as_they_are(row)


def _takes_logits_as_they_are(row: SampleRow) -> bool:
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
    return params.logprobs is None and not changes_logits


def _rows(hidden_RD: Tensor, numbers: list[int]) -> Tensor:
    return hidden_RD if len(numbers) == hidden_RD.shape[0] else hidden_RD[numbers]
