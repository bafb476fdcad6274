"""Products of rows of activations with a weight, by the C kernels."""

import ctypes

import torch
from torch import Tensor

from pipeserve.stages.backends.cpu.large_pages import Shelf
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.backends.cpu.scratch import scratch_of
from pipeserve.stages.backends.cpu.types import KERNEL_ACTIVATIONS, KERNEL_TYPES

_PAIRS = 3
"""As product_tile.h has it."""
_MOST_COARSE = 1 << 16
"""Inputs whose sums of a coarse copy fit in 32 bits."""
_MIXED = 64
"""Inputs that are mixed together at most: `MIX` of coarse.h."""
_shelf = Shelf()


class PackedWeight:
    """A weight in the layout that the kernels read from front to back; made once, at load.

    Kept in 16 bits where that is exact: then half as much is read, and results are those of the
    float32 weight, for sums and products are float32. `rounds_x`: x is rounded to bfloat16 as well
    and multiplied by the CPU's instruction for pairs of them, with sums in float32; wants a weight
    in bfloat16 and a library for AVX512-bf16.
    """

    _sides = 1
    """Kinds of outputs that lie in turn (weights.c)."""
    _coarse: Tensor | None = None
    """The copy that a `VocabularyWeight` may have beside it."""

    def __init__(
        self,
        weight: Tensor,
        rounds_x: bool = False,
        library: ctypes.CDLL | None = None,
    ) -> None:
        """`weight` [out, in]; `library`: instead of the process's own."""
        self._library = found = _own_or(library)
        self.out_features, self.in_features = weight.shape
        self.dtype = narrowest_exact_dtype(weight, found)
        self.storage = _PAIRS if rounds_x else KERNEL_TYPES[self.dtype]
        if rounds_x:
            assert weight.dtype == torch.bfloat16 and found.multiplies_pairs()
        weight = weight.contiguous()
        self.packed = _shelf.take(found.packed_size(self.storage, *weight.shape, self._sides))
        self._panel = found.panel_outputs()
        self._panel_bytes = found.packed_size(self.storage, 1, self.in_features, 1)
        self._norm = found.pack_weight(
            *(self.storage, weight.data_ptr(), KERNEL_TYPES[weight.dtype]),
            *(*weight.shape, self._sides, self.packed.data_ptr()),
        )
        """Of no output are the weights longer."""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @staticmethod
    def padded(bias: Tensor, library: ctypes.CDLL | None = None) -> Tensor:
        """`bias` [out] in float32 as `product` takes it: the first part of a longer tensor."""
        panel = _own_or(library).panel_outputs()
        whole = torch.zeros(-(-len(bias) // panel) * panel)
        whole[: len(bias)] = bias
        return whole[: len(bias)]

    def product(
        self,
        x_TD: Tensor,
        bias: Tensor | None = None,
        onto_TN: Tensor | None = None,
        outputs: range | None = None,
    ) -> Tensor:
        """x W^T + bias, added to `onto_TN` of float32: float32 [T, in] -> float32 [T, out].

        `bias`: as `padded` makes it. `outputs`: these alone, as a part of whole panels that have
        them. A row's result does not depend on the rows beside it, bit for bit, nor a number of it
        on the outputs beside it.
        """
        assert x_TD.dtype == torch.float32 and x_TD.shape[1] == self.in_features
        assert x_TD.stride(1) == 1
        begin, stop = 0, self.out_features
        if outputs is not None:
            begin, stop = outputs.start // self._panel * self._panel, outputs.stop
        num_rows, num_outputs = x_TD.shape[0], stop - begin
        y_TN = torch.empty(num_rows, num_outputs)
        if onto_TN is not None:
            assert onto_TN.dtype == torch.float32 and onto_TN.stride(1) == 1
            assert onto_TN.shape == y_TN.shape
        self._library.product(
            self.storage,
            x_TD.data_ptr(),
            x_TD.stride(0),
            num_rows,
            self.packed.data_ptr() + begin // self._panel * self._panel_bytes,
            num_outputs,
            self.in_features,
            None if bias is None else bias.data_ptr() + begin * bias.itemsize,
            None if onto_TN is None else onto_TN.data_ptr(),
            0 if onto_TN is None else onto_TN.stride(0),
            y_TN.data_ptr(),
            num_outputs,
            scratch_of(self._library.product_scratch(num_rows, self.in_features)),
        )
        return y_TN if outputs is None else y_TN[:, outputs.start - begin :]

    def likeliest(self, x_TD: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of each row the highest number of `product(x_TD)` and the first output that has it, as
        `max(-1)` says; None where numbers may not be finite.

        No output is written. Where the CPU multiplies pairs of bfloat16 and the weight is kept in
        it, that is nearly twice as fast as the product, and as exact (products.c); of a
        `VocabularyWeight` twice as fast again.
        """
        assert x_TD.dtype == torch.float32 and x_TD.stride(1) == 1
        num_rows, shape = x_TD.shape[0], (self.out_features, self.in_features)
        highest_T, outputs_T = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
        are_finite = self._library.likeliest(
            self.storage,
            self.dtype == torch.bfloat16 and self._library.multiplies_pairs(),
            x_TD.data_ptr(),
            x_TD.stride(0),
            num_rows,
            self.packed.data_ptr(),
            None if self._coarse is None else self._coarse.data_ptr(),
            *shape,
            self._norm,
            highest_T.data_ptr(),
            outputs_T.data_ptr(),
            scratch_of(self._library.likeliest_scratch(num_rows, *shape)),
        )
        return (highest_T, outputs_T) if are_finite else None


class VocabularyWeight(PackedWeight):
    """Of many outputs, of which often the highest alone is asked for: beside it lies a coarse copy,
    where the CPU has a use for it, which tells in few bytes where that may be (kernels/coarse.h).
    It bounds the product with x as it is, so x is never rounded.
    """

    def __init__(self, weight: Tensor, library: ctypes.CDLL | None = None) -> None:
        super().__init__(weight, library=library)
        size = self.coarse_bytes(*weight.shape, self._library)
        if not size:
            return
        weight = weight.contiguous()
        coarse = _shelf.take(size)
        scratch = scratch_of(self.in_features + _MIXED)
        where = (KERNEL_TYPES[weight.dtype], *weight.shape, scratch, coarse.data_ptr())
        if self._library.coarsen_weight(weight.data_ptr(), *where):
            self._coarse = coarse

    @staticmethod
    def coarse_bytes(
        out_features: int, in_features: int, library: ctypes.CDLL | None = None
    ) -> int:
        """What that copy takes; 0: there is none."""
        if in_features > _MOST_COARSE:
            return 0
        return _own_or(library).coarse_size(out_features, in_features)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._coarse is None else self._coarse.nbytes)


class GatedWeight(PackedWeight):
    """Of gates and of what they are for, [gates, then as many others, in]: rows of both lie in
    turn, so that a product has them together and what comes out is `activation(gate) * up` at once.
    """

    _sides = 2

    @property
    def size(self) -> int:
        """Of what comes out."""
        return self.out_features // 2

    @staticmethod
    def padded(bias: Tensor, library: ctypes.CDLL | None = None) -> Tensor:
        """`bias` [gates and others] in float32 as `gated` takes it: in turn, as in the weight."""
        half = _own_or(library).panel_outputs() // 2
        sides = bias.float().unflatten(0, (2, -1))
        sides = torch.cat((sides, sides.new_zeros(2, -sides.shape[1] % half)), 1)
        return sides.unflatten(1, (-1, half)).transpose(0, 1).flatten()

    def gated(self, x_TD: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """Float32 [T, in] -> float32 [T, size], with the bits of a product, an activation and a
        multiplication one after the other; under `rounds_x` within 2e-4 of their size, because the
        next product rounds them to bfloat16."""
        assert x_TD.dtype == torch.float32 and x_TD.shape[1] == self.in_features
        assert x_TD.stride(1) == 1
        num_rows = len(x_TD)
        y_TN = torch.empty(num_rows, self.size)
        self._library.gated_product(
            self.storage,
            x_TD.data_ptr(),
            x_TD.stride(0),
            num_rows,
            self.packed.data_ptr(),
            2 * self.size,
            self.in_features,
            None if bias is None else bias.data_ptr(),
            KERNEL_ACTIVATIONS[activation],
            y_TN.data_ptr(),
            scratch_of(self._library.product_scratch(num_rows, self.in_features)),
        )
        return y_TN


def narrowest_exact_dtype(weight: Tensor, library: ctypes.CDLL) -> torch.dtype:
    """Of bfloat16, float16 and float32 the first that holds every number of `weight` as it is.

    bfloat16 comes first because it becomes float32 by a shift, so products are 2 to 8 % faster than
    with float16 (bench/linears.py).
    """
    weight = weight.contiguous()
    kind = library.narrowest_exact(weight.data_ptr(), KERNEL_TYPES[weight.dtype], weight.numel())
    return next(dtype for dtype, number in KERNEL_TYPES.items() if number == kind)


def _own_or(library: ctypes.CDLL | None) -> ctypes.CDLL:
    """`library`, or the one that this process uses."""
    found = library or kernels()
    assert found is not None, "no kernels here"
    return found
