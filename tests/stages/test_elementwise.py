"""What the C kernels do between products, against torch in float64; the same bits in any batch."""

import pytest
import torch
import torch.nn.functional as F

from pipeserve.stages.attention.rotation import Rotation, RotationTable
from pipeserve.stages.attention.rotation import rotate as rotate_by_torch
from pipeserve.stages.backends.activations import ACTIVATIONS
from pipeserve.stages.backends.cpu import elementwise, library
from pipeserve.stages.config.model_config import RopeConfig
from pipeserve.stages.layers.rotary import rope_frequencies

SIZES = [1, 7, 16, 33, 576]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=library.usable_libraries(), autouse=True)
def each_library(request, monkeypatch):
    monkeypatch.setattr(elementwise, "kernels", lambda: library.load(request.param))


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size):
    x, weight = torch.randn(5, size) * 3, torch.randn(size)
    got = elementwise.rms_norm(x, weight, 1e-5)
    close(got, F.rms_norm(x.double(), (size,), weight.double(), 1e-5))


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm(size):
    x, (weight, bias) = torch.randn(5, size) * 3 + 1, torch.randn(2, size)
    got = elementwise.layer_norm(x, weight, bias, 1e-5)
    close(got, F.layer_norm(x.double(), (size,), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    """Over all that matters of a function's range, and far outside it."""
    gate = torch.cat((torch.linspace(-12, 12, 3001), torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])))
    by_torch = ACTIVATIONS[activation](gate.double())
    close(elementwise.activate(gate, activation), by_torch)
    for bad in (torch.nan, torch.inf):
        assert not elementwise.activate(torch.tensor([bad, 1.0]), activation)[0].isfinite()


@pytest.mark.parametrize("part", [1.0, 0.5, 0.25])
def test_rotation(part):
    """Of the queries and keys of a fused product, in place."""
    heads = torch.randn(9, 8, 32)
    positions = torch.arange(9) * 100
    table = RotationTable(rope_frequencies(_rope(part), 32))
    rotation = Rotation(table.until(801), positions)
    expected = torch.cat((rotate_by_torch(heads[:, :6].double(), rotation), heads[:, 6:]), 1)
    elementwise.rotate(heads[:, :6], rotation)
    torch.testing.assert_close(heads, expected.float(), rtol=1e-6, atol=1e-6)


def _rope(part):
    return RopeConfig(theta=10000.0, part=part)


def test_a_row_does_not_depend_on_its_batch():
    x, gate_up, (weight, bias) = torch.randn(9, 80), torch.randn(9, 80), torch.randn(2, 80)
    for function in (
        lambda rows: elementwise.rms_norm(x[rows], weight, 1e-5),
        lambda rows: elementwise.layer_norm(x[rows], weight, bias, 1e-5),
        lambda rows: elementwise.activate(gate_up[rows], "silu"),
    ):
        alone = [function(slice(i, i + 1)) for i in range(9)]
        assert torch.equal(function(slice(0, 9)), torch.cat(alone))
