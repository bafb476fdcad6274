"""Links carry bare tensors in order, and notice when they are not the expected ones."""

import threading

import pytest
import torch

from pipeserve.wire import links
from pipeserve.wire.connecting import connect
from pipeserve.wire.links import TensorLinks, unpack_tensor
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources


class Seam:
    """Two neighbours, and what comes from the one to the other."""

    def __init__(self):
        self.sources, self.theirs, self.sender = Sources(), Sources(), TensorLinks()
        address = TensorLinks().listen("127.0.0.1", self.sources)
        opening = self.sender.connect(address, self.theirs)
        while not opening.is_open:
            for source in [*self.sources.ready(0), *self.theirs.ready(0)]:
                source.receive()
        self._received = []

    def receive(self):
        while not self._received:
            ready = self.sources.ready(5000)
            assert ready, "nothing arrived"
            assert ready[0].carries == "activations"
            self._received += ready[0].receive()
        return self._received.pop(0)

    def close(self):
        self.sources.close()
        self.theirs.close()


@pytest.fixture
def seam():
    seam = Seam()
    yield seam
    seam.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_arrives_bit_for_bit(seam, dtype):
    sent = torch.randn(33, 48).to(dtype)
    seam.sender.send(7, sent)
    got = unpack_tensor(seam.receive(), 7, (33, 48), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, sent)


def test_many_in_flight_keep_their_order(seam):
    sent = [torch.full((index + 1, 4), float(index)) for index in range(50)]
    for index, tensor in enumerate(sent):
        seam.sender.send(index, tensor)
    for index, tensor in enumerate(sent):
        got = unpack_tensor(seam.receive(), index, tuple(tensor.shape), tensor.dtype)
        assert torch.equal(got, tensor)


def test_the_sender_may_drop_its_tensor_at_once(seam):
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    expected = tensor.clone()
    seam.sender.send(0, tensor)
    del tensor
    assert torch.equal(unpack_tensor(seam.receive(), 0, (1 << 20,), torch.float32), expected)


def test_a_tensor_of_one_row_in_a_larger_one_is_sent_whole(seam):
    base = torch.randn(10, 6)
    seam.sender.send(0, base[:, 2:4])
    got = unpack_tensor(seam.receive(), 0, (10, 2), torch.float32)
    assert torch.equal(got, base[:, 2:4])


def test_what_the_kernel_does_not_take_goes_on_while_the_sender_computes(seam):
    """It is in nobody's `send` or `receive` then; and what is sent behind it stays behind it."""
    sent = [torch.randint(0, 9, (size,)) for size in (8 << 20, 3, 4 << 20, 1)]
    for index, tensor in enumerate(sent):
        seam.sender.send(index, tensor)
    for index, tensor in enumerate(sent):
        got = unpack_tensor(seam.receive(), index, tuple(tensor.shape), tensor.dtype)
        assert torch.equal(got, tensor)
    seam.sender.send(4, sent[1])
    assert torch.equal(unpack_tensor(seam.receive(), 4, (3,), torch.int64), sent[1])


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_an_end_on_the_way_is_the_end_of_it(seam, who):
    """Nothing raises, no thread stays, and what is sent to nobody is harmless."""
    before = threading.active_count()
    seam.sender.send(0, torch.zeros(64 << 20, dtype=torch.uint8))
    assert threading.active_count() == before + 1, "the kernel took 64 MiB at once"
    (seam.theirs if who == "sender" else seam.sources).close()
    for index in (1, 2):
        seam.sender.send(index, torch.zeros(3))
    seam.theirs.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("index", "shape"), [(1, (3, 4)), (0, (3, 5))])
def test_another_microbatch_or_size_is_refused(seam, index, shape):
    seam.sender.send(0, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="out of step"):
        unpack_tensor(seam.receive(), index, shape, torch.float32)


def test_tokens_arrive_with_their_microbatch():
    sources, theirs = Sources(), Sources()
    last_stage = connect(Listener("127.0.0.1", sources, ("tokens",)).address, theirs, "tokens")
    links.send_tokens(last_stage, 12, [5, 0, 131071], b"\1\0\2")
    got = []
    while not got:
        for source in [*theirs.ready(0), *sources.ready(0)]:
            got += map(links.unpack_sampled, source.receive())
            carries = source.carries
    assert carries == "tokens"
    assert got == [(12, [5, 0, 131071], b"\1\0\2")]
    sources.close()
    theirs.close()
