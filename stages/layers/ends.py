"""What stands before the first layer and behind the last.

Suffixes: T tokens, D hidden size, R rows whose logits are wanted, V vocabulary.
"""

import torch
from torch import Tensor, nn

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.layers.leaf import Embedding, Leaf, whole
from pipeserve.stages.layers.linear import Linear, Vocabulary
from pipeserve.stages.layers.part import Part

_HEAD = "lm_head"


class TokenEmbedding(Part):
    """`projection`: where the table is narrower than D. `positions`: a learned row for each
    position, of which the first stands `offset` rows down."""

    def __init__(
        self,
        tokens: Embedding,
        *,
        projection: Linear | None = None,
        positions: Embedding | None = None,
        offset: int = 0,
    ) -> None:
        super().__init__()
        self.tokens, self.projection = tokens, projection
        self.positions, self.offset = positions, offset

    def forward(self, ids_T: Tensor, inputs: StageInputs) -> Tensor:
        """Of the tokens of `inputs`, perhaps with padding."""
        x_TD = self.tokens(ids_T)
        if self.projection is not None:
            x_TD = self.projection(x_TD)
        if self.positions is not None:
            positions_T = self.backend.pad_rows(inputs.positions_T)
            x_TD = x_TD + self.positions(positions_T + self.offset)
        return x_TD


def token_table(config: ModelConfig, size: int, table: str, scale: float = 1.0) -> Embedding:
    """Rows of `size`. `table`: what the checkpoint calls it.

    Of a tied embedding and head the checkpoint may hold either, which then serves as both, or both,
    which may differ and are then used as they are: as transformers does (`tie_weights`).
    """
    instead = _HEAD if config.tie_word_embeddings else ""
    source = [whole(table, config.vocab_size, instead)]
    return Embedding(config.vocab_size, size, source, scale)


def vocabulary(config: ModelConfig, size: int, table: str) -> Vocabulary:
    """[R, size] -> logits. `table`: what the checkpoint calls the embedding."""
    instead = table if config.tie_word_embeddings else ""
    return Vocabulary(size, config.vocab_size, [whole(_HEAD, config.vocab_size, instead)])


class Head(Part):
    """Final norm and projection, where there are any, and the logits, perhaps soft-capped.

    All of it in float32, weights too: in bf16 a logit of 25 is a multiple of 1/8, and of two
    likeliest tokens that come out alike the lower id would win. Packed float32 weights are twice
    the memory of bf16's, and the fastest of the exact ways (bench/linears.py): torch has no product
    of bf16 on CPU that leaves in float32.
    """

    decides = True
    """Whether what this rank draws is what counts."""

    def __init__(
        self,
        norm: nn.Module | None,
        vocabulary: Vocabulary,
        *,
        projection: Linear | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection
        self.vocabulary = vocabulary
        self.softcap = softcap
        for module in self.modules():
            if isinstance(module, Leaf):
                module.is_float32 = True

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] -> [R, V] float32."""
        num_rows = len(x_RD)
        logits_RV = self.vocabulary(self._before_vocabulary(x_RD))[:num_rows]
        if self.softcap is None:
            return logits_RV
        return torch.tanh(logits_RV / self.softcap) * self.softcap

    def likeliest(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row the highest logit and its token: of `forward`'s logits, which are not made
        where the backend finds the token without."""
        own = self.vocabulary
        found = (
            self.backend.likeliest(self._before_vocabulary(x_RD), own.weight, own.bias)
            if self.softcap is None
            else None
        )
        if found is None:
            return tuple(self(x_RD).max(-1))
        num_rows, (highest_R, tokens_R) = x_RD.shape[0], found
        if highest_R.shape[0] == num_rows:
            return found
        return highest_R[:num_rows], tokens_R[:num_rows]

    def highest(self, x_RD: Tensor, num: int) -> tuple[Tensor, Tensor] | None:
        """Of each row the `num` highest logits at least, and their tokens, in the order of tokens,
        where that can be had for less than all of them; else None."""
        return None

    def agreed(self, tokens: list[int | None]) -> list[int | None]:
        """The tokens that count, of which there are as many: those that this rank has drawn."""
        return tokens

    def _before_vocabulary(self, x_RD: Tensor) -> Tensor:
        x_RD = self.backend.pad_rows(x_RD)
        for part in (self.norm, self.projection):
            x_RD = x_RD if part is None else part(x_RD)
        return x_RD
