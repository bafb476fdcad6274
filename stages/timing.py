"""What the parts of a model take on this device, before any of its weights is read: each kind of
layer, the last one, the embedding, and the head with sampling, on made-up weights of their shapes.

Parts are timed in turn, so that whatever else the machine does meets all of them alike; what counts
is the mean, for a stage that shares its core gets no more of it when it serves.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeserve.core.work import PartSeconds, Work
from pipeserve.sampling_params import DrawParams
from pipeserve.stages.attention.inputs import StageInputs, build_inputs
from pipeserve.stages.attention.kv import KVCache
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.drawing import draw
from pipeserve.stages.families import parts_of
from pipeserve.stages.layers.leaf import Leaf
from pipeserve.stages.layers.self_attention import SelfAttention
from pipeserve.stages.sampling import SampleRow
from pipeserve.stages.stage import Stage
from pipeserve.stages.tensor_parallel.shard import WHOLE, Shard

_COPIES = 8
"""Layers of a kind that stand one behind the other, so that their weights come from memory and not
from a cache, as they do where a stage has many; fewer where they are large."""
_MOST_BYTES = 96 << 20
"""Of those copies' weights, and of the KV that they share: what a large cache does not hold."""
_PATTERN = 65_521
"""Values that made-up weights repeat: a prime, so that no two rows are alike."""


class Timed(NamedTuple):
    parts: tuple[PartSeconds, ...]
    """For each microbatch that was asked for."""
    cpu_share: float
    """CPU time of this thread over the wall time: less than 1 where others use its core."""


class PartBytes(NamedTuple):
    """Of weights."""

    layers: tuple[int, ...]
    """Of each of the model."""
    embedding: int
    head: int


def part_bytes(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, shard: Shard = WHOLE
) -> PartBytes:
    """In a run of `dtype`, of a rank that has that part of each."""

    def num_bytes(first: int, stop: int, **which: bool) -> int:
        where = {"backend": backend, "shard": shard}
        return Stage(config, first_layer=first, stop_layer=stop, **where, **which).bytes_in(dtype)

    kinds = layer_kinds(config)
    of_kind = [num_bytes(kinds.index(kind), kinds.index(kind) + 1) for kind in range(len({*kinds}))]
    return PartBytes(
        tuple(of_kind[kind] for kind in kinds),
        num_bytes(0, 0, has_embedding=True),
        num_bytes(0, 0, has_head=True),
    )


def layer_kinds(config: ModelConfig) -> tuple[int, ...]:
    """Of each layer of a model; layers of one kind take the same. Kinds count from 0."""
    parts, kinds = parts_of(config), []
    known: dict[tuple, int] = {}
    for number in range(config.num_layers):
        layer = parts.make_layer(config, number, "")
        marks = tuple(
            (type(module), module.shape if isinstance(module, Leaf) else _mark(module))
            for module in layer.modules()
        )
        kinds.append(known.setdefault(marks, len(known)))
    return tuple(kinds)


def _mark(module: torch.nn.Module) -> object:
    """What tells modules of one type apart."""
    if not isinstance(module, SelfAttention):
        return None
    scoring = module.scoring
    return scoring.window, scoring.softcap, scoring.slopes_N is None, module.rope


def time_parts(
    config: ModelConfig,
    backend: Backend,
    works: Sequence[Work],
    seconds: float,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int,
    has_embedding: bool,
    has_head: bool,
    shard: Shard = WHOLE,
) -> Timed:
    """For about so many seconds, or longer where one round takes longer. `has_head`: then the last
    layer, too, is timed as it is before a head, where few rows go on."""
    make = _Maker(config, backend, works, dtype, kv_dtype, block_size, shard)
    kinds = layer_kinds(config)
    firsts = [kinds.index(kind) for kind in range(len({*kinds}))]
    copies = [make.num_copies(number) for number in firsts]
    probes: dict[object, list[Callable[[], object]]] = {
        ("several", kind): make.layers(number, copies[kind]) for kind, number in enumerate(firsts)
    }
    if has_embedding:
        probes["embedding"] = make.embedding()
    if has_head:
        probes["head"] = make.head()
        probes["last"] = make.last_layers(copies[kinds[-1]])
    took, cpu_share = _in_turn(probes, backend, seconds)
    parts = []
    for one in took:
        layers = [one["several", kind] / copies[kind] for kind in kinds]
        if has_head:
            layers[-1] = one["last"] / copies[kinds[-1]]
        ends = one.get("embedding", 0.0), one.get("head", 0.0)
        parts.append(PartSeconds(tuple(layers), *ends))
    return Timed(tuple(parts), cpu_share)


def _in_turn(
    probes: Mapping[object, Sequence[Callable[[], object]]], backend: Backend, seconds: float
) -> tuple[list[dict[object, float]], float]:
    """For each microbatch the mean of each probe; and the share of the time in which this thread
    computed."""
    is_gpu = backend.device.type == "cuda"
    each = [(name, place, one) for name, ones in probes.items() for place, one in enumerate(ones)]
    for _, _, probe in each:
        probe()  # kernels choose and compile at the first call
    took = [dict.fromkeys(probes, 0.0) for _ in next(iter(probes.values()))]
    num_rounds, start_s, start_cpu_s = 0, time.monotonic(), time.thread_time()
    while not num_rounds or time.monotonic() - start_s < seconds:
        num_rounds += 1
        for name, place, probe in each:
            begin_s = time.perf_counter()
            probe()
            if is_gpu:
                torch.cuda.synchronize(backend.device)
            took[place][name] += time.perf_counter() - begin_s
    cpu_s = time.thread_time() - start_cpu_s
    share = 1.0 if is_gpu else min(cpu_s / (time.monotonic() - start_s), 1.0)
    return [{name: total / num_rounds for name, total in one.items()} for one in took], share


class _Maker:
    """Of what is timed: small stages with made-up weights."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        works: Sequence[Work],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        block_size: int,
        shard: Shard,
    ) -> None:
        self._shard = shard
        self._config, self._backend = config, backend
        self._dtype, self._kv_dtype, self._block_size = dtype, kv_dtype, block_size
        self._kv = self._make_kv(works)
        self._inputs = [self._inputs_of(work) for work in works]

    def _make_kv(self, works: Sequence[Work]) -> KVCache:
        """For the longest sequence at least; all stages write to it."""
        stage = self._stage(0, _COPIES)
        block_bytes = stage.kv_block_bytes(block_size=self._block_size, dtype=self._kv_dtype)
        longest = max(max(stop for _, stop in _spans_of(work)) for work in works)
        self._num_blocks = max(_MOST_BYTES // block_bytes, -(-longest // self._block_size))
        return stage.make_kv(
            num_blocks=self._num_blocks, block_size=self._block_size, dtype=self._kv_dtype
        )

    def num_copies(self, number: int) -> int:
        num_bytes = self._stage(number, 1).bytes_in(self._dtype)
        return max(min(_MOST_BYTES // num_bytes, _COPIES), 1)

    def layers(self, number: int, copies: int) -> list[Callable[[], object]]:
        """Each microbatch through so many layers like one of the model."""
        stage = self._filled(self._stage(number, copies))
        return [
            partial(stage, torch.randn(each.num_tokens, self._config.hidden_size), each, self._kv)
            for each in self._inputs
        ]

    def last_layers(self, copies: int) -> list[Callable[[], object]]:
        """Each microbatch through so many that stand before a head, each for itself."""
        last = self._config.num_layers - 1
        made = [self._make(last, last + 1, gives_rows=True) for _ in range(copies)]
        stages = [self._filled(stage) for stage in made]

        def through_each(hidden_TD: Tensor, inputs: StageInputs) -> None:
            for stage in stages:
                stage(hidden_TD, inputs, self._kv)

        size = self._config.hidden_size
        return [
            partial(through_each, torch.randn(each.num_tokens, size), each) for each in self._inputs
        ]

    def embedding(self) -> list[Callable[[], object]]:
        embedding = self._filled(self._make(0, 0, has_embedding=True)).embedding
        probes = []
        for inputs in self._inputs:
            num_rows = embedding.tokens.shape[0]
            ids_T = self._backend.place(torch.arange(inputs.num_tokens) % num_rows)
            ids_T = self._backend.pad_rows(ids_T)
            probes.append(partial(embedding, ids_T, inputs.to(self._backend.device)))
        return probes

    def head(self) -> list[Callable[[], object]]:
        """And the likeliest token of each row."""
        head = self._filled(self._make(0, 0, has_head=True)).head
        likeliest = SampleRow(DrawParams(temperature=0.0), 0)

        def answer(hidden_RD: Tensor) -> object:
            return draw(head, hidden_RD, [likeliest] * len(hidden_RD))

        numbers = [inputs.num_wanted for inputs in self._inputs]
        hidden = [torch.randn(num, self._config.hidden_size) for num in numbers]
        return [partial(answer, self._backend.place(hidden_RD)) for hidden_RD in hidden]

    def _stage(self, number: int, copies: int) -> Stage:
        stage, *others = [self._make(number, number + 1) for _ in range(copies)]
        for other in others:
            stage.layers.extend(other.layers)
        return stage

    def _make(self, first: int, stop: int, **which: bool) -> Stage:
        return Stage(
            self._config,
            first_layer=first,
            stop_layer=stop,
            backend=self._backend,
            shard=self._shard,
            **which,
        )

    def _filled(self, stage: Stage) -> Stage:
        """With weights that are exact in the checkpoint's dtype, as its own are: what is kept in
        float32, as the head is, may then be held in 16 bits."""
        exact = getattr(torch, self._config.dtype)
        values = (0.02 * torch.randn(_PATTERN)).to(exact).float()
        for leaf in stage.leaves():
            size = math.prod(leaf.shape)
            flat = values.to(leaf.dtype_in(self._dtype)).repeat(-(-size // _PATTERN))
            bias = flat[: leaf.shape[0]].clone() if leaf.has_bias else None
            leaf.set(flat[:size].view(leaf.shape), bias)
        return stage

    def _inputs_of(self, work: Work) -> StageInputs:
        """Sequences whose blocks do not overlap, as far as there are blocks."""
        spans, first = [], 0
        for start, stop in _spans_of(work):
            num = -(-stop // self._block_size)
            table = [(first + each) % self._num_blocks for each in range(num)]
            first += num
            spans.append((start, stop, table, int(stop - start == 1)))
        return build_inputs(spans, self._block_size, None)


def _spans_of(work: Work) -> list[tuple[int, int]]:
    """(positions before it, positions behind it) of each chunk."""
    context = max(work.context // max(work.num_decodes, 1), 1)
    prompts = [(start, start + size) for start, size in work.prefills]
    return prompts + [(context - 1, context)] * work.num_decodes
