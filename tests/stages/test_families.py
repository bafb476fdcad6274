"""Every family's stages against transformers, in float32: logits, tokens, parameters.

The checkpoints are tiny and random with the flags of real models (`checkpoints.TINY`), which
docs/models.md lists.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    TINY,
    edit_config,
    expected_logits,
    random_prompts,
    tiny,
    transformers_model,
)
from cut_model import Stages, assert_close, run_mixed
from safetensors.torch import load_file, save_file

from pipeserve.errors import ConfigError
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.backends.cpu.backend import CpuBackend
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.library import kernels
from pipeserve.stages.checkpoint.weights import check_checkpoint
from pipeserve.stages.config.families import FAMILIES, read_config
from pipeserve.stages.config.model_config import RopeConfig
from pipeserve.stages.devices import make_backend

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = [
    (CpuBackend(), (4,), 70),
    (CpuBackend(), (1, 3), 33),
    (CpuBackend(), (1, 1, 1, 1), 1),
    (make_backend("cpu", "reference"), (3, 1), 16),
    (Backend(), (4,), 70),
    (Backend(), (2, 2), 9),
]
if kernels() is not None:
    RUNS += [
        (KernelBackend(), (4,), 70),
        (KernelBackend(), (1, 3), 33),
        (KernelBackend(), (1, 2, 1), 7),
        (KernelBackend(), (1, 1, 1, 1), 1),
    ]
"""(backend, layers of each stage, tokens a microbatch): whole, chunks, decodes."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> (folder, a prompt of 70 ids, transformers' logits), each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tiny(name, tmp_path_factory.mktemp(name))
            (prompt,) = random_prompts(folder, (70,))
            made[name] = (folder, prompt, expected_logits(folder, prompt))
        return made[name]

    return make


def test_every_family_has_a_tiny_checkpoint():
    assert {kind.family for kind in TINY.values()} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("backend", "layers", "budget"), RUNS)
def test_logits_are_those_of_transformers(checkpoint, name, backend, layers, budget):
    folder, prompt, expected = checkpoint(name)
    stages = Stages(folder, layers, backend=backend)
    assert_close(stages.logits(prompt, budget), expected)


@pytest.mark.parametrize("name", TINY)
def test_requests_mixed_in_a_microbatch(checkpoint, name):
    """Random chunks of four requests, decodes among them, over scattered blocks."""
    folder, _, _ = checkpoint(name)
    prompts = random_prompts(folder, (60, 41, 23, 5), seed=1)
    expected = [expected_logits(folder, prompt) for prompt in prompts]
    run_mixed(Stages(folder, block_size=4), prompts, expected, seed=3)


WITHOUT = {
    "window": ("mistral", {"windows": ()}),
    "window of one more": ("mistral", {"windows": (20,) * 4}),
    "window of later layers": ("qwen2_window", {"windows": ()}),
    "window in turn": ("gemma2", {"windows": (19, 19, 19, 19)}),
    "cap of scores": ("gemma2", {"attention_softcap": None}),
    "cap of logits": ("gemma2", {"logit_softcap": None}),
    "query scale": ("gemma2", {"query_scale": 16}),
    "local rope": ("gemma3", {"local_rope": RopeConfig(theta=1e6)}),
    "full rope": ("gemma3", {"rope": RopeConfig(theta=1e4)}),
    "alibi": ("falcon_rw", {"rope": RopeConfig(theta=1e4)}),
    "weights of experts": ("mixtral", None),
}
"""What would go unnoticed if these checkpoints did not depend on it."""


@pytest.mark.parametrize("what", WITHOUT)
def test_the_checkpoints_depend_on(checkpoint, what):
    name, changes = WITHOUT[what]
    folder, prompt, expected = checkpoint(name)
    config = read_config(folder)
    if changes is None:
        changes = {"experts": replace(config.experts, normalize=False)}
    got = Stages(folder, config=replace(config, **changes)).logits(prompt, 70)
    assert (got - expected).abs().max() > 1e-3


OLD = {
    "qwen2_window": {"layer_types": None},
    "gemma2": {"layer_types": None, "rope_parameters": None, "rope_theta": 10000.0},
    "gemma3": {
        "layer_types": None,
        "_sliding_window_pattern": None,
        "sliding_window_pattern": 3,
        "rope_parameters": None,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    "qwen3_moe": {"num_local_experts": None, "num_experts": 5},
    "falcon_multi_query": {"rope_parameters": None, "ffn_hidden_size": None, "activation": None},
    "opt": {"enable_bias": None, "tie_word_embeddings": None, "_remove_final_layer_norm": None},
}
"""What config.json says where an older transformers wrote it; None is silent."""


@pytest.mark.parametrize("name", OLD)
def test_config_as_it_was_written_before(checkpoint, name, tmp_path):
    folder, _, _ = checkpoint(name)
    shutil.copy(Path(folder, "config.json"), tmp_path)
    edit_config(tmp_path, **OLD[name])
    assert read_config(tmp_path) == read_config(folder)


@pytest.mark.parametrize("name", TINY)
def test_likeliest_tokens_vary(checkpoint, name):
    _, _, expected = checkpoint(name)
    assert len(set(expected.argmax(-1).tolist())) > 3


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_transformers_in_that_precision(checkpoint, name, dtype):
    """As near to float32 as transformers itself comes in this dtype, give or take half as much."""
    folder, prompt, expected = checkpoint(name)
    got = Stages(folder, dtype=dtype).logits(prompt, 16)
    with torch.inference_mode():
        theirs = transformers_model(folder).to(dtype)(torch.tensor([prompt])).logits[0].float()
    ours, limit = ((x - expected).pow(2).mean().sqrt() for x in (got, theirs))
    assert ours < 1.5 * limit


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted_as_held(checkpoint, name):
    """A tied table counts on the first stage and, as the head, on the last."""
    folder, _, _ = checkpoint(name)
    model = transformers_model(folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    if model.config.tie_word_embeddings:
        total += model.lm_head.weight.numel()
    stages = Stages(folder, backend=Backend()).stages
    assert sum(stage.num_parameters for stage in stages) == total
    held = sum(
        weight.numel()
        for stage in stages
        for leaf in stage.leaves()
        for weight in (leaf.weight, leaf.bias)
        if weight is not None
    )
    assert held == total


@pytest.mark.parametrize("name", TINY)
def test_a_whole_checkpoint_is_found_whole(checkpoint, name):
    folder, _, _ = checkpoint(name)
    check_checkpoint(folder, read_config(folder))


TABLES = {
    "llama": "model.embed_tokens.weight",
    "gemma2": "model.embed_tokens.weight",
    "falcon_new": "transformer.word_embeddings.weight",
    "opt": "model.decoder.embed_tokens.weight",
}
"""What a family calls its embedding."""


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("held", ["table", "head", "both", "both, equal"])
@pytest.mark.parametrize("name", TABLES)
def test_tied_tensors(tmp_path, name, held, is_tied):
    """One that is there serves as both (text-generation-inference#501); both are used as they
    are. Without a tie, each must be there."""
    folder = tiny(name, tmp_path, tie_word_embeddings=False)
    edit_config(folder, tie_word_embeddings=is_tied)
    tensors = load_file(tmp_path / "model.safetensors")
    if held == "both, equal":
        tensors["lm_head.weight"] = tensors[TABLES[name]].clone()
    elif held != "both":
        del tensors[TABLES[name] if held == "head" else "lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (prompt,) = random_prompts(folder, (20,))
    if not is_tied and not held.startswith("both"):
        missing = TABLES[name] if held == "head" else "lm_head.weight"
        with pytest.raises(ConfigError, match=f"has no tensor {missing}"):
            check_checkpoint(folder, read_config(folder))
        return
    check_checkpoint(folder, read_config(folder))
    assert_close(Stages(folder, (1, 3)).logits(prompt, 7), expected_logits(folder, prompt))


def test_tied_tensors_of_which_none_is_there(tmp_path):
    folder = tiny("gemma2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[TABLES["gemma2"]]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"has no tensor {TABLES['gemma2']}"):
        check_checkpoint(folder, read_config(folder))


@pytest.mark.parametrize(
    ("tensor", "is_refused"),
    [
        ("model.layers.1.self_attn.q_norm.weight", True),  # as Qwen3 has
        ("model.layers.2.self_attn.q_proj.lora_A.weight", True),
        ("model.layers.3.mlp.gate_proj.bias", True),
        ("model.layers.4.mlp.gate_proj.weight", True),
        ("lm_head.bias", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("vision.layers.0.mlp.weight", False),
    ],
)
def test_a_tensor_that_no_layer_asks_for(tmp_path, tensor, is_refused):
    """It belongs to another model, of which the rest would run and be wrong."""
    folder = tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, tensor: torch.zeros(8)}, tmp_path / "model.safetensors")
    config = read_config(folder)
    if not is_refused:
        check_checkpoint(folder, config)
        return
    with pytest.raises(ConfigError, match=f"has a tensor {tensor}, which its config.json does not"):
        check_checkpoint(folder, config)


def test_the_table_in_the_docs_is_up_to_date():
    script = Path(__file__).parent.parent.parent / "bench" / "models_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "run python bench/models_table.py"
