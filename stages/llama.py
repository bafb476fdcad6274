"""The Llama family (Llama 1-3, Yi, SmolLM2) as one stage of a pipeline. Plain modules.

All state comes by argument: several microbatches are in flight, so nothing here remembers one. No
rank, no transport, no timer. Pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Suffixes: T tokens of the microbatch (inside a stage, with padding rows behind them), D hidden
size, N query heads, K kv heads, H head size, F intermediate size, R rows whose logits are wanted,
V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeserve.stages.attention import Attention, PoolLayer, make_attention
from pipeserve.stages.config import ModelConfig, RopeConfig
from pipeserve.stages.inputs import StageInputs
from pipeserve.stages.kv import KVCache
from pipeserve.stages.linear import Linear

Rotation = tuple[Tensor, Tensor]
"""(cos, signed sin) of each token, [T, 1, H]."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.shape = (size,)
        self.eps = eps
        self.weight: Tensor | None = None

    @property
    def num_parameters(self) -> int:
        return self.shape[0]

    def set(self, weight: Tensor, bias: None = None) -> None:
        self.weight = weight

    def forward(self, x_TD: Tensor) -> Tensor:
        """Mean square in float32, scaled in x's dtype: as transformers' LlamaRMSNorm does."""
        wide_TD = x_TD.float()
        scale_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_TD * scale_T1).to(x_TD.dtype)


class Embedding(nn.Module):
    def __init__(self, num_embeddings: int, size: int) -> None:
        super().__init__()
        self.shape = (num_embeddings, size)
        self.weight: Tensor | None = None

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    def set(self, weight: Tensor, bias: None = None) -> None:
        self.weight = weight

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return F.embedding(token_ids_T, self.weight)


class LlamaLayer(nn.Module):
    """One decoder layer, with Q, K, V in one product and gate and up in another."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.attention = attention
        size, width = config.hidden_size, config.num_heads * config.head_dim
        self.attention_norm = RMSNorm(size, config.rms_norm_eps)
        self.qkv = Linear(size, sum(self.heads) * self.head_dim)
        self.attention_out = Linear(width, size)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.gate_up = Linear(size, 2 * config.intermediate_size)
        self.down = Linear(config.intermediate_size, size)

    def forward(self, x_TD: Tensor, rotation: Rotation, pool: PoolLayer, plan: object) -> Tensor:
        x_TD = x_TD + self._attend(self.attention_norm(x_TD), rotation, pool, plan)
        gate_TF, up_TF = self.gate_up(self.mlp_norm(x_TD)).chunk(2, -1)
        return x_TD + self.down(F.silu(gate_TF).mul_(up_TF))

    def _attend(self, x_TD: Tensor, rotation: Rotation, pool: PoolLayer, plan: object) -> Tensor:
        num_q, num_k, _ = self.heads
        heads_TXH = self.qkv(x_TD).unflatten(-1, (-1, self.head_dim))
        rotated_TXH = rotate(heads_TXH[:, : num_q + num_k], rotation)
        q_TNH, k_TKH = rotated_TXH.split((num_q, num_k), 1)
        out_TNH = self.attention(q_TNH, k_TKH, heads_TXH[:, num_q + num_k :], pool, plan)
        return self.attention_out(out_TNH.flatten(1))


class LlamaStage(nn.Module):
    """Layers `[first_layer, stop_layer)`, with the embedding before or the head behind them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        first_layer: int,
        stop_layer: int,
        has_embedding: bool,
        has_head: bool,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.first_layer = first_layer
        self.attention = make_attention(attention)
        self.frequencies_h = rope_frequencies(config.rope, config.head_dim)
        self.embedding = Embedding(config.vocab_size, config.hidden_size) if has_embedding else None
        self.layers = nn.ModuleList(
            LlamaLayer(config, self.attention) for _ in range(first_layer, stop_layer)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if has_head else None
        self.head = Linear(config.hidden_size, config.vocab_size) if has_head else None

    def forward(self, x: Tensor, inputs: StageInputs, kv: KVCache) -> Tensor:
        """Token ids [T] (first stage) or hidden [T, D] -> hidden [T, D], or logits [R, V] float32.

        Writes the microbatch's K and V into `kv`; does not modify `x`.
        """
        x_TD = pad_rows(x if self.embedding is None else self.embedding(x))
        rotation = make_rotation(pad_rows(inputs.positions_T), self.frequencies_h, x_TD.dtype)
        plan = self.attention.prepare(inputs, kv)
        for number, layer in enumerate(self.layers):
            x_TD = layer(x_TD, rotation, kv.layer(number), plan)
        if self.head is None:
            return x_TD[: inputs.num_tokens]
        wanted_RD = pad_rows(x_TD[inputs.logit_rows_R])
        return self.head(self.norm(wanted_RD))[: len(inputs.logit_rows_R)].float()

    @property
    def num_parameters(self) -> int:
        """As held here: a tied embedding counts on the first stage and as the head on the last."""
        return sum(module.num_parameters for module, _, _ in self.checkpoint_tensors())

    def checkpoint_tensors(self) -> Iterator[tuple[nn.Module, tuple[str, ...], bool]]:
        """(module, checkpoint names that it joins along dim 0, whether it has a bias) of each part.

        Names are Hugging Face's, without ".weight" and ".bias".
        """
        config = self.config
        if self.embedding is not None:
            yield self.embedding, ("model.embed_tokens",), False
        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{self.first_layer + number}."
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            qkv = tuple(f"{attention}{name}_proj" for name in "qkv")
            yield layer.attention_norm, (f"{prefix}input_layernorm",), False
            yield layer.qkv, qkv, config.attention_bias
            yield layer.attention_out, (f"{attention}o_proj",), config.attention_bias
            yield layer.mlp_norm, (f"{prefix}post_attention_layernorm",), False
            yield layer.gate_up, (f"{mlp}gate_proj", f"{mlp}up_proj"), config.mlp_bias
            yield layer.down, (f"{mlp}down_proj",), config.mlp_bias
        if self.head is not None:
            yield self.norm, ("model.norm",), False
            tied = config.tie_word_embeddings
            yield self.head, ("model.embed_tokens" if tied else "lm_head",), False


def pad_rows(x: Tensor) -> Tensor:
    """`x` with rows of zeros behind it, up to one of few numbers of rows.

    oneDNN compiles a kernel for each shape that it meets: about 0.5 ms and 0.7 MB each, four
    shapes a layer (bench/linears.py).
    """
    num_rows = len(x)
    missing = -num_rows % (8 if num_rows <= 64 else 16)
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: float32 [H / 2].

    "llama3": wavelengths beyond the trained context are stretched by `factor`, short ones are kept,
    those between are blended. Source: transformers, `_compute_llama3_parameters`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    context, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def make_rotation(positions_T: Tensor, frequencies_h: Tensor, dtype: torch.dtype) -> Rotation:
    angles_Th = positions_T[:, None].float() * frequencies_h
    cos_Th, sin_Th = angles_Th.cos().to(dtype), angles_Th.sin().to(dtype)
    return (
        torch.cat((cos_Th, cos_Th), -1)[:, None],
        torch.cat((-sin_Th, sin_Th), -1)[:, None],
    )


def rotate(heads_TXH: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face's checkpoints."""
    cos_T1H, signed_sin_T1H = rotation
    swapped_TXH = heads_TXH.roll(heads_TXH.shape[-1] // 2, -1)
    return (heads_TXH * cos_T1H).addcmul_(swapped_TXH, signed_sin_T1H)
