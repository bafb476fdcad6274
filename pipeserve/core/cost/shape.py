"""The shape of a decoder: what its cost and its memory follow from. No weights, no files."""

from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd

from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Counts as in a Hugging Face config.json. Norms and biases do not matter to cost or memory."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Of the MLP, or of one expert."""
    vocab_size: int
    max_position_embeddings: int
    """Positions that it was trained to."""
    gated_mlp: bool = True
    """Gate and up projection (SwiGLU), or up alone (GELU, ReLU)."""
    parallel_attention: bool = False
    """Attention and MLP read the same input and are summed: one all-reduce a layer, not two."""
    tie_word_embeddings: bool = False
    bytes_per_value: int = 2
    """Of weights, products and KV."""
    num_experts: int = 1
    """MLPs of a layer, all of them on its stage."""
    experts_per_token: int = 1
    """Of them that each token takes."""

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token is {self.experts_per_token}, and {self.name} has num_experts "
                f"{self.num_experts}; give 1 to {self.num_experts}"
            )

    def check_divides(self, tensor_parallel_size: int) -> None:
        """Raises ConfigError unless each of a tensor-parallel group gets as many heads."""
        num = self.num_heads
        if num % tensor_parallel_size:
            dividing = ", ".join(str(each) for each in range(1, num + 1) if num % each == 0)
            raise ConfigError(
                f"tensor_parallel_size is {tensor_parallel_size}, and {self.name} has "
                f"{num} attention heads, which do not come out even; give one of {dividing}"
            )

    def shard(self, tensor_parallel_size: int) -> "ModelShape":
        """What one of a tensor-parallel group holds and computes; the most that any of them does,
        where they do not divide evenly. Query heads are cut, each with the KV heads that it reads:
        so that some of these are on several devices where they are fewer, or do not divide. On a
        device each KV head is of equally many queries: where a cut leaves parts of groups, some are
        there more than once."""
        size = tensor_parallel_size
        if size == 1:
            return self
        num_heads = -(-self.num_heads // size)
        group = max(self.num_heads // self.num_kv_heads, 1)
        most_kv_heads = 0
        for first in range(0, self.num_heads, num_heads):
            read = [query // group for query in range(first, first + num_heads)]
            each = gcd(*(len(list(same)) for _, same in groupby(read)))
            most_kv_heads = max(most_kv_heads, num_heads // each)
        return replace(
            self,
            num_heads=num_heads,
            num_kv_heads=most_kv_heads,
            intermediate_size=-(-self.intermediate_size // size),
            vocab_size=-(-self.vocab_size // size),
        )

    @property
    def qkv_columns(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def up_columns(self) -> int:
        """Columns of the MLP's first projection, gate and up together."""
        return self.intermediate_size * (2 if self.gated_mlp else 1)

    @property
    def num_attention_parameters(self) -> int:
        """Of one layer's two matrices around the attention."""
        return (self.qkv_columns + self.num_heads * self.head_dim) * self.hidden_size

    @property
    def num_mlp_parameters(self) -> int:
        """Of the MLP, or of one expert."""
        return (self.up_columns + self.intermediate_size) * self.hidden_size

    @property
    def num_layer_parameters(self) -> int:
        """Of the matrices of one layer, with those of all experts and of what chooses them."""
        router = self.num_experts * self.hidden_size if self.num_experts > 1 else 0
        return self.num_attention_parameters + router + self.num_experts * self.num_mlp_parameters

    def experts_touched(self, num_tokens: int) -> float:
        """Distinct experts of a layer that so many tokens take, expected where each token takes
        any of them alike: E (1 - (1 - k/E)^T)."""
        share = self.experts_per_token / self.num_experts
        return self.num_experts * (1 - (1 - share) ** num_tokens)

    @property
    def num_head_parameters(self) -> int:
        """Of the vocabulary head, which is as large as the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_layers * self.num_layer_parameters + tables * self.num_head_parameters

    @property
    def sums_per_layer(self) -> int:
        """Of activations, over the ranks of a stage: one for each half of a layer, or one for both
        where they are parallel."""
        return 1 if self.parallel_attention else 2

    @property
    def link_bytes_per_token(self) -> int:
        """Of activations from one of our own stages to the next: float32, whatever the weights
        are."""
        return 4 * self.hidden_size

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        """K and V of one position in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one position in all layers."""
        return self.num_layers * self.kv_bytes_per_token_per_layer
