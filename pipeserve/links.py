"""The seams between stages, in microbatch order: activations one way, sampled tokens back.

Activations are bare tensors, over one ZeroMQ PAIR socket a seam: the tensor's own bytes behind an
8-byte microbatch index. Shape and dtype follow from the microbatch that both ends already hold, and
the index is only compared. They may be megabytes, and ZeroMQ's I/O thread carries those while the
stage computes the next microbatch; that is worth the two more wake-ups that it costs.

Tokens are a few bytes that the first stage may be waiting for: over a plain `Connection`.

A stage waits on all of its sockets at once, so a wait can always be interrupted, and the engine's
window bounds what can queue up. `bench/links.py` measures both ways, and gloo.

Torch is imported where a tensor is: stages that compute nothing have none.

A dead neighbour does not raise here: its keeper tells the driver, and the driver ends the wait.
"""

import array
import struct
from typing import TYPE_CHECKING, Protocol

import zmq

from pipeserve.connection import Connection, FromZmq, Sources

if TYPE_CHECKING:
    import torch

_INDEX = struct.Struct("<q")


class ActivationLinks(Protocol):
    """A stage's links with its neighbours: what a stage does to have them. What it sends, and what
    a message of the source `listen` adds is, are a `Compute`'s own."""

    def listen(self, host: str, sources: Sources) -> str:
        """From the stage before, as a source that carries "activations"; returns its address."""
        ...

    def connect(self, address: str, sources: Sources) -> None:
        """To the stage behind, that listens at `address`."""
        ...

    def close(self) -> None: ...


class TensorLinks:
    """The `ActivationLinks` of stages that compute. A message is a list of two frames."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._next_stage: zmq.Socket | None = None

    def listen(self, host: str, sources: Sources) -> str:
        socket = self._pair()
        port = socket.bind_to_random_port(f"tcp://{host}")
        FromZmq(socket, sources, "activations")
        return f"{host}:{port}"

    def connect(self, address: str, sources: Sources) -> None:
        self._next_stage = self._pair()
        self._next_stage.connect(f"tcp://{address}")

    def send(self, index: int, tensor: "torch.Tensor") -> int:
        """Returns at once, with the number of bytes; keeps `tensor`'s memory until it is on its
        way. Do not write to it after."""
        import torch

        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._next_stage.send_multipart([_INDEX.pack(index), flat], copy=False)
        return _INDEX.size + flat.nbytes

    def close(self) -> None:
        """What is on its way is lost."""
        self._context.destroy(linger=0)

    def _pair(self) -> zmq.Socket:
        socket = self._context.socket(zmq.PAIR)
        # The window bounds what is on the way; a full queue would only turn into a hang.
        socket.set_hwm(0)
        socket.linger = 0
        return socket


def unpack_tensor(
    frames: list[zmq.Frame], index: int, shape: tuple[int, ...], dtype: "torch.dtype"
) -> "torch.Tensor":
    """The tensor in `frames`, sharing their memory.

    Raises RuntimeError when it is not the one expected: order is the runtime's guarantee, so that
    is our fault and nothing may be computed from it.
    """
    import torch

    header, body = frames
    (sent_index,) = _INDEX.unpack(header.buffer)
    expected_bytes = dtype.itemsize
    for extent in shape:
        expected_bytes *= extent
    if sent_index != index or len(body) != expected_bytes:
        raise RuntimeError(
            f"link out of step: expected microbatch {index} with {expected_bytes} bytes, "
            f"got {sent_index} with {len(body)}"
        )
    return torch.frombuffer(body.buffer, dtype=dtype).view(shape)


def send_tokens(first_stage: Connection, index: int, tokens: list[int]) -> None:
    """The last stage's sampled ids of microbatch `index`, to the first stage."""
    first_stage.send(_INDEX.pack(index) + array.array("i", tokens).tobytes())


def unpack_tokens(message: bytes | bytearray) -> tuple[int, list[int]]:
    """The microbatch's index and its sampled ids."""
    (index,) = _INDEX.unpack_from(message)
    return index, array.array("i", message[_INDEX.size :]).tolist()
