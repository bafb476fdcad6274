"""The seams between stages, in microbatch order: activations one way, sampled tokens back, and,
where both ends have the head, rows for the first stage's; each over a `Connection` of its own.

Activations are bare tensors: the tensor's own bytes, and behind them, where they do not upset its
alignment, the 8-byte microbatch index. Shape and dtype follow from the microbatch that both ends
already hold, and the index is only compared. They may be megabytes: what the kernel does not take
at once, a thread sends on while the stage computes the next microbatch.

Tokens are a few bytes that the first stage may be waiting for.

A stage waits on all of its sockets at once, so a wait can always be interrupted, and the engine's
window bounds what can queue up. `bench/links.py` measures them, ZeroMQ and gloo.

Torch is imported where a tensor is: stages that compute nothing have none.

A dead neighbour does not raise here: its keeper tells the driver, and the driver ends the wait.
"""

import array
import math
import struct
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeserve.wire import connecting
from pipeserve.wire.connection import Connection
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

if TYPE_CHECKING:
    import torch

_INDEX = struct.Struct("<q")
_TOKENS = struct.Struct("<qi")
"""Index, and how many ids follow."""
_ID_SIZE = array.array("i").itemsize


class ActivationLinks:
    """A stage's links with its neighbours. What it sends, and what a message is, are a subclass's
    and its `Compute`'s own."""

    carries = "activations"
    """As `Source` has it."""
    sends_part = gets_part = False
    """As `Connect` has them."""

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._next_stage: Connection | None = None
        self._inbox: deque[tuple[bytearray, float]] = deque()
        """In the order of microbatches, each with the time when it was seen."""

    def listen(self, host: str, sources: Sources) -> str:
        """From the stage before; returns its address. Who comes second finds nobody listening."""
        self._listener = Listener(host, sources, (self.carries,), once=True)
        return self._listener.address

    def connect(self, address: str, sources: Sources) -> Connection:
        """To the stage behind, that listens at `address`."""
        self._next_stage = connecting.connect(address, sources, self.carries)
        return self._next_stage

    def close(self) -> None:
        """Both of them; what came and was not taken is dropped. They may be made anew."""
        if self._listener is not None:
            self._listener.hang_up()
        if self._next_stage is not None:
            self._next_stage.close()
        self._inbox.clear()

    def came(self, messages: Iterable[bytearray], seen_s: float) -> None:
        """What the source that `listen` added has brought."""
        for message in messages:
            self._inbox.append((message, seen_s))

    def ready(self, index: int) -> bool:
        """Whether what microbatch `index` needs is there; or on its way, where the device itself
        waits for it. Asked of the next one alone."""
        return bool(self._inbox)

    def take(self, index: int) -> tuple[Any, float]:
        """What microbatch `index` needs, once it is ready, as `Compute.begin` is to have it; and
        since when it was there."""
        return self._inbox.popleft()


class TensorLinks(ActivationLinks):
    """Those of stages that compute."""

    def send(self, index: int, tensor: "torch.Tensor") -> int:
        """Returns at once, with the number of bytes; keeps `tensor`'s memory until it is on its
        way. Do not write to it after."""
        import torch

        flat = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        self._next_stage.send_large(memoryview(flat), memoryview(_INDEX.pack(index)))
        return flat.nbytes + _INDEX.size


class RowLinks(TensorLinks):
    """From the last stage to the first: hidden rows, float32, of which only the head is missing."""

    carries = "rows"


def unpack_tensor(
    message: bytearray, index: int, shape: tuple[int, ...], dtype: "torch.dtype"
) -> "torch.Tensor":
    """The tensor in `message`, sharing its memory.

    Raises RuntimeError when it is not the one expected: order is the runtime's guarantee, so that
    is our fault and nothing may be computed from it.
    """
    import torch

    num_bytes = len(message) - _INDEX.size
    (sent_index,) = _INDEX.unpack_from(message, num_bytes)
    expected_bytes = dtype.itemsize * math.prod(shape)
    if sent_index != index or num_bytes != expected_bytes:
        raise RuntimeError(
            f"link out of step: expected microbatch {index} with {expected_bytes} bytes, "
            f"got {sent_index} with {num_bytes}"
        )
    return torch.frombuffer(message, dtype=dtype, count=math.prod(shape)).view(shape)


def send_tokens(other_end: Connection, index: int, tokens: list[int], counts: bytes) -> None:
    """The sampled ids of microbatch `index`, and how many of them are of each chunk, from the end
    of the pipeline that has sampled to the other one."""
    ids = array.array("i", tokens).tobytes()
    other_end.send(_TOKENS.pack(index, len(tokens)) + ids + counts)


def unpack_sampled(message: bytes | bytearray) -> tuple[int, list[int], bytes]:
    """The microbatch's index, its sampled ids, and how many are of each chunk."""
    index, num_tokens = _TOKENS.unpack_from(message)
    stop = _TOKENS.size + num_tokens * _ID_SIZE
    return (
        index,
        array.array("i", message[_TOKENS.size : stop]).tolist(),
        bytes(message[stop:]),
    )
