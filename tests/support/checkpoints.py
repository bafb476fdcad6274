"""Tiny random checkpoints of every family, and what transformers makes of them. For the tests."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 256
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {"intermediate_size": 80, "num_key_value_heads": 2, "initializer_range": 0.2}
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
_FALCON = {"initializer_range": 0.3}
_OPT = {"ffn_dim": 80, "init_std": 0.3}


@dataclass(frozen=True)
class Tiny:
    """A model of transformers (`name`Config, `name`ForCausalLM) with the flags of a real one."""

    family: str
    """Of `stages.families`."""
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    config_name: str = ""
    like: str = ""
    """The real model whose flags these are."""


TINY = {
    "llama": Tiny("Llama", "Llama", {**_GATED, "tie_word_embeddings": False}, like="Llama 2"),
    "mistral": Tiny("Mistral", "Mistral", {**_GATED, "sliding_window": 19}, like="v0.1"),
    "mistral_full": Tiny("Mistral", "Mistral", {**_GATED, "sliding_window": None}, like="v0.2"),
    "qwen2": Tiny("Qwen2", "Qwen2", {**_GATED, "use_sliding_window": False}, like="2.5 7B"),
    "qwen2_tied": Tiny("Qwen2", "Qwen2", {**_GATED, "tie_word_embeddings": True}, like="2.5 0.5B"),
    "qwen2_window": Tiny(
        "Qwen2",
        "Qwen2",
        {**_GATED, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
        like="2 7B with its window switched on",
    ),
    "qwen3": Tiny("Qwen3", "Qwen3", {**_GATED, "head_dim": 16}, like="8B"),
    "qwen3_moe": Tiny(
        "Qwen3-MoE",
        "Qwen3Moe",
        {**_GATED, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
        like="30B-A3B",
    ),
    "mixtral": Tiny("Mixtral", "Mixtral", {**_GATED, **_EXPERTS}, like="8x7B"),
    "phi3": Tiny("Phi-3", "Phi3", {**_GATED, "num_key_value_heads": 6}, like="Phi-3 mini 4k"),
    "phi3_window": Tiny("Phi-3", "Phi3", {**_GATED, "sliding_window": 19}, like="Phi-3 medium 4k"),
    "gemma2": Tiny(
        "Gemma 2",
        "Gemma2",
        {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 19},
        like="9B, soft caps of 50 and 30",
    ),
    "gemma3": Tiny(
        "Gemma 3",
        "Gemma3",
        {
            **_GATED,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 19,
            "sliding_window_pattern": 3,
        },
        "Gemma3TextConfig",
        like="1B, every third layer instead of every sixth full",
    ),
    "falcon_new": Tiny(
        "Falcon", "Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        like="180B, 40B",
    ),
    "falcon_one_norm": Tiny(
        "Falcon",
        "Falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
        like="11B",
    ),
    "falcon_multi_query": Tiny("Falcon", "Falcon", _FALCON, like="7B"),
    "falcon_rw": Tiny(
        "Falcon",
        "Falcon",
        {**_FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        like="RW-1B",
    ),
    "opt": Tiny("OPT", "OPT", _OPT, like="66B, 13B"),
    "opt_post_norm": Tiny(
        "OPT",
        "OPT",
        {**_OPT, "init_std": 0.2, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
        like="350M",
    ),
    "opt_no_bias": Tiny(
        "OPT",
        "OPT",
        {**_OPT, "enable_bias": False, "activation_function": "gelu"},
        like="Galactica",
    ),
}  # fmt: skip


PIPELINES = {"falcon_new": (1, 2, 1), "opt": (2, 0, 2), "gemma3": (2, 2)}
"""Run as real processes besides Llama, which most tests take: layers of each stage. Not more, for a
stage takes two seconds of a core to start."""


def tiny(name: str, folder: Path, *, shard_bytes: int | str = "1GB", seed: int = 0, **more) -> str:
    """Saves a random model of `TINY` to `folder` as Hugging Face does; returns the folder.

    Weights are wide enough that the likeliest token changes from step to step; norms and biases are
    random too, so that one that is left out shows.
    """
    kind = TINY[name]
    config_class = getattr(transformers, kind.config_name or f"{kind.name}Config")
    config = config_class(**{**_SIZES, **kind.options, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind.name}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_one = "norm" in parameter_name or "ln_" in parameter_name
            is_offset = kind.name.startswith("Gemma") or parameter_name.endswith(".bias")
            parameter.data.normal_(mean=float(is_one and not is_offset), std=0.2)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return str(folder)


def tiny_llama(folder: Path, **options) -> str:
    """`tiny` of the family that most tests take."""
    return tiny("llama", folder, **options)


def edit_config(folder: Path | str, **changes) -> None:
    """Sets keys of config.json; a value of None removes the key."""
    path = Path(folder, "config.json")
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def random_prompts(folder: str, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths with ids that the checkpoint knows."""
    rng = random.Random(seed)
    vocab = AutoConfig.from_pretrained(folder).vocab_size
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def transformers_model(folder: str) -> PreTrainedModel:
    """With the attention that it takes by itself. (Its eager one adds Falcon's ALiBi twice.)"""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def expected_logits(folder: str, prompt: list[int]) -> torch.Tensor:
    """transformers' logits of every position of the prompt, in float32: [T, V]."""
    return transformers_model(folder)(torch.tensor([prompt])).logits[0]


@torch.inference_mode()
def greedy_tokens(folder: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What transformers' `generate` answers to each in float32, running over ends of text."""
    model = transformers_model(folder)
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers
