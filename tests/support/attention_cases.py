"""Microbatches of attention over a pool full of garbage, and what is right for them: the definition
in float64. For the tests."""

import random

import torch

from pipeserve.stages.attention.attention import ReferenceAttention
from pipeserve.stages.attention.gathered_attention import GatheredAttention
from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.attention.kv import KVCache, clear, write
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.cpu import kernel_attention, library
from pipeserve.stages.backends.cpu.blocked_attention import BlockedAttention
from pipeserve.stages.config.model_config import ModelConfig

HOST = torch.device("cpu")
ATTENTIONS = {
    "blocked": BlockedAttention(),
    "gathered": GatheredAttention(HOST),
    "reference": ReferenceAttention(),
}
if library.kernels() is not None:
    ATTENTIONS["kernels"] = kernel_attention.KernelAttention()
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""For outputs of size 1: some units in the last place of each dtype."""
PAIRED_TOLERANCE = 1e-2
HEADS = [(6, 2, 8), (4, 4, 16), (3, 1, 64), (9, 3, 24)]
"""(query heads, kv heads, head size)."""


class Case:
    """Chunks of random q, k and v, with the K and V of what came before them in the pool.
    `common`: what is added to the last number of each query and key."""

    def __init__(
        self,
        spans,
        *,
        heads=(6, 2, 8),
        block_size=16,
        dtype=torch.float32,
        garbage=0.0,
        scoring=None,
        turned=False,
        common=0.0,
    ):
        self.scoring = scoring or Scoring(heads[2] ** -0.5)
        num_heads, num_kv_heads, head_dim = heads
        rng = random.Random(len(spans))
        counts = [-(-stop // block_size) for _, stop in spans]
        num_blocks = sum(counts) + 3
        free = rng.sample(range(1, num_blocks), num_blocks - 1)
        tables = [[free.pop() for _ in range(count)] for count in counts]
        self.spare_blocks = torch.tensor([0, *free])
        self.kv = KVCache(
            config_of(*heads),
            num_layers=2,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=HOST,
            turned=turned,
        )
        self.kv.keys_LKBPH.fill_(garbage)
        self.kv.values_LKBPH.fill_(-garbage)
        chunks = [(*span, table, 0) for span, table in zip(spans, tables, strict=True)]
        self.inputs = build_inputs(chunks, block_size, None)
        torch.manual_seed(0)
        self.q, self.k, self.v, self.expected = [], [], [], []
        for (start, stop), table in zip(spans, tables, strict=True):
            q = torch.randn(stop - start, num_heads, head_dim)
            k, v = torch.randn(2, stop, num_kv_heads, head_dim)
            q[..., -1] += common
            k[..., -1] += common
            q, k, v = (each.to(dtype) for each in (q, k, v))
            self._fill(table, block_size, k[:start], v[:start])
            self.q.append(q)
            self.k.append(k[start:])
            self.v.append(v[start:])
            self.expected.append(_attention(q, k, v, self.scoring))

    def _fill(self, table, block_size, k, v):
        """What earlier microbatches would have written, first positions of blocks first."""
        for number in range(-(-len(k) // block_size)):
            part = slice(number * block_size, (number + 1) * block_size)
            for side, new in zip(self.kv.layer(1), (k[part], v[part]), strict=True):
                side[:, table[number]] = 0  # as the microbatch that began the block leaves it
                side[:, table[number], : len(new)] = new.transpose(0, 1)

    def run(self, name):
        attention, pool = ATTENTIONS[name], self.kv.layer(1)
        with torch.inference_mode():
            plan = attention.prepare(self.inputs, self.kv, {self.scoring.window})
            q, k, v = (torch.cat(parts) for parts in (self.q, self.k, self.v))
            if name == "kernels":
                kernel_attention.write(k, v, pool, self.inputs.slots_T)
            else:
                clear(pool, self.inputs.begun_blocks)
                write(k, v, pool, self.inputs.slots_T)
            return attention(q, pool, plan, self.scoring)

    def check(self, name):
        got = self.run(name)
        limit = TOLERANCE[got.dtype]
        if name == "kernels" and self._is_paired():
            limit = PAIRED_TOLERANCE
        torch.testing.assert_close(got.double(), torch.cat(self.expected), rtol=limit, atol=limit)

    def _is_paired(self):
        """Whether the kernels round queries and weights to bfloat16, too."""
        is_paired = kernel_attention.kernels().multiplies_pairs()
        return is_paired and self.kv.keys_LKBPH.dtype == torch.bfloat16


def _attention(q_TNH, k_CKH, v_CKH, scoring):
    """The definition, for the last T of C positions: float64 [T, N, H]."""
    group = q_TNH.shape[1] // k_CKH.shape[1]
    q, k, v = q_TNH.double(), k_CKH.double(), v_CKH.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("tnh,cnh->ntc", q, k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.slopes_N is not None:
        bias_NC = scoring.slopes_N.bfloat16()[:, None] * torch.arange(len(k))
        scores = scores + bias_NC.double()[:, None] * scoring.scale
    distance_TC = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    is_hidden = distance_TC < 0
    if scoring.window is not None:
        is_hidden |= distance_TC >= scoring.window
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    return torch.einsum("ntc,cnh->tnh", weights, v)


def config_of(num_heads, num_kv_heads, head_dim):
    return ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=num_heads * head_dim,
        intermediate_size=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=1,
        max_position_embeddings=1,
        norm_eps=1.0,
        activation="silu",
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(),
    )
