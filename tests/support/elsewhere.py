"""A device that is not there: its tensors hold real numbers, and whatever meets them must lie there
too, as on a GPU. So a machine without one finds a tensor that was made on the wrong side.

Plain numbers have to go there as tensors, `torch.tensor(numbers).to(device)`: what torch makes of
them there itself (`device=`, a list as an index) does not pass by here, and is an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ELSEWHERE = torch.device("meta")
"""A name that torch knows and has nothing behind here."""
_aten = torch.ops.aten
_CROSS = {_aten.copy_, _aten.index}
"""May have tensors of both sides, as with a GPU: a copy, and indices from the host."""


class _Tensor(torch.Tensor):
    """One that lies elsewhere; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
        )
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of `Elsewhere`")


class Elsewhere(TorchDispatchMode):
    """Within it, ELSEWHERE is a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = list(tree_iter((args, kwargs or {})))
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, _Tensor)]
        device = next((each for each in given if isinstance(each, torch.device)), None)
        stray = [t for t in tensors if t.device == ELSEWHERE and not isinstance(t, _Tensor)]
        assert not stray, f"{func} of a tensor that was made there from plain numbers"
        if device is None and there and func.overloadpacket not in _CROSS:
            here = [t for t in tensors if not isinstance(t, _Tensor) and t.dim()]
            assert not here, f"{func} of a tensor on the device and one on the host"
        goes_there = bool(there) if device is None else device == ELSEWHERE
        out = func(*_unwrapped(args), **_unwrapped(kwargs or {}))
        if not goes_there:
            return out
        known = {id(tensor.held): tensor for tensor in there}  # what was changed in place
        return tree_map_only(
            torch.Tensor, lambda held: known[id(held)] if id(held) in known else _Tensor(held), out
        )


def _unwrapped(tree):
    """As the host sees it, which has the numbers."""
    tree = tree_map_only(torch.device, lambda device: torch.device("cpu"), tree)
    return tree_map_only(_Tensor, lambda tensor: tensor.held, tree)
