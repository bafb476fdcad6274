"""What parts of a model take, on made-up weights: of every family, and of what they are made."""

from dataclasses import replace

import pytest
import torch
from checkpoints import TINY, tiny

from pipeserve.core.work import Work
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.devices import make_backend
from pipeserve.stages.stage import Stage
from pipeserve.stages.timing import layer_kinds, part_bytes, time_parts

pytestmark = pytest.mark.usefixtures("one_thread")

WORKS = (Work(3, 3, (), 3, 36), Work(21, 4, ((0, 17),), 4, 48))


@pytest.mark.parametrize("name", TINY)
def test_parts_of_every_family_are_timed(tmp_path, name):
    config = read_config(tiny(name, tmp_path))
    with torch.inference_mode():
        timed = time_parts(
            config,
            make_backend(),
            WORKS,
            0.0,
            dtype=torch.bfloat16,
            kv_dtype=torch.bfloat16,
            block_size=4,
            has_embedding=True,
            has_head=True,
        )
    assert len(timed.parts) == len(WORKS) and 0 < timed.cpu_share <= 1
    for parts in timed.parts:
        assert len(parts.layers) == config.num_layers
        assert min(*parts.layers, parts.embedding, parts.head) > 0
        # One number for layers that are alike; the last one has its own.
        *before, _ = zip(parts.layers, layer_kinds(config), strict=True)
        for kind in {kind for _, kind in before}:
            assert len({seconds for seconds, own in before if own == kind}) == 1


def test_the_last_layer_is_timed_as_it_is_before_a_head(tmp_path):
    """Decodes go on in it, and prompts end."""
    rows = []

    class Looking(Backend):
        def attend(self, q_TNH, *others):
            rows.append(len(q_TNH))
            return super().attend(q_TNH, *others)

    config = read_config(tiny("llama", tmp_path))
    options = {"dtype": torch.float32, "kv_dtype": torch.float32, "block_size": 16}
    for has_head in (False, True):
        rows.clear()
        with torch.inference_mode():
            time_parts(
                config, Looking(), WORKS, 0.0, has_embedding=False, has_head=has_head, **options
            )
        assert set(rows) == ({3, 21, 4} if has_head else {3, 21})


def test_a_rank_without_the_ends_does_not_time_them(tmp_path):
    config = read_config(tiny("llama", tmp_path))
    options = {"dtype": torch.float32, "kv_dtype": torch.float32, "block_size": 16}
    with torch.inference_mode():
        timed = time_parts(
            config, make_backend(), WORKS, 0.0, has_embedding=False, has_head=False, **options
        )
    assert {(parts.embedding, parts.head) for parts in timed.parts} == {(0.0, 0.0)}


def test_made_up_weights_are_as_exact_as_the_checkpoint_s(tmp_path):
    """So the head, which is float32 in every run, is kept in 16 bits here where it is in a stage:
    in 32 it took twice as long, and too few layers were put beside it."""
    exact = []

    class Looking(Backend):
        def place_matrix(self, weight_OI: torch.Tensor) -> torch.Tensor:
            exact.append(torch.equal(weight_OI.bfloat16().float(), weight_OI.float()))
            return super().place_matrix(weight_OI)

    config = replace(read_config(tiny("llama", tmp_path)), dtype="bfloat16")
    options = {"dtype": torch.float32, "kv_dtype": torch.float32, "block_size": 16}
    with torch.inference_mode():
        time_parts(config, Looking(), WORKS, 0.0, has_embedding=True, has_head=True, **options)
    assert exact and all(exact)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("llama", (0, 0, 0, 0)), ("gemma2", (0, 1, 0, 1)), ("qwen2_window", (0, 1, 1, 1))],
)
def test_layers_of_one_kind_are_those_that_compute_alike(tmp_path, name, kinds):
    assert layer_kinds(read_config(tiny(name, tmp_path))) == kinds


@pytest.mark.parametrize("name", TINY)
def test_weights_of_parts_are_those_of_the_stages_that_hold_them(tmp_path, name):
    config = read_config(tiny(name, tmp_path))
    backend = make_backend()
    layers, embedding, head = part_bytes(config, backend, torch.bfloat16)
    first, last = (
        Stage(
            config,
            first_layer=start,
            stop_layer=stop,
            has_embedding=start == 0,
            has_head=start != 0,
            backend=backend,
        ).bytes_in(torch.bfloat16)
        for start, stop in ((0, 1), (1, config.num_layers))
    )
    assert (first, last) == (embedding + layers[0], sum(layers[1:]) + head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_take_no_more_than_was_said_before(tmp_path, dtype):
    """By which KV gets what memory is left: the head's copy in 8 bits counts, beside float32 that
    16 bits do not hold."""
    sizes = {"vocab_size": 1024, "hidden_size": 96, "intermediate_size": 96}  # nothing is padded
    folder = tiny("llama", tmp_path, **sizes)
    config = read_config(folder)
    stage = Stage(
        config,
        first_layer=0,
        stop_layer=config.num_layers,
        has_embedding=True,
        has_head=True,
        backend=make_backend(),
    )
    said = stage.bytes_in(dtype)
    load_weights(stage, folder, dtype)
    assert 0.9 * said < stage.num_bytes <= said
