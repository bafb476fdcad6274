"""What a stage computes with: its device, what it holds there, and the operations of its layers.

Modules say what is computed (`stages/layers`, `stages/families`), a backend how. `Backend` is that
in plain PyTorch on any device: what a GPU uses, and what tests hold other backends against. A
device with something better overrides single methods, and no module knows of it.

`onto`, wherever it is, is what a result is added to: the residual of a layer, so that an operation
may add as it writes. Nothing here modifies its arguments but a KV pool and, in `place_heads` and
`turn_heads`, the heads.

Suffixes: T tokens, X any axes, D a normed axis, I and O features of a product, F intermediate size,
N query heads, K kv heads, A all heads (queries, then keys, then values), H head size.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeserve.stages.attention.attention import Attention
from pipeserve.stages.attention.gathered_attention import GatheredAttention
from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache, PoolLayer, clear, write
from pipeserve.stages.attention.rotation import Rotation, RotationTable, rotate
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.config.model_config import ModelConfig


class Norm(Protocol):
    """Of the last axis: an RMSNorm, or with a bias a LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    described: object
    """As a backend's kernels are told of it: theirs, made once; None after weights were set."""

    def __call__(self, x_XD: Tensor) -> Tensor: ...


class Product(Protocol):
    """A linear layer; or what several ranks that share a stage have around theirs, whose `weight`
    is no backend's."""

    weight: Any
    bias: Tensor | None
    described: object
    """As of a norm."""

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor: ...


HeadNorms = Sequence[Norm]
"""Of the queries and of the keys, over each head."""


class TwoHalves(NamedTuple):
    """A layer whose attention and MLP are both normed before, and added to what they were given."""

    attention_norm: Norm
    qkv: Product
    head_norms: HeadNorms | None
    rotation: RotationTable | None
    scoring: Scoring
    out: Product
    mlp_norm: Norm
    up: Product
    activation: str
    down: Product
    is_gated: bool


@dataclass(eq=False)
class Layers:
    """Of a stage, from its first one on."""

    halves: Sequence[TwoHalves]
    described: object = None
    """As a backend's kernels are told of them: theirs, made once for a KV pool and its weights."""


class Backend:
    """Of one stage, on one device. Keeps nothing of a microbatch."""

    turns_keys = False
    """Whether its attention likes the keys of a block dimension by dimension (`KVCache`)."""

    def __init__(
        self, device: str | torch.device = "cpu", attention: Attention | None = None
    ) -> None:
        self.device = torch.device(device)
        self.attention = attention or GatheredAttention(self.device)
        self.num_set = 0
        """Weights that were set so far: what was made of the ones before the latest may be void."""

    @property
    def name(self) -> str:
        """Of what computes here, for people."""
        return f"PyTorch on {self.device.type}"

    # ---- what lies on the device ----------------------------------------------------------------

    def place(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; itself where it is there."""
        return tensor.to(self.device)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what stays, such as weights."""
        return torch.empty(shape, dtype=dtype, device=device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same of a KV pool."""
        return torch.zeros(shape, dtype=dtype, device=device)

    def prepare(self) -> bool:
        """A moment's worth of what is to be done some time, while there is nothing to compute.
        Returns whether there was any."""
        return False

    def place_matrix(self, weight_OI: Tensor) -> Tensor:
        """The weight of a product, in the layout that `linear` likes best."""
        return self.place(weight_OI)

    def place_bias(self, bias_O: Tensor) -> Tensor:
        """That of a product, as `linear` likes it best."""
        return self.place(bias_O)

    def place_vocabulary(self, weight_OI: Tensor) -> Tensor:
        """The same of `likeliest`."""
        return self.place_matrix(weight_OI)

    def bytes_beside_vocabulary(self, num_rows: int, num_columns: int) -> int:
        """What `place_vocabulary` keeps besides the weight itself."""
        return 0

    def place_gated_matrix(self, weight_OI: Tensor) -> Tensor:
        """The same of `gated`: gates first, then as many rows that they are for."""
        return self.place_matrix(weight_OI)

    def place_gated_bias(self, bias_O: Tensor) -> Tensor:
        return self.place_bias(bias_O)

    def make_kv(
        self,
        config: ModelConfig,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> KVCache:
        """The pool in the layout that this backend's attention reads."""
        return KVCache(
            config,
            num_layers=num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=self.device,
            turned=self.turns_keys,
            zeros=self.zeros,
        )

    def kv_block_bytes(
        self, config: ModelConfig, *, num_layers: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """What each block adds to that pool."""
        return KVCache.block_bytes(
            config, num_layers=num_layers, block_size=block_size, dtype=dtype
        )

    # ---- operations -----------------------------------------------------------------------------

    def pad_rows(self, x: Tensor) -> Tensor:
        """`x`, perhaps with rows behind it that nobody reads, where few distinct shapes pay."""
        return x

    def linear(
        self,
        x_XI: Tensor,
        weight: Tensor,
        bias_O: Tensor | None = None,
        onto_XO: Tensor | None = None,
    ) -> Tensor:
        """[X, I] of any dtype -> [X, O] of the weight's, or of `onto_XO`'s. `weight` is what
        `place_matrix` made."""
        return _added(F.linear(x_XI.to(weight.dtype), weight, bias_O), onto_XO)

    def some_outputs(
        self, x_XI: Tensor, weight: Tensor, bias_O: Tensor | None, outputs: range
    ) -> Tensor:
        """Those of `linear`'s outputs alone: [X, len(outputs)], whose rows may lie apart."""
        some = slice(outputs.start, outputs.stop)
        return self.linear(x_XI, weight[some], None if bias_O is None else bias_O[some])

    def rms_norm(
        self, x_XD: Tensor, weight_D: Tensor, eps: float, onto_XD: Tensor | None = None
    ) -> Tensor:
        """Float32, whatever comes in."""
        x_XD = x_XD.float()
        squares_X = torch.linalg.vecdot(x_XD, x_XD)[..., None]
        scale_X = (squares_X / x_XD.shape[-1] + eps).rsqrt_()
        return _added((x_XD * scale_X).mul_(weight_D), onto_XD)

    def layer_norm(self, x_XD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """Float32, whatever comes in."""
        return F.layer_norm(x_XD.float(), weight_D.shape, weight_D, bias_D, eps)

    def activate(self, x_XF: Tensor, activation: str) -> Tensor:
        """`activation` is a name of ACTIVATIONS."""
        return ACTIVATIONS[activation](x_XF)

    def gated(self, x_XI: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """activation(gate) * up, both of them parts of one product: [X, F]. `weight` and `bias` are
        what `place_gated_matrix` and `place_gated_bias` made."""
        gate_XF, up_XF = self.linear(x_XI, weight, bias).chunk(2, -1)
        return ACTIVATIONS[activation](gate_XF).mul_(up_XF)

    def likeliest(
        self, x_RI: Tensor, weight: Tensor, bias_O: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The highest of each row of `linear` and the first output that has it, as `max(-1)` says,
        where that can be had for less than the product; else, or where numbers may not be finite,
        None."""
        return None

    def prepare_attention(
        self, inputs: StageInputs, kv: KVCache, windows: Collection[int | None]
    ) -> object:
        """What `attend` needs of a microbatch in every layer; `windows` are those of the layers."""
        return self.attention.prepare(inputs, kv, windows)

    def place_heads(
        self,
        heads_TAH: Tensor,
        num_kv_heads: int,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        pool: PoolLayer,
        inputs: StageInputs,
    ) -> Tensor:
        """Norms and rotates queries and keys, writes keys and values into `pool`, and returns the
        queries [T, N, H], of which there may be none. Rows of padding are not written. May
        overwrite `heads_TAH`."""
        num_q = heads_TAH.shape[1] - 2 * num_kv_heads
        q_TNH, k_TKH, v_TKH = heads_TAH.split((num_q, num_kv_heads, num_kv_heads), 1)
        if norms is None and rotation is not None:  # in one go
            rotated_TXH = rotate(heads_TAH[:, : num_q + num_kv_heads], rotation)
            q_TNH, k_TKH = rotated_TXH.split((num_q, num_kv_heads), 1)
        elif norms is not None:
            q_TNH, k_TKH = (
                self.turn_heads(heads, norm, rotation)
                for heads, norm in zip((q_TNH, k_TKH), norms, strict=True)
            )
        clear(pool, inputs.begun_blocks)
        write(k_TKH, v_TKH, pool, inputs.slots_T)
        return q_TNH

    def turn_heads(
        self,
        heads_TXH: Tensor,
        norm: Callable[[Tensor], Tensor] | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """Normed and rotated, as `place_heads` does it. May overwrite `heads_TXH`."""
        if norm is not None:
            heads_TXH = norm(heads_TXH)
        return heads_TXH if rotation is None else rotate(heads_TXH, rotation)

    def attend(self, q_TNH: Tensor, pool: PoolLayer, plan: object, scoring: Scoring) -> Tensor:
        """[T, N, H]; what comes of rows of padding is of no use. `plan`: `prepare_attention`'s."""
        return self.attention(q_TNH, pool, plan, scoring)

    # ---- halves of a layer, and whole layers ----------------------------------------------------

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
        plan: object,
        scoring: Scoring,
        out: Product,
        onto_TD: Tensor | None,
    ) -> Tensor:
        """What `SelfAttention` is where all rows go on."""
        heads_TAH = qkv(_normed(x_TD, norm)).unflatten(-1, (-1, pool[0].shape[-1]))
        q_TNH = self.place_heads(heads_TAH, num_kv_heads, head_norms, rotation, pool, inputs)
        return out(self.attend(q_TNH, pool, plan, scoring).flatten(1), onto_TD)

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
        """What `Mlp` is, or `GatedMlp`, whose `up` has its activation in it."""
        inner_TF = up(_normed(x_TD, norm))
        return down(inner_TF if is_gated else self.activate(inner_TF, activation), onto_TD)

    def layers_at_once(
        self,
        layers: Layers,
        count: int,
        x_TD: Tensor,
        kv: KVCache,
        plan: object,
    ) -> Tensor | None:
        """What comes of the first `count` of `layers`, one at least, all of whose rows go on, where
        it can be had for less than half by half; else None, and nothing was done."""
        return None


def _added(x: Tensor, onto: Tensor | None) -> Tensor:
    return x if onto is None else onto + x


def _normed(x_XD: Tensor, norm: Norm | None) -> Tensor:
    return x_XD if norm is None else norm(x_XD)
