"""The seams between stages: bare tensors one way, in microbatch order.

A link is one ZeroMQ PAIR socket a seam. Its frames are the tensor's own bytes behind an 8-byte
microbatch index: shape and dtype follow from the microbatch that both ends already hold, and the
index is only compared. ZeroMQ's I/O thread carries the bytes while the stage computes; the stage
waits on all of its sockets at once, so a wait can always be interrupted, and the engine's window
bounds what can queue up. `bench/links.py` measures this against plain sockets and gloo.

Torch is imported where a tensor is: stages that compute nothing have none.

A dead neighbour does not raise here: its keeper tells the driver, and the driver ends the wait.
"""

import array
import struct
from typing import TYPE_CHECKING

import zmq

if TYPE_CHECKING:
    import torch

_INDEX = struct.Struct("<q")


def listen(context: zmq.Context, host: str) -> tuple[zmq.Socket, str]:
    """The receiving end of a link on a free port of `host`, and its endpoint."""
    socket = _pair(context)
    port = socket.bind_to_random_port(f"tcp://{host}")
    return socket, f"tcp://{host}:{port}"


def connect(context: zmq.Context, endpoint: str) -> zmq.Socket:
    """The sending end of the link that listens at `endpoint`."""
    socket = _pair(context)
    socket.connect(endpoint)
    return socket


def send_tensor(socket: zmq.Socket, index: int, tensor: "torch.Tensor") -> int:
    """Returns at once, with the number of bytes; keeps `tensor`'s memory until it is on its way. Do
    not write to it after."""
    import torch

    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    socket.send_multipart([_INDEX.pack(index), flat], copy=False)
    return _INDEX.size + flat.nbytes


def receive_tensor(
    frames: list[zmq.Frame], index: int, shape: tuple[int, ...], dtype: "torch.dtype"
) -> "torch.Tensor":
    """The tensor in `frames` (as from `recv_multipart(copy=False)`), sharing their memory.

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


def send_tokens(socket: zmq.Socket, index: int, tokens: list[int]) -> None:
    """The last stage's sampled ids of microbatch `index`, to the first stage."""
    socket.send(_INDEX.pack(index) + array.array("i", tokens).tobytes())


def receive_tokens(message: bytes) -> tuple[int, list[int]]:
    """The microbatch's index and its sampled ids."""
    (index,) = _INDEX.unpack_from(message)
    return index, array.array("i", message[_INDEX.size :]).tolist()


def _pair(context: zmq.Context) -> zmq.Socket:
    socket = context.socket(zmq.PAIR)
    # The window bounds what is on the way; a full queue would only turn into a hang.
    socket.set_hwm(0)
    socket.linger = 0
    return socket
