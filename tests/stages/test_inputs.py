"""What a stage's forward reads of a microbatch, and the turns of its positions."""

import pytest
import torch
from attention_cases import Case
from checkpoints import expected_logits, random_prompts, tiny
from cut_model import Stages, assert_close

from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.attention.rotation import RotationTable
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [Backend, CpuBackend] + [KernelBackend] * (kernels() is not None)
FREQUENCIES = 1 / 1e4 ** (torch.arange(8) / 8)


def turns_at(position):
    angles = torch.tensor(float(position)) * FREQUENCIES
    return torch.cat((angles.cos(), angles.sin())).mul_(1.5)


def test_a_table_grows_and_what_it_gave_before_stays():
    table, given = RotationTable(FREQUENCIES, 1.5), []
    for stop in (1, 1023, 1024, 1025, 2048, 2049, 10_000):
        turns = table.until(stop)
        given.append((turns, turns.clone()))
        for position in {0, min(1023, stop - 1), stop - 1}:
            assert torch.equal(turns[position], turns_at(position))
    assert all(torch.equal(turns, before) for turns, before in given)


def test_a_table_for_which_there_is_no_memory_is_as_it_was():
    """Kernels read it by position: it must not be thought longer than it is."""
    table = RotationTable(FREQUENCIES, 1.5)
    table.until(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="allocate"):
            table.until(1 << 50)
    assert torch.equal(table.until(1025)[1024], turns_at(1024))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_positions_behind_the_first_table(tmp_path, name):
    """Of one rope and of two, by every backend, in chunks that end before, at and behind its
    end."""
    folder = tiny(name, tmp_path, max_position_embeddings=2048)
    (prompt,) = random_prompts(folder, (1100,))
    expected, table = expected_logits(folder, prompt), list(range(69))
    for make in BACKENDS:
        stages = Stages(folder, (1, 3), backend=make(), num_blocks=69)
        for start, stop in ((0, 1022), (1022, 1023), (1023, 1024), (1024, 1025), (1025, 1100)):
            got = stages.run([(start, stop, table, 1)], [prompt])
            assert_close(got, expected[stop - 1 : stop])


def test_a_token_without_a_block_is_an_error():
    """And no slot that kernels would read from behind the others."""
    inputs = build_inputs([(0, 5, [3], 1), (10, 40, [1, 2], 1)], 16, None)
    with pytest.raises(IndexError):
        _ = inputs.slots_T
    if kernels() is not None:
        with pytest.raises(IndexError):
            KernelBackend().prepare_attention(inputs, Case([(0, 1)]).kv, {None})


def test_a_microbatch_of_which_nothing_is_wanted():
    wanted = build_inputs([(0, 5, [3], 0), (10, 12, [1], 0)], 16, None).of_wanted()
    assert (wanted.num_tokens, wanted.num_wanted) == (0, 0)
    for tensor in (wanted.positions_T, wanted.slots_T, wanted.logit_rows_R, wanted.begun_blocks):
        assert (tensor.shape, tensor.dtype) == ((0,), torch.int64)


def test_rows_of_some_stay_on_their_device():
    """As on a GPU, where layers read what was moved."""
    inputs = build_inputs([(0, 5, [3], 2), (10, 12, [1], 1)], 16, None).to(torch.device("meta"))
    wanted = inputs.of_wanted()
    assert wanted.device.type == "meta" and wanted.slots_T.device.type == "meta"
    on_host = wanted.to(torch.device("cpu"))
    assert on_host.positions_T.tolist() == [3, 4, 11]
    assert on_host.slots_T.tolist() == [3 * 16 + 3, 3 * 16 + 4, 16 + 11]
