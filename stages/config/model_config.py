"""The shape of a decoder, as its family reads it out of config.json. Reads no weights."""

import math
from dataclasses import dataclass
from pathlib import Path

from pipeserve.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATION_NAMES = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
"""Hugging Face's, of what `stages/backends/activations.py` has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and, for longer contexts than trained, how frequencies are scaled."""

    theta: float
    kind: str = "default"
    """"default" | "linear" | "llama3" | "yarn" | "longrope" | "proportional" (see `rotary.py`)."""
    part: float = 1.0
    """Share of each head that is rotated, from its first dimension on."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 0
    beta_fast: float = 32
    beta_slow: float = 1
    truncate: bool = True
    pair_factors: tuple[float, ...] = ()
    """longrope: what each pair's frequency is divided by."""
    attention_factor: float = 1.0
    """Multiplies what is rotated."""

    @property
    def max_positions(self) -> float:
        """Beyond these every position would be rotated anew, those in the KV cache too."""
        return self.original_max_position_embeddings if self.kind == "longrope" else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """MLPs of `ModelConfig.intermediate_size` of which each token takes a few."""

    num_experts: int
    num_taken: int
    normalize: bool
    """Whether the weights of those taken sum to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What all families share, in Hugging Face's names where they are clear.

    A family whose layers need more extends it in its own file.
    """

    architecture: str
    """As in config.json; decides the family."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of the MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    """A key of `mlp.ACTIVATIONS`."""
    tie_word_embeddings: bool
    dtype: str
    """Of the checkpoint: a key of `DTYPE_BYTES`."""
    eos_token_ids: tuple[int, ...]
    rope: RopeConfig | None = None
    """None: positions are not rotated."""
    windows: tuple[int | None, ...] = ()
    """For each layer how many positions a query sees, None for all; () is None for every layer."""
    experts: ExpertsConfig | None = None
    gated_mlp: bool = True
    """Gate and up projection, or up alone."""
    parallel_attention: bool = False
    """Attention and MLP read the same input and are summed."""

    def check(self, path: Path) -> None:
        """Raises ConfigError, naming `path`, for counts that contradict each other."""
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{path}: {self.num_heads} attention heads (num_attention_heads) cannot share "
                f"{self.num_kv_heads} kv heads (num_key_value_heads, num_kv_heads) evenly; "
                "fetch the file again"
            )
        if self.experts is not None and self.experts.num_taken > self.experts.num_experts:
            raise ConfigError(
                f"{path}: num_experts_per_tok {self.experts.num_taken} is over the "
                f"{self.experts.num_experts} experts (num_local_experts, num_experts); "
                "fetch the file again"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ConfigError(
                f"{path}: a head of {self.head_dim} dimensions (head_dim) cannot be rotated in "
                "pairs; fetch the file again"
            )

    def window_of(self, layer: int) -> int | None:
        """How many positions a query of `layer` sees, its own included; None for all."""
        return self.windows[layer] if self.windows else None

    def resolve_dtype(self, wanted: str) -> str:
        """`wanted`, or the checkpoint's own for "auto"."""
        return self.dtype if wanted == "auto" else wanted
