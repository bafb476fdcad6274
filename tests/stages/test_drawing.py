"""Rows that need no logits get the token that they would get of them."""

from dataclasses import fields

import pytest
import torch

from pipeserve.sampling_params import DrawParams
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.drawing import draw, takes_likeliest
from pipeserve.stages.layers.ends import Head
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.sampling import SampleRow, sample

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGES = {
    "logprobs": 0,
    "allowed_token_ids": (1, 2),
    "logit_bias": {3: 1.0},
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "temperature": 0.7,
}
"""Each makes logits needed."""
HARMLESS = {
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "seed": 1,
    "prompt_logprobs": 3,
    "min_tokens": 4,
}
"""Of a greedy row."""


def row(known_ids=(5, 7, 7), **options):
    return SampleRow(DrawParams(**{"temperature": 0, "seed": 7, **options}), 1, known_ids, 1)


@pytest.fixture(params=["kernels", "torch"])
def head(request):
    if request.param == "kernels" and kernels() is None:
        pytest.skip("no kernels")
    torch.manual_seed(0)
    vocabulary = Linear(64, 1000)
    head = Head(None, vocabulary)
    head.backend = vocabulary.backend = KernelBackend() if request.param == "kernels" else Backend()
    vocabulary.set(torch.randn(1000, 64).bfloat16().float())
    return head


def test_every_option_is_known_to_need_logits_or_not():
    assert {field.name for field in fields(DrawParams)} == CHANGES.keys() | HARMLESS.keys()
    assert not any(takes_likeliest(row(**{name: value})) for name, value in CHANGES.items())
    assert all(takes_likeliest(row(**{name: value})) for name, value in HARMLESS.items())
    assert not takes_likeliest(row()._replace(bad_word_ids=((1,),)))
    banned = row(min_tokens=4)._replace(stop_ids=(2,))
    assert not takes_likeliest(banned) and takes_likeliest(banned._replace(output_index=4))


def test_the_same_tokens_with_logits_and_without(head):
    rows = [row(), row(), row(top_k=3), *(row(**{k: v}) for k, v in CHANGES.items()), row()]
    hidden = torch.randn(len(rows), 64)
    hidden[1] = torch.nan
    hidden[-1] = 0  # all logits alike: the first token
    expected = sample(head(hidden), rows)
    assert draw(head, hidden, rows) == expected
    assert expected[1] == (None, None) and expected[-1] == (0, None)
    for part in ([0, 2], [5], [0, 7]):
        assert draw(head, hidden[part], [rows[i] for i in part]) == [expected[i] for i in part]


def test_no_logits_for_greedy_rows(head, monkeypatch):
    if type(head.backend) is Backend:
        pytest.skip("has them anyway")
    monkeypatch.setattr(Head, "forward", None)
    assert len(draw(head, torch.randn(3, 64), [row()] * 3)) == 3


def test_capped_logits_are_made(head):
    """Rounding may make capped logits alike, and the first of equals is taken."""
    head.softcap = 0.01
    hidden = torch.randn(4, 64)
    assert draw(head, hidden, [row()] * 4) == sample(head(hidden), [row()] * 4)
