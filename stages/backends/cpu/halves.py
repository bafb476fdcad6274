"""The halves of a decoder layer by one call of C each, and layers by one (kernels/halves.c).

Suffixes: T tokens, D hidden size, F intermediate size.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_bool, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from pipeserve.stages.attention.kv import KVCache, PoolLayer
from pipeserve.stages.attention.rotation import Rotation
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.backend import Norm, Product, TwoHalves
from pipeserve.stages.backends.cpu.kernel_attention import Plan, pool_of, scoring_of
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cpu.products import PackedWeight
from pipeserve.stages.backends.cpu.scratch import scratch
from pipeserve.stages.backends.cpu.types import KERNEL_ACTIVATIONS


class _Weight(ctypes.Structure):
    """As in halves.c."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
        ("storage", c_int32),
    )


class _Norm(ctypes.Structure):
    """As in halves.c."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class _Layer(ctypes.Structure):
    """As in halves.c."""

    _fields_ = (
        ("pool", c_void_p),
        ("scoring", c_void_p),
        ("attention_norm", c_void_p),
        ("qkv", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("out", c_void_p),
        ("mlp_norm", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("activation", c_int32),
        ("is_gated", c_bool),
    )


class Stack:
    """Layers as C is told of them, made once for all microbatches."""

    def __init__(self, layers: Sequence[TwoHalves], kv: KVCache, num_set: int) -> None:
        """`num_set`: weights that were set by now."""
        self._kv, self._num_set = weakref.ref(kv), num_set
        self._rotation = layers[0].rotation
        self._can_run = all(
            are_own(layer.qkv, layer.out, layer.up, layer.down) and layer.rotation is self._rotation
            for layer in layers
        )
        if not self._can_run:
            return
        self._size = layers[0].qkv.weight.in_features
        self._parts = [_parts_of(layer, kv.layer(i)) for i, layer in enumerate(layers)]
        """They are kept, for C's layers point to them."""
        self._layers = (_Layer * len(layers))(
            *(
                _Layer(
                    *(None if part is None else addressof(part) for part in parts),
                    KERNEL_ACTIVATIONS[layer.activation],
                    layer.is_gated,
                )
                for layer, parts in zip(layers, self._parts, strict=True)
            )
        )

    def is_of(self, kv: KVCache, num_set: int) -> bool:
        """Whether nothing has changed that it was made of."""
        return self._kv() is kv and self._num_set == num_set

    def run(
        self,
        count: int,
        x_TD: Tensor,
        plan: Plan,
    ) -> Tensor | None:
        """Of the first `count` layers, one at least. `x_TD`: float32, contiguous."""
        if not self._can_run:
            return None
        assert x_TD.shape == (plan.inputs.num_tokens, self._size)
        to_TD = torch.empty(x_TD.shape)
        turns_PD = None
        if self._rotation is not None:
            turns_PD = self._rotation.until(plan.inputs.num_positions)
        _run(
            kernels().run_layers,
            self._layers,
            count,
            plan.batch,
            *_described(turns_PD),
            x_TD.data_ptr(),
            to_TD.data_ptr(),
        )
        return to_TD


def attention(
    x_TD: Tensor,
    norm: Norm | None,
    qkv: Product,
    head_norms: Sequence[Norm] | None,
    rotation: Rotation | None,
    pool: PoolLayer,
    plan: Plan,
    scoring: Scoring,
    out: Product,
    onto_TD: Tensor | None,
) -> Tensor:
    """Of all rows of `plan`. `x_TD` and `onto_TD`: float32, contiguous."""
    assert x_TD.shape == (plan.inputs.num_tokens, qkv.weight.in_features)
    to_TD = torch.empty(plan.inputs.num_tokens, out.weight.out_features)
    q_norm, k_norm = head_norms or (None, None)
    _run(
        kernels().attention_half,
        plan.batch,
        byref(pool_of(pool)),
        byref(scoring_of(scoring)),
        _reference(_norm_of(norm)),
        byref(_weight_of(qkv)),
        _reference(_norm_of(q_norm)),
        _reference(_norm_of(k_norm)),
        *_described(None if rotation is None else rotation.turns_PD),
        byref(_weight_of(out)),
        x_TD.data_ptr(),
        None if onto_TD is None else onto_TD.data_ptr(),
        to_TD.data_ptr(),
    )
    return to_TD


def mlp(
    x_TD: Tensor,
    norm: Norm | None,
    up: Product,
    activation: str,
    down: Product,
    onto_TD: Tensor | None,
    *,
    is_gated: bool,
) -> Tensor:
    """`x_TD` and `onto_TD`: float32, contiguous."""
    num_rows, size = x_TD.shape
    assert size == up.weight.in_features
    to_TD = torch.empty(num_rows, down.weight.out_features)
    _run(
        kernels().mlp_half,
        _reference(_norm_of(norm)),
        byref(_weight_of(up)),
        KERNEL_ACTIVATIONS[activation],
        is_gated,
        byref(_weight_of(down)),
        num_rows,
        x_TD.data_ptr(),
        None if onto_TD is None else onto_TD.data_ptr(),
        to_TD.data_ptr(),
    )
    return to_TD


def are_own(*products: Product) -> bool:
    """Not shared with other ranks."""
    return all(isinstance(product.weight, PackedWeight) for product in products)


def _parts_of(layer: TwoHalves, pool: PoolLayer) -> tuple[ctypes.Structure | None, ...]:
    """As the first fields of `_Layer` point to them."""
    q_norm, k_norm = layer.head_norms or (None, None)
    return (
        pool_of(pool),
        scoring_of(layer.scoring),
        _norm_of(layer.attention_norm),
        _weight_of(layer.qkv),
        _norm_of(q_norm),
        _norm_of(k_norm),
        _weight_of(layer.out),
        _norm_of(layer.mlp_norm),
        _weight_of(layer.up),
        _weight_of(layer.down),
    )


def _described(turns_PD: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if turns_PD is None else (turns_PD.data_ptr(), turns_PD.shape[1])


def _weight_of(product: Product) -> _Weight:
    """Weight and bias, as the kernels are told of them."""
    if product.described is None:
        weight = product.weight
        product.described = _Weight(
            weight.packed.data_ptr(),
            _address(product.bias),
            weight.out_features,
            weight.in_features,
            weight.storage,
        )
    return product.described


def _norm_of(norm: Norm | None) -> _Norm | None:
    """The same of a norm."""
    if norm is not None and norm.described is None:
        norm.described = _Norm(norm.weight.data_ptr(), _address(norm.bias), norm.eps)
    return None if norm is None else norm.described


def _reference(described: ctypes.Structure | None) -> object:
    return None if described is None else byref(described)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(half: Callable[..., int], *arguments: object) -> None:
    while wanted := half(*arguments, scratch.address, scratch.size):
        scratch.grow(wanted)
