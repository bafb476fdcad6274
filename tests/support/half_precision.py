"""How far hidden states in half precision are from float32's: ours, and transformers'. For the
tests, and for bench/accuracy.py.

The final hidden states of both go through one and the same float32 head, so that what is compared
is the layers alone; an error is of logits, and root mean squares are taken over the vocabulary.
"""

from typing import NamedTuple

import torch
from cut_model import Stages
from torch import Tensor
from transformers import AutoModelForCausalLM


class Errors(NamedTuple):
    """Root mean square error of each position's logits: float32 [positions of all prompts]."""

    ours: Tensor
    theirs: Tensor

    @property
    def ratio(self) -> float:
        """Ours over theirs, of all positions."""
        return float(_rms(self.ours) / _rms(self.theirs))

    @property
    def median_ratio(self) -> float:
        """The same of the median position: what it is where a router's choice now and then falls
        otherwise, which is an error as large as the experts differ."""
        return float(self.ours.median() / self.theirs.median())


@torch.inference_mode()
def hidden_errors(
    folder: str,
    prompts: list[list[int]],
    layers: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    budget: int = 64,
) -> Errors:
    """Of each prompt, taken `budget` tokens at a time through stages of so many layers."""
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        for kind in (torch.float32, dtype)
    )
    stages = Stages(folder, layers, dtype=dtype)
    head, stages.stages[-1].head = stages.stages[-1].head, None
    weight_VD = exact.lm_head.weight
    found = Errors([], [])
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected, got = (
            model.base_model(ids).last_hidden_state[0].float() for model in (exact, theirs)
        )
        ours = stages.logits(prompt, budget)  # without a head, hidden states
        for part in (head.norm, head.projection):
            ours = ours if part is None else part(ours)
        for errors, hidden in zip(found, (ours, got), strict=True):
            errors.append(_rms((hidden - expected) @ weight_VD.T, -1))
    return Errors(*map(torch.cat, found))


def _rms(x: Tensor, dim: int | None = None) -> Tensor:
    return x.pow(2).mean(dim).sqrt()
