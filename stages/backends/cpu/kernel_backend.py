"""The CPU's backend where there are C kernels for it (library.py)."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.rotation import Rotation
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.backend import (
    Backend,
    HeadNorms,
    Layers,
    Norm,
    Product,
)
from pipeserve.stages.backends.cpu import elementwise, halves, large_pages
from pipeserve.stages.backends.cpu.kernel_attention import KernelAttention, Plan, write
from pipeserve.stages.backends.cpu.library import has_pairs_of_bfloat16, kernels, name_of
from pipeserve.stages.backends.cpu.products import GatedWeight, PackedWeight, VocabularyWeight


class KernelBackend(Backend):
    """All is float32 between the products, and rows need no padding. In a run of float32 a row's
    result is the same, bit for bit, whatever rows are beside it.

    One thread computes: a stage with several does better by PyTorch.
    """

    turns_keys = True

    def __init__(self) -> None:
        super().__init__("cpu", KernelAttention())
        self._zeros = large_pages.Zeros()

    @property
    def name(self) -> str:
        return f"C kernels ({name_of(kernels())})"

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return large_pages.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[L, B, ...], of which the lowest blocks of each layer are used first."""
        return self._zeros.make(shape, dtype, num_parts=shape[0])

    def prepare(self) -> bool:
        return self._zeros.bring()

    def place_matrix(self, weight_OI: Tensor) -> PackedWeight:
        """Packed. A product of bfloat16 weights rounds x to bfloat16 too, where the CPU multiplies
        pairs of them."""
        return PackedWeight(weight_OI, rounds_x=_is_paired(weight_OI))

    def place_vocabulary(self, weight_OI: Tensor) -> VocabularyWeight:
        return VocabularyWeight(weight_OI)

    def bytes_beside_vocabulary(self, num_rows: int, num_columns: int) -> int:
        return VocabularyWeight.coarse_bytes(num_rows, num_columns)

    def place_gated_matrix(self, weight_OI: Tensor) -> GatedWeight:
        return GatedWeight(weight_OI, rounds_x=_is_paired(weight_OI))

    def place_gated_bias(self, bias_O: Tensor) -> Tensor:
        return GatedWeight.padded(bias_O)

    def place_bias(self, bias_O: Tensor) -> Tensor:
        """With zeros behind it in memory, up to a whole panel of outputs."""
        return PackedWeight.padded(bias_O)

    def linear(
        self,
        x_XI: Tensor,
        weight: PackedWeight,
        bias_O: Tensor | None = None,
        onto_XO: Tensor | None = None,
    ) -> Tensor:
        return weight.product(_rows(x_XI), bias_O, onto_XO)

    def some_outputs(
        self, x_XI: Tensor, weight: PackedWeight, bias_O: Tensor | None, outputs: range
    ) -> Tensor:
        return weight.product(_rows(x_XI), bias_O, outputs=outputs)

    def rms_norm(
        self, x_XD: Tensor, weight_D: Tensor, eps: float, onto_XD: Tensor | None = None
    ) -> Tensor:
        normed_XD = elementwise.rms_norm(_rows(x_XD), weight_D, eps)
        return normed_XD if onto_XD is None else normed_XD.add_(onto_XD)

    def layer_norm(self, x_XD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        return elementwise.layer_norm(_rows(x_XD), weight_D, bias_D, eps)

    def activate(self, x_XF: Tensor, activation: str) -> Tensor:
        return elementwise.activate(_rows(x_XF), activation)

    def gated(
        self, x_XI: Tensor, weight: GatedWeight, bias: Tensor | None, activation: str
    ) -> Tensor:
        return weight.gated(_rows(x_XI), bias, activation)

    def likeliest(
        self, x_RI: Tensor, weight: PackedWeight, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        return weight.likeliest(_rows(x_RI)) if bias_O is None else None

    def place_heads(
        self,
        heads_TAH: Tensor,
        num_kv_heads: int,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        pool: PoolLayer,
        inputs: StageInputs,
    ) -> Tensor:
        """In the memory of `heads_TAH`. Blocks that are begun are not cleared: what lies in them
        behind a request's last position is not read."""
        num_q = heads_TAH.shape[1] - 2 * num_kv_heads
        q_TNH, k_TKH, v_TKH = heads_TAH.split((num_q, num_kv_heads, num_kv_heads), 1)
        if norms is not None:
            q_TNH.copy_(norms[0](q_TNH))
            k_TKH.copy_(norms[1](k_TKH))
        self.turn_heads(heads_TAH[:, : num_q + num_kv_heads], None, rotation)
        write(k_TKH, v_TKH, pool, inputs.slots_T)
        return q_TNH

    def turn_heads(
        self,
        heads_TXH: Tensor,
        norm: Callable[[Tensor], Tensor] | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """In place."""
        if norm is not None:
            heads_TXH.copy_(norm(heads_TXH))
        if rotation is not None:
            elementwise.rotate(heads_TXH, rotation)
        return heads_TXH

    def attention_half(
        self,
        x_TD: Tensor,
        norm: Norm | None,
        qkv: Product,
        num_kv_heads: int,
        head_norms: HeadNorms | None,
        rotation: Rotation | None,
        pool: PoolLayer,
        inputs: StageInputs,
        plan: Plan,
        scoring: Scoring,
        out: Product,
        onto_TD: Tensor | None,
    ) -> Tensor:
        if not halves.are_own(qkv, out):
            heads = (num_kv_heads, head_norms, rotation, pool, inputs, plan, scoring)
            return super().attention_half(x_TD, norm, qkv, *heads, out, onto_TD)
        heads = (head_norms, rotation, pool, plan, scoring)
        return halves.attention(_rows(x_TD), norm, qkv, *heads, out, _rows(onto_TD))

    def mlp_half(
        self,
        x_TD: Tensor,
        norm: Norm | None,
        up: Product,
        activation: str,
        down: Product,
        onto_TD: Tensor | None,
        *,
        is_gated: bool,
    ) -> Tensor:
        if not halves.are_own(up, down):
            half = super().mlp_half
            return half(x_TD, norm, up, activation, down, onto_TD, is_gated=is_gated)
        own = (norm, up, activation, down, _rows(onto_TD))
        return halves.mlp(_rows(x_TD), *own, is_gated=is_gated)

    def layers_at_once(
        self,
        layers: Layers,
        count: int,
        x_TD: Tensor,
        kv: KVCache,
        plan: Plan,
    ) -> Tensor | None:
        stack = layers.described
        if not isinstance(stack, halves.Stack) or not stack.is_of(kv, self.num_set):
            stack = layers.described = halves.Stack(layers.halves, kv, self.num_set)
        return stack.run(count, _rows(x_TD), plan)


def _is_paired(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and has_pairs_of_bfloat16()


def _rows(x: Tensor | None) -> Tensor | None:
    """In float32, one behind the other."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()
