"""One stage of a pipeline: consecutive layers of any family, with what stands before and behind.

All state comes by argument: several microbatches are in flight, so nothing here remembers one. No
rank, no transport, no timer.

Suffixes: T tokens of the microbatch (inside a stage, with padding rows behind them), D hidden
size, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from pipeserve.stages.attention.inputs import StageInputs
from pipeserve.stages.attention.kv import KVCache
from pipeserve.stages.attention.rotation import Rotation, RotationTable
from pipeserve.stages.backends.backend import Backend, Layers
from pipeserve.stages.config.families import find_family
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.families import parts_of
from pipeserve.stages.layers.decoder_layer import two_halves
from pipeserve.stages.layers.leaf import Leaf
from pipeserve.stages.layers.part import Part
from pipeserve.stages.layers.rotary import rope_frequencies
from pipeserve.stages.layers.self_attention import LayerInputs, SelfAttention
from pipeserve.stages.tensor_parallel.cut import config_of_shard, cut
from pipeserve.stages.tensor_parallel.shard import WHOLE, Shard


class Stage(Part):
    """Layers `[first_layer, stop_layer)`, with the embedding before or the head behind them.

    Holds no weights until they are set (`load_weights`). All of it lies on the device of `backend`,
    and computes by it; by default in plain PyTorch on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        first_layer: int,
        stop_layer: int,
        has_embedding: bool = False,
        has_head: bool = False,
        gives_rows: bool | None = None,
        backend: Backend | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """`gives_rows`: whether what comes of its layers goes to a head, which asks for the rows
        alone whose logits are wanted; by default where it has the head. `shard`: its part, where
        several ranks share the stage; then nothing adds theirs up until `tensor_parallel/layers.py`
        does."""
        super().__init__()
        parts, prefix = parts_of(config), find_family(config.architecture).layers
        self.config = config
        self.backend = backend or Backend()
        self.embedding = parts.make_embedding(config) if has_embedding else None
        self.layers = nn.ModuleList(
            parts.make_layer(config, number, f"{prefix}.{number}.")
            for number in range(first_layer, stop_layer)
        )
        self.head = parts.make_head(config) if has_head else None
        self.gives_rows = has_head if gives_rows is None else gives_rows
        self.kv_config = config
        if shard.of > 1:
            cut(self, config, shard)
            self.kv_config = config_of_shard(config, shard)
        for module in self.modules():
            if isinstance(module, Part):
                module.backend = self.backend
        attentions = [module for module in self.modules() if isinstance(module, SelfAttention)]
        self.windows = {attention.scoring.window for attention in attentions}
        ropes = {attention.rope for attention in attentions} - {None}
        self.rotation_tables = {
            rope: RotationTable(
                self.backend.place(rope_frequencies(rope, config.head_dim)), rope.attention_factor
            )
            for rope in ropes
        }

    def make_kv(self, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
        """The KV pool of this stage's layers."""
        return self.backend.make_kv(
            self.kv_config,
            num_layers=len(self.layers),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
        )

    def kv_block_bytes(self, *, block_size: int, dtype: torch.dtype) -> int:
        """What each block of that pool takes."""
        return self.backend.kv_block_bytes(
            self.kv_config, num_layers=len(self.layers), block_size=block_size, dtype=dtype
        )

    def forward(self, x: Tensor, inputs: StageInputs, kv: KVCache) -> Tensor:
        """Token ids [T] (first stage) or hidden [T, D] -> hidden [T, D], or [R, D] (`gives_rows`),
        or logits [R, V]; all float32.

        Of the last layer before a head only keys and values are computed for every row.

        Whatever the weights' dtype is, that of the products and of KV, what layers add up and norm
        stays in float32: half the error of transformers in bf16 (bench/accuracy.py), in the same
        time.

        `x` and `inputs` may lie on the host; what is returned lies on the stage's device. Writes
        the microbatch's K and V into `kv`; does not modify `x`.
        """
        backend, inputs = self.backend, inputs.to(self.backend.device)
        x_TD = backend.pad_rows(backend.place(x))
        if self.embedding is not None:
            x_TD = self.embedding(x_TD, inputs)
        x_TD = x_TD.float()
        plan = backend.prepare_attention(inputs, kv, self.windows)
        num_rows = inputs.num_wanted if self.gives_rows else inputs.num_tokens
        num_layers = len(self.layers)
        some_end = num_rows < inputs.num_tokens and num_layers > 0
        x_TD = self._through(num_layers - some_end, x_TD, inputs, kv, plan)
        if some_end:
            x_TD = self._through_last(x_TD, inputs, kv, plan)
        if num_layers == 0 and self.gives_rows:
            x_TD = x_TD[inputs.logit_rows_R]
        if x_TD.shape[0] > num_rows:
            x_TD = x_TD[:num_rows]
        return x_TD if self.head is None else self.head(x_TD)

    def _through(
        self, count: int, x_TD: Tensor, inputs: StageInputs, kv: KVCache, plan: object
    ) -> Tensor:
        """The first `count` layers, of which all rows go on."""
        if count and self._two_halves is not None:
            done_TD = self.backend.layers_at_once(self._two_halves, count, x_TD, kv, plan)
            if done_TD is not None:
                return done_TD
        shared = self._shared(inputs, plan)
        for number in range(count):
            x_TD = self.layers[number](x_TD, shared, kv.layer(number))
        return x_TD

    @cached_property
    def _two_halves(self) -> Layers | None:
        """The layers; None where any is of another kind. What is put around their parts (`wrap` of
        tensor_parallel/layers.py) has to be there before the first microbatch."""
        halves = [two_halves(layer, self.rotation_tables) for layer in self.layers]
        return None if None in halves else Layers(halves)

    def _through_last(self, x_TD: Tensor, inputs: StageInputs, kv: KVCache, plan: object) -> Tensor:
        """The last layer, of which the rows alone go on whose logits are wanted."""
        last = len(self.layers) - 1
        wanted = replace(
            self._shared(inputs, plan),
            plan=self.backend.prepare_attention(inputs.of_wanted(), kv, self.windows),
            rows_R=self.backend.pad_rows(inputs.logit_rows_R),
        )
        return self.layers[last](x_TD, wanted, kv.layer(last))

    def _shared(self, inputs: StageInputs, plan: object) -> LayerInputs:
        positions_T = self.backend.pad_rows(inputs.positions_T)
        rotations = {
            rope: Rotation(table.until(inputs.num_positions), positions_T)
            for rope, table in self.rotation_tables.items()
        }
        return LayerInputs(inputs=inputs, plan=plan, rotations=rotations)

    @property
    def num_parameters(self) -> int:
        """As held here: a tied embedding counts on the first stage and as the head on the last."""
        return sum(leaf.num_parameters for leaf in self.leaves())

    def bytes_in(self, dtype: torch.dtype) -> int:
        """What the weights take in a run of `dtype`, or more; known before they are read."""
        return sum(leaf.bytes_in(dtype) for leaf in self.leaves())

    @property
    def num_bytes(self) -> int:
        """Of the weights, as held here."""
        return sum(leaf.num_bytes for leaf in self.leaves())

    def leaves(self) -> Iterator[Leaf]:
        """Every module that holds a weight of this stage."""
        return (module for module in self.modules() if isinstance(module, Leaf))
