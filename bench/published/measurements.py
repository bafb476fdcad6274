"""Published measurements of A100s, read by path: vidur's microbenchmarks and whole iterations.

Not part of the package's data: `bench/fit_device.py` reads them to make the shipped profiles, and
tests of the fit skip without them. File names are those of `docs/cost-model.md`; all times become
seconds, medians of the repeats.
"""

import csv
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError

Array = np.ndarray

_PRODUCTS = {
    "qkv": "attn_pre_proj",
    "attention_out": "attn_post_proj",
    "mlp_up": "mlp_up_proj",
    "mlp_down": "mlp_down_proj",
}
_ELEMENTWISE = {
    "norm": "input_layernorm",
    "rope": "attn_rope",
    "activation": "mlp_act",
    "add": "add",
    "embedding": "emb",
}


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One model's layer, op by op, on one GPU of a tensor-parallel group. Arrays are parallel."""

    shape: ModelShape
    """Of one layer: `num_layers` is 1."""
    tensor_parallel_size: Array
    num_tokens: Array
    products: dict[str, Array]
    """Seconds by the names of `core.cost.kernels.products`."""
    elementwise: dict[str, Array]
    """Seconds by the names of `core.cost.kernels.elementwise_bytes`."""
    jitter: float
    """Standard deviation over mean of the repeats of one product, median over all."""


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """Attention of one layer, of one shape. Prefill rows are one chunk, decode rows a batch."""

    shape: ModelShape
    tensor_parallel_size: int
    start: Array
    num_tokens: Array
    prefill_s: Array
    num_decodes: Array
    context: Array
    """Positions of KV read by the whole batch."""
    decode_s: Array


@dataclass(frozen=True, slots=True)
class MessageTimes:
    """One collective or link: seconds at message sizes in bytes, sizes not decreasing."""

    num_bytes: Array
    seconds: Array


@dataclass(frozen=True, slots=True)
class Iteration:
    """A whole forward pass as others measured it, host time included."""

    source: str
    model: str
    """A name of `configs/models/`."""
    tensor_parallel_size: int
    num_prefill_tokens: int
    """Of one prompt; 0 for a batch of decodes."""
    num_decodes: int
    context: int
    """Of all decodes together."""
    seconds: float


def read_layers(folder: Path) -> list[LayerTimes]:
    """`vidur_a100_compute/*.mlp.csv.gz`."""
    files = sorted((folder / "vidur_a100_compute").glob("*.mlp.csv.gz"))
    return [_layer_times(path) for path in files]


def _layer_times(path: Path) -> LayerTimes:
    rows = _rows(path)
    first = rows[0]
    heads = int(first["n_head"])
    shape = ModelShape(
        name=path.name.removesuffix(".mlp.csv.gz"),
        num_layers=1,
        hidden_size=int(first["n_embd"]),
        num_heads=heads,
        num_kv_heads=int(first["n_kv_head"]),
        head_dim=int(first["n_embd"]) // heads,
        intermediate_size=int(first["n_expanded_embd"]),
        vocab_size=int(first["vocab_size"]),
        max_position_embeddings=4096,
        gated_mlp=first["use_gated_mlp"] == "True",
    )
    spreads = [
        _column(rows, f"time_stats.{op}.std") / _column(rows, f"time_stats.{op}.mean")
        for op in _PRODUCTS.values()
    ]
    return LayerTimes(
        shape=shape,
        tensor_parallel_size=_column(rows, "num_tensor_parallel_workers").astype(int),
        num_tokens=_column(rows, "num_tokens").astype(int),
        products={name: _median_s(rows, op) for name, op in _PRODUCTS.items()},
        elementwise={name: _median_s(rows, op) for name, op in _ELEMENTWISE.items()},
        jitter=float(np.median(np.concatenate(spreads))),
    )


def read_attention(folder: Path) -> AttentionTimes:
    """`vidur_a100_compute/attention.*.csv.gz`: 64 query heads, 8 KV heads, head_dim 128, TP2."""
    path = next((folder / "vidur_a100_compute").glob("attention.*.csv.gz"), None)
    if path is None:
        raise ConfigError(
            f"{folder} has no vidur_a100_compute/attention.*.csv.gz; give the folder of the "
            "measurements that bench/fit_device.py names"
        )
    rows = _rows(path)
    prefill = [row for row in rows if row["is_prefill"] == "True"]
    decode = [row for row in rows if row["is_prefill"] != "True"]
    batch = _column(decode, "batch_size").astype(int)
    return AttentionTimes(
        shape=ModelShape(
            name="attention",
            num_layers=1,
            hidden_size=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=8192,
            vocab_size=1,
            max_position_embeddings=4096,
        ),
        tensor_parallel_size=2,
        start=_column(prefill, "kv_cache_size").astype(int),
        num_tokens=_column(prefill, "prefill_chunk_size").astype(int),
        prefill_s=_median_s(prefill, "attn_prefill"),
        num_decodes=batch,
        context=batch * (_column(decode, "kv_cache_size").astype(int) + 1),
        decode_s=_median_s(decode, "attn_decode"),
    )


def read_messages(
    path: Path, operation: str, num_devices: int, devices_per_node: int
) -> MessageTimes:
    """The rows of one group of devices in one of vidur's `all_reduce` or `send_recv` files."""
    wanted = (operation, str(num_devices), str(devices_per_node))
    keys = ("collective", "num_workers", "devices_per_node")
    rows = [row for row in _rows(path) if tuple(row[key] for key in keys) == wanted]
    rows.sort(key=lambda row: int(row["size"]))
    return MessageTimes(_column(rows, "size"), _median_s(rows, operation))


def read_iterations(folder: Path) -> list[Iteration]:
    """Sarathi-Serve's Yi-34B iterations, and DistServe's fits evaluated at a few lengths."""
    return [*_sarathi(folder / "e2e"), *_distserve(folder / "e2e")]


def _sarathi(folder: Path) -> Iterable[Iteration]:
    """Figure 2 of its artefact; the decodes' context is not in the file, the figure says 1,024."""
    for kind in ("prefill", "decode"):
        for row in _rows(folder / f"sarathi_fig2_yi34b_tp2_{kind}.csv"):
            prefill, decodes = (
                int(row["batch_num_prefill_tokens"]),
                int(row["batch_num_decode_tokens"]),
            )
            yield Iteration(
                source="Sarathi-Serve, figure 2",
                model="yi-34b",
                tensor_parallel_size=2,
                num_prefill_tokens=prefill,
                num_decodes=decodes,
                context=1024 * decodes,
                seconds=float(row["batch_execution_time"]),
            )


def _distserve(folder: Path) -> Iterable[Iteration]:
    """Their published fits, whose coefficients are milliseconds."""
    text = (folder / "distserve_profiler-a100-80g.distserve.json").read_text()
    for name, sizes in json.loads(text).items():
        for size, fits in sizes.items():
            where = ("DistServe's fit", name.removeprefix("facebook/"), int(size))
            a, b, c = fits["prefill"]
            for n in (128, 256, 512, 1024, 2048):
                yield Iteration(*where, n, 0, 0, (a + b * n + c * n * n) / 1e3)
            for batch in (8, 32, 64, 128):
                small = batch < fits["decoding_large_small_bs_threshold"]
                a, b, c = fits["decoding_smallbs" if small else "decoding_largebs"]
                context = 512 * batch
                yield Iteration(*where, 0, batch, context, (a + b * context + c * batch) / 1e3)


def _rows(path: Path) -> list[dict[str, str]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(data.decode().splitlines()))


def _column(rows: list[dict[str, str]], name: str) -> Array:
    """NaN where a row has no such value."""
    return np.array([float(row.get(name) or "nan") for row in rows])


def _median_s(rows: list[dict[str, str]], operation: str) -> Array:
    return _column(rows, f"time_stats.{operation}.median") / 1e3
