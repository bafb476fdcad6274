"""Tiny random Llama checkpoints, and what transformers makes of them. For the tests."""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 256


def tiny_llama(folder: Path, *, shard_bytes: int | str = "1GB", seed: int = 0, **options) -> str:
    """Saves a random Llama to `folder` as Hugging Face does; returns the folder.

    Weights are wide enough that the likeliest token changes from step to step.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
            **options,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            parameter.data.normal_(mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return str(folder)


def random_prompts(folder: str, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths with ids that the checkpoint knows."""
    rng = random.Random(seed)
    vocab = LlamaConfig.from_pretrained(folder).vocab_size
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def transformers_model(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy_tokens(folder: str, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' `generate` answers in float32, running over ends of text."""
    out = transformers_model(folder).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
