"""The halves of a decoder layer by one call of C each (kernels/halves.c).

Suffixes: T tokens, D hidden size, F intermediate size.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from pipeserve.stages.attention.kv import PoolLayer
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.backend import Norm, Product, Rotation
from pipeserve.stages.backends.cpu.kernel_attention import Plan, pool_of, scoring_of
from pipeserve.stages.backends.cpu.library import kernels
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
    assert x_TD.shape == (plan.num_tokens, qkv.weight.in_features)
    to_TD = torch.empty(plan.num_tokens, out.weight.out_features)
    q_norm, k_norm = head_norms or (None, None)
    cos_T1R, signed_sin_T1R = rotation or (None, None)
    _run(
        kernels().attention_half,
        plan.batch,
        pool_of(pool),
        scoring_of(scoring),
        _norm_of(norm),
        _weight_of(qkv),
        _norm_of(q_norm),
        _norm_of(k_norm),
        None if cos_T1R is None else cos_T1R.data_ptr(),
        None if signed_sin_T1R is None else signed_sin_T1R.data_ptr(),
        0 if cos_T1R is None else cos_T1R.shape[-1],
        _weight_of(out),
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
        _norm_of(norm),
        _weight_of(up),
        KERNEL_ACTIVATIONS[activation],
        is_gated,
        _weight_of(down),
        num_rows,
        x_TD.data_ptr(),
        None if onto_TD is None else onto_TD.data_ptr(),
        to_TD.data_ptr(),
    )
    return to_TD


def _weight_of(product: Product) -> object:
    """Weight and bias, as the kernels are told of them."""
    if product.described is None:
        weight = product.weight
        described = _Weight(
            weight.packed.data_ptr(),
            _address(product.bias),
            weight.out_features,
            weight.in_features,
            weight.storage,
        )
        product.described = ctypes.byref(described)
    return product.described


def _norm_of(norm: Norm | None) -> object:
    """The same of a norm."""
    if norm is not None and norm.described is None:
        described = _Norm(norm.weight.data_ptr(), _address(norm.bias), norm.eps)
        norm.described = ctypes.byref(described)
    return None if norm is None else norm.described


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(half: Callable[..., int], *arguments: object) -> None:
    while wanted := half(*arguments, scratch.address, scratch.size):
        scratch.grow(wanted)
