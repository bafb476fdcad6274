"""Memory in pages of 2 MiB, where Linux gives them to those who ask (transparent huge pages).

Weights and KV are read through once for each microbatch, and lie in more small pages than the
processor keeps the places of. With large ones decode attention takes 17 % less time, and products
of 1 to 8 rows 5 to 10 % (one core of an AMD Zen 4, November 2026).
"""

import ctypes
import math
import mmap
from weakref import ref

import torch
from torch import Tensor

_PAGE = 2 << 20
_BLOCK = 32 << 20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # linux/mman.h


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.empty; its memory is asked for in large pages, which come when it is written."""
    return _asked_for(torch.empty(shape, dtype=dtype))


class Zeros:
    """Zeros in large pages, which come one by one while there is nothing else to do, or else when
    they are first used; not all at once: a virtual machine's host may take seconds for each GB that
    it has not given it yet."""

    def __init__(self) -> None:
        self._to_come: list[tuple[int, int, ref[mmap.mmap]]] = []
        """Pages that have not come, the next one last: how far from the front of a part each lies,
        where, and in which memory. Once that is gone, something else may lie there."""

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, num_parts: int = 1) -> Tensor:
        """As torch.zeros, of equal parts that are each used from the front: what lies there comes
        first. Raises OSError where the machine has no such memory."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.zeros(shape, dtype=dtype)
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = _asked_for(torch.frombuffer(memory, dtype=dtype).view(shape))
        part, begin = num_bytes // num_parts, tensor.data_ptr()
        for page in _pages(tensor):
            # What a page that begins in one part has of the next is that one's front.
            into = (page - begin) % part
            self._to_come.append((into if into + _PAGE <= part else 0, page, ref(memory)))
        self._to_come.sort(key=lambda page: page[:2], reverse=True)
        return tensor

    def bring(self) -> bool:
        """The next page, of tensors that are still there; returns whether there was one."""
        while self._to_come:
            _, page, memory = self._to_come.pop()
            if not memory():
                continue
            if _madvise(page, _PAGE, _MADV_POPULATE_WRITE):  # as before Linux 5.14
                self._to_come.clear()
            return True
        return False


def _asked_for(tensor: Tensor) -> Tensor:
    """In large pages. Where that cannot be, small ones will do."""
    pages = _pages(tensor)
    if pages:
        _madvise(pages.start, pages.stop - pages.start, _MADV_HUGEPAGE)
    return tensor


def _pages(tensor: Tensor) -> range:
    """Where large ones begin that lie in it."""
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    return range(first, (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE, _PAGE)


class Shelf:
    """Takes many things that stay, the small ones side by side in large pages."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode(False)  # a tensor made in that mode could not be written to outside of it
    def take(self, num_bytes: int) -> Tensor:
        """uint8, at a multiple of 64 bytes, not written to yet."""
        taken = -(-num_bytes // 64) * 64
        if len(self._left) < taken:
            self._left = empty((max(taken, _BLOCK) + 64,), torch.uint8)
            self._left = self._left[-self._left.data_ptr() % 64 :]
        own, self._left = self._left[:num_bytes], self._left[taken:]
        return own


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
