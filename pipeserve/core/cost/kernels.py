"""The time of a stage's operations on one device, by formula or by table. Pure.

`Kernels` are formulae, fitted on microbenchmarks of many shapes and good for any model; `Tables`
are seconds measured for one model on the machine at hand. Both answer the same: the linear work of
a layer, the head, the embedding. `AttentionCost` is a formula for either. The shape is what one
device holds: under tensor parallelism a shard (`ModelShape.shard`). The formulae use arithmetic
only, so that the fit (`bench/published/fit.py`) evaluates the very same ones on numpy arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError

TILE = 128
"""Rows and columns of a matrix product's tile on a GPU."""

_OF_EXPERTS = ("mlp_up", "mlp_down")
"""Products of the MLP: by each expert that the tokens take."""

Points = tuple[tuple[int, float], ...]
"""(size, seconds), sizes increasing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """A matrix product, tile by tile: the roofline, its corner rounded by a p-norm.

    Flops are those of whole tiles, so 257 rows cost what 384 do. Tiles run in waves of one a
    processor; a share of the time counts whole waves. `bench/published/fit.py` says what was
    tried.
    """

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float
    norm: float
    """p of the norm that joins arithmetic and memory time; the larger, the sharper the corner."""
    wave_share: float
    """Share of the arithmetic that waits for the last wave of tiles, 0 to 1."""
    ramp: float
    """What a tile costs before it multiplies, in values of the inner dimension."""
    num_processors: int
    tile_rows: int = TILE
    """Rows of a tile; of half as many where the product has no more than that. 1: no row is
    multiplied for nothing."""

    def __post_init__(self) -> None:
        if not 1 <= self.norm <= 100:
            raise ConfigError(f"norm is {self.norm}: give 1 (a sum) to 100 (about the larger)")
        if self.wave_share > 1:
            raise ConfigError(f"wave_share is {self.wave_share}: give a share of 0 to 1")

    def seconds(
        self, rows: int, columns: int, inner: int, bytes_per_value: int = 2, groups: float = 1
    ) -> float:
        """[rows, inner] times [inner, columns]; or, in one kernel, an equal share of the rows times
        each of `groups` such matrices."""
        own_rows = rows / groups
        half = max(1, self.tile_rows // 2)
        tile_rows = half + (self.tile_rows - half) * (own_rows > half)
        tiles = groups * -(-own_rows // tile_rows) * -(-columns // TILE)
        whole_waves = -(-tiles // self.num_processors) * self.num_processors
        tiles = (1 - self.wave_share) * tiles + self.wave_share * whole_waves
        flops = 2 * tiles * tile_rows * TILE * (inner + self.ramp)
        moved = bytes_per_value * (rows * inner + groups * inner * columns + rows * columns)
        busy = (flops / self.flops_per_s) ** self.norm + (moved / self.bytes_per_s) ** self.norm
        joined: float = busy ** (1 / self.norm)
        return joined + self.overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Elementwise:
    """An operation that does little but move bytes."""

    overhead_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.overhead_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Linear work by formula, for any model."""

    gemm: Gemm
    norm: Elementwise
    rope: Elementwise
    activation: Elementwise
    add: Elementwise
    embedding: Elementwise

    def layer_ops(self, shape: ModelShape, num_tokens: int) -> Iterator[tuple[str, float]]:
        """Name and seconds of each operation of a layer but attention and communication."""
        size = shape.bytes_per_value
        taken = shape.experts_per_token * num_tokens, max(1.0, shape.experts_touched(num_tokens))
        for name, columns, inner in products(shape):
            rows, groups = taken if name in _OF_EXPERTS else (num_tokens, 1)
            yield name, self.gemm.seconds(rows, columns, inner, size, groups)
        moved = elementwise_bytes(shape, num_tokens)
        for name, calls in (("norm", 2), ("rope", 1), ("activation", 1), ("add", 2)):
            yield name, calls * getattr(self, name).seconds(moved[name])

    def layer_s(self, shape: ModelShape, num_tokens: int) -> float:
        ops = self.layer_ops(shape, num_tokens)
        return sum(seconds for _, seconds in ops)

    def head_s(self, shape: ModelShape, num_logits: int) -> float:
        """Final norm and vocabulary head over the rows whose logits are wanted."""
        if not num_logits:
            return 0.0
        moved = elementwise_bytes(shape, num_logits)["norm"]
        product = self.gemm.seconds(
            num_logits, shape.vocab_size, shape.hidden_size, shape.bytes_per_value
        )
        return self.norm.seconds(moved) + product

    def embedding_s(self, shape: ModelShape, num_tokens: int) -> float:
        moved = elementwise_bytes(shape, num_tokens)
        return self.embedding.seconds(moved["embedding"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Linear work as measured, for one model: linear in between, the last slope beyond."""

    model: str
    dtype: str
    threads: int
    tensor_parallel_size: int = 1
    """Ranks that shared a stage: all below is what one of them took."""
    layer: Points
    """Seconds of one layer, attention left out, at numbers of tokens."""
    head: Points
    """Seconds of final norm, head and sampling at numbers of rows."""
    embedding: Points

    def __post_init__(self) -> None:
        for name in ("layer", "head", "embedding"):
            check_points(name, getattr(self, name))

    def layer_ops(self, shape: ModelShape, num_tokens: int) -> Iterator[tuple[str, float]]:
        yield "layer", self.layer_s(shape, num_tokens)

    def layer_s(self, shape: ModelShape, num_tokens: int) -> float:
        return interpolate(self.layer, num_tokens)

    def head_s(self, shape: ModelShape, num_logits: int) -> float:
        return interpolate(self.head, num_logits) if num_logits else 0.0

    def embedding_s(self, shape: ModelShape, num_tokens: int) -> float:
        return interpolate(self.embedding, num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """Seconds in one layer. A chunk's prefix and its causal part have a rate each: they differ by
    more than twice."""

    prefill_overhead_s: float
    """Of each prefill chunk."""
    prefill_values_per_s: float
    """Query values (positions times heads times head_dim)."""
    prefix_flops_per_s: float
    causal_flops_per_s: float
    query_tile: int
    """Query positions are rounded up to a multiple of this."""
    decode_overhead_s: float
    """Of all decodes of a microbatch together."""
    decode_sequence_s: float
    """Of each decode, whatever its context."""
    decode_bytes_per_s: float
    """K and V read."""

    def prefill_s(self, shape: ModelShape, start: int, num_tokens: int) -> float:
        """A chunk of `num_tokens` positions after `start` that are in the KV cache."""
        width = shape.num_heads * shape.head_dim
        rows = -(-num_tokens // self.query_tile) * self.query_tile
        prefix = 4 * width * rows * start / self.prefix_flops_per_s
        causal = 2 * width * rows * rows / self.causal_flops_per_s
        copied = width * num_tokens / self.prefill_values_per_s
        return self.prefill_overhead_s + copied + prefix + causal

    def decode_s(self, shape: ModelShape, num_decodes: int, context: int) -> float:
        """`num_decodes` queries of one position; `context` positions of KV in all."""
        moved = context * shape.kv_bytes_per_token_per_layer
        launched = self.decode_overhead_s + num_decodes * self.decode_sequence_s
        return (num_decodes > 0) * launched + moved / self.decode_bytes_per_s


def products(shape: ModelShape) -> tuple[tuple[str, int, int], ...]:
    """Name, columns and inner dimension of a layer's products; those of the MLP are one expert's,
    where there are experts."""
    router = (("router", shape.num_experts, shape.hidden_size),) if shape.num_experts > 1 else ()
    return (
        *router,
        ("qkv", shape.qkv_columns, shape.hidden_size),
        ("attention_out", shape.hidden_size, shape.num_heads * shape.head_dim),
        ("mlp_up", shape.up_columns, shape.hidden_size),
        ("mlp_down", shape.hidden_size, shape.intermediate_size),
    )


def elementwise_bytes(shape: ModelShape, num_tokens: int) -> dict[str, int]:
    """Bytes that one call of each operation of `Kernels` reads and writes."""
    ffn = shape.experts_per_token * shape.intermediate_size
    values_per_token = {
        "norm": 2 * shape.hidden_size,
        "rope": 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim,
        "activation": (3 if shape.gated_mlp else 2) * ffn,
        "add": 3 * shape.hidden_size,
        "embedding": 2 * shape.hidden_size,
    }
    size = num_tokens * shape.bytes_per_value
    return {name: size * values for name, values in values_per_token.items()}


def interpolate(points: Points, size: float) -> float:
    """Linear between points, the last slope (never downwards) beyond, the first value below."""
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    (low, low_s), (high, high_s) = neighbours(points, size)
    slope = (high_s - low_s) / (high - low)
    return low_s + (size - low) * slope if size <= high else high_s + (size - high) * max(slope, 0)


def neighbours(points: Points, size: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two points around a size; the last two beyond. A scan: callers cache by size."""
    for index, (upper, _) in enumerate(points[1:], start=1):
        if size <= upper:
            return points[index - 1], points[index]
    return points[-2], points[-1]


def check_points(name: str, points: Points) -> None:
    sizes = [-inf, *(size for size, _ in points)]
    if not points or any(b <= a for a, b in pairwise(sizes)):
        raise ConfigError(f"{name}: the sizes of its points must increase, and be at least one")
