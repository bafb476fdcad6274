"""Products of rows of activations with a weight, by the C kernels."""

import ctypes
import threading

import torch
from torch import Tensor

from pipeserve.stages.backends.cpu.library import kernels

_STORAGES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As `enum Storage` of products.c has them."""
_DOT = 3
_scratch = threading.local()


class PackedWeight:
    """A weight in the layout that the kernels read from front to back; made once, at load.

    Kept in 16 bits where that is exact: then half as much is read, and results are those of the
    float32 weight, for sums and products are float32. `rounds_x`: x is rounded to bfloat16 as well
    and multiplied by the CPU's instruction for pairs of them, with sums in float32; wants a weight
    in bfloat16 and a library for AVX512-bf16.
    """

    def __init__(
        self,
        weight: Tensor,
        rounds_x: bool = False,
        library: ctypes.CDLL | None = None,
    ) -> None:
        """`weight` [out, in]; `library`: instead of the process's own."""
        found = library or kernels()
        assert found is not None, "no kernels here"
        self._library = found
        self.out_features, self.in_features = weight.shape
        self.dtype = narrowest_exact_dtype(weight)
        if rounds_x:
            assert weight.dtype == torch.bfloat16
            self.dtype = torch.bfloat16
        self._storage = _DOT if rounds_x else _STORAGES[self.dtype]
        weight = weight.to(self.dtype).contiguous()
        size = self._library.packed_size(self._storage, *weight.shape)
        self._packed = torch.zeros(size, dtype=torch.uint8)
        self._library.pack_weight(
            self._storage, weight.data_ptr(), *weight.shape, self._packed.data_ptr()
        )

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    @staticmethod
    def padded(bias: Tensor) -> Tensor:
        """`bias` [out] in float32 as `product` takes it: the first part of a longer tensor."""
        library = kernels()
        assert library is not None, "no kernels here"
        panel = library.panel_outputs()
        whole = torch.zeros(-(-len(bias) // panel) * panel)
        whole[: len(bias)] = bias
        return whole[: len(bias)]

    def product(
        self, x_TD: Tensor, bias: Tensor | None = None, add_to: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias: float32 [T, in] -> float32 [T, out].

        `bias`: as `padded` makes it. `add_to`: float32 [T, out]; the product is added to it, and it
        is returned. A row's result does not depend on the rows beside it, bit for bit.
        """
        assert x_TD.dtype == torch.float32 and x_TD.shape[1] == self.in_features
        assert x_TD.stride(1) == 1
        num_rows = x_TD.shape[0]
        y_TN = torch.empty(num_rows, self.out_features) if add_to is None else add_to
        assert y_TN.dtype == torch.float32 and y_TN.stride(1) == 1
        assert y_TN.shape == (num_rows, self.out_features)
        self._library.product(
            self._storage,
            x_TD.data_ptr(),
            x_TD.stride(0),
            num_rows,
            self._packed.data_ptr(),
            self.out_features,
            self.in_features,
            None if bias is None else bias.data_ptr(),
            y_TN.data_ptr(),
            y_TN.stride(0),
            add_to is not None,
            _scratch_of(self._library.product_scratch(num_rows, self.in_features)),
        )
        return y_TN


def narrowest_exact_dtype(weight: Tensor) -> torch.dtype:
    """Of bfloat16, float16 and float32 the first that holds every number of `weight` as it is.

    bfloat16 comes first because it becomes float32 by a shift, so products are 2 to 8 % faster than
    with float16 (bench/linears.py).
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return dtype
    return torch.float32


def _scratch_of(num_floats: int) -> int:
    """Address of memory to work in, kept for the next product of this thread."""
    scratch: Tensor | None = getattr(_scratch, "floats", None)
    if scratch is None or scratch.numel() < num_floats:
        scratch = _scratch.floats = torch.empty(num_floats)
    return scratch.data_ptr()
