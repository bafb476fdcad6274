"""Which part of a stage is whose, where several ranks share it."""

from itertools import groupby
from math import gcd
from typing import NamedTuple

from pipeserve.stages.config.model_config import ModelConfig


class Shard(NamedTuple):
    """One of the `of` equal parts of a stage."""

    number: int = 0
    of: int = 1

    def part_of(self, size: int) -> range:
        """This one's, of so many rows or columns, which need not come out even: then some have one
        more than others (and none has none, pytorch#108869)."""
        return range(self.number * size // self.of, (self.number + 1) * size // self.of)

    def part_of_vocabulary(self, size: int) -> range:
        """As Megatron-LM cuts it: filled up until it comes out even. What it is filled up with has
        no rows here; the last part is shorter."""
        each = self.padded(size) // self.of
        return range(min(self.number * each, size), min((self.number + 1) * each, size))

    def padded(self, size: int) -> int:
        return -(-size // self.of) * self.of


WHOLE = Shard()


class Heads(NamedTuple):
    """Those of one shard."""

    queries: range
    kv: tuple[int, ...]
    """Key and value heads, each for as many of the queries as the others, in their order. One that
    is here more than once, or on another shard, too, is computed and kept each time."""


def heads_of(config: ModelConfig, shard: Shard) -> Heads:
    """Query heads side by side, which have to come out even, and the key and value heads that they
    read. (Llama's, of grouped queries, mostly lie on one shard; where there are fewer of them than
    shards, or groups are cut, they are repeated.)"""
    num_queries = config.num_heads // shard.of
    queries = range(shard.number * num_queries, (shard.number + 1) * num_queries)
    group = config.num_heads // config.num_kv_heads
    read = [query // group for query in queries]
    each = gcd(*(len(list(same)) for _, same in groupby(read)))
    return Heads(queries, tuple(read[::each]))
