"""The shape of a checkpoint, as the cost model and the simulator know models."""

from dataclasses import replace
from pathlib import Path

from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.shape import ModelShape
from pipeserve.stages.config.model_config import DTYPE_BYTES, ModelConfig


def shape_of(config: ModelConfig, name: str, dtype: str) -> ModelShape:
    """The shape of a checkpoint whose weights are kept as `dtype`, a key of `DTYPE_BYTES`."""
    experts = config.experts
    return ModelShape(
        name=name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        gated_mlp=config.gated_mlp,
        parallel_attention=config.parallel_attention,
        tie_word_embeddings=config.tie_word_embeddings,
        bytes_per_value=DTYPE_BYTES[dtype],
        num_experts=experts.num_experts if experts else 1,
        experts_per_token=experts.num_taken if experts else 1,
    )


def find_shape(model: str, dtype: str) -> ModelShape:
    """Of a checkpoint folder, or of a model of the catalogue (`configs/models/`), whose weights
    are kept as `dtype`, "auto" or a key of `DTYPE_BYTES`. Raises ConfigError."""
    if Path(model).is_dir():
        # Here: it takes torch, which a model of the catalogue does not need.
        from pipeserve.stages.config.families import read_config

        config = read_config(model)
        return shape_of(config, model, config.resolve_dtype(dtype))
    shape = load_shape(model)
    return shape if dtype == "auto" else replace(shape, bytes_per_value=DTYPE_BYTES[dtype])
