"""Takes from a stage what other ranks have, before any of its weights is read.

Families know nothing of it: what they build is whole. Here each product is cut by its outputs or by
its inputs, as Megatron-LM does it: queries, keys, values by heads, then what follows them by the
same; gates and ups by their outputs, the downs behind them by the same; experts each like that. The
vocabulary is cut by its tokens. Norms, biases behind a sum, routers and positions all ranks have.
"""

from dataclasses import replace

from torch import nn

from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.layers.ends import Head, TokenEmbedding
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.layers.mlp import GatedMlp, Mlp
from pipeserve.stages.layers.self_attention import SelfAttention
from pipeserve.stages.tensor_parallel.shard import Heads, Shard, heads_of


def cut(stage: nn.Module, config: ModelConfig, shard: Shard) -> None:
    """Leaves that shard's part of every module in it."""
    for module in stage.modules():
        match module:
            case SelfAttention():
                _cut_attention(module, config, shard)
            case Mlp(up=up, down=down):
                own = shard.part_of(down.shape[1])
                up.keep_rows([own])
                _keep_inputs(down, own, shard)
            case GatedMlp(gate_up=gate_up, down=down):
                size = down.shape[1]
                own = shard.part_of(size)
                gate_up.keep_rows([own, range(size + own.start, size + own.stop)])
                _keep_inputs(down, own, shard)
            case TokenEmbedding(tokens=tokens):
                tokens.keep_rows([shard.part_of_vocabulary(tokens.shape[0])])
            case Head(vocabulary=vocabulary):
                vocabulary.keep_rows([shard.part_of_vocabulary(vocabulary.shape[0])])


def config_of_shard(config: ModelConfig, shard: Shard) -> ModelConfig:
    """With the heads that are there: what its KV pool is made by."""
    heads = heads_of(config, shard)
    return replace(config, num_heads=len(heads.queries), num_kv_heads=len(heads.kv))


def _cut_attention(attention: SelfAttention, config: ModelConfig, shard: Shard) -> None:
    heads, scoring = heads_of(config, shard), attention.scoring
    own = heads.queries
    attention.num_heads, attention.num_kv_heads = len(own), len(heads.kv)
    attention.qkv.keep_rows(_rows_of(heads, config))
    _keep_inputs(attention.out, _dimensions(own, config), shard)
    if scoring.slopes_N is not None:
        attention.scoring = replace(scoring, slopes_N=scoring.slopes_N[own.start : own.stop])


def _rows_of(heads: Heads, config: ModelConfig) -> list[range]:
    """Of the product that makes all queries, then all keys, then all values."""
    rows = [_dimensions(heads.queries, config)]
    for before in (config.num_heads, config.num_heads + config.num_kv_heads):
        rows += [_dimensions(range(before + head, before + head + 1), config) for head in heads.kv]
    return rows


def _dimensions(heads: range, config: ModelConfig) -> range:
    return range(heads.start * config.head_dim, heads.stop * config.head_dim)


def _keep_inputs(linear: Linear, own: range, shard: Shard) -> None:
    """Of a product whose outputs the ranks add up; the first one's have the bias."""
    linear.keep_columns(own)
    linear.has_bias = linear.has_bias and shard.number == 0
