"""Links carry bare tensors in order, and notice when they are not the expected ones."""

import pytest
import torch
import zmq

from pipeserve import links


@pytest.fixture
def seam():
    context = zmq.Context()
    receiver, endpoint = links.listen(context, "127.0.0.1")
    sender = links.connect(context, endpoint)
    yield sender, receiver
    context.destroy(linger=0)


def _receive(receiver):
    assert receiver.poll(5000), "nothing arrived"
    return receiver.recv_multipart(copy=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_arrives_bit_for_bit(seam, dtype):
    sender, receiver = seam
    sent = torch.randn(33, 48).to(dtype)
    links.send_tensor(sender, 7, sent)
    got = links.receive_tensor(_receive(receiver), 7, (33, 48), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, sent)


def test_many_in_flight_keep_their_order(seam):
    sender, receiver = seam
    sent = [torch.full((index + 1, 4), float(index)) for index in range(50)]
    for index, tensor in enumerate(sent):
        links.send_tensor(sender, index, tensor)
    for index, tensor in enumerate(sent):
        got = links.receive_tensor(_receive(receiver), index, tuple(tensor.shape), tensor.dtype)
        assert torch.equal(got, tensor)


def test_the_sender_may_drop_its_tensor_at_once(seam):
    sender, receiver = seam
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    expected = tensor.clone()
    links.send_tensor(sender, 0, tensor)
    del tensor
    assert torch.equal(
        links.receive_tensor(_receive(receiver), 0, (1 << 20,), torch.float32), expected
    )


def test_a_tensor_of_one_row_in_a_larger_one_is_sent_whole(seam):
    sender, receiver = seam
    base = torch.randn(10, 6)
    links.send_tensor(sender, 0, base[:, 2:4])
    got = links.receive_tensor(_receive(receiver), 0, (10, 2), torch.float32)
    assert torch.equal(got, base[:, 2:4])


@pytest.mark.parametrize(("index", "shape"), [(1, (3, 4)), (0, (3, 5))])
def test_another_microbatch_or_size_is_refused(seam, index, shape):
    sender, receiver = seam
    links.send_tensor(sender, 0, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="out of step"):
        links.receive_tensor(_receive(receiver), index, shape, torch.float32)


def test_tokens_arrive_with_their_microbatch(seam):
    sender, receiver = seam
    links.send_tokens(sender, 12, [5, 0, 131071])
    assert links.receive_tokens(_receive(receiver)[0].bytes) == (12, [5, 0, 131071])
