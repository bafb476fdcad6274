"""Memory that kernels work in, kept for the next call: what is new comes page by page."""

import threading

import torch


class Scratch(threading.local):
    """Each thread's own; as large as the most that one of its calls wanted."""

    size = 0
    """In floats."""
    address = 0

    def grow(self, num_floats: int) -> None:
        """To that many at least; what was in it may be gone."""
        if num_floats > self.size:
            self._floats = torch.empty(num_floats)
            self.address, self.size = self._floats.data_ptr(), num_floats


scratch = Scratch()


def scratch_of(num_floats: int) -> int:
    """Address of that many floats to work in, until the thread asks again."""
    scratch.grow(num_floats)
    return scratch.address
