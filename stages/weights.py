"""Weights of one stage out of a safetensors folder: its own tensors and not a byte more.

Tensors are read with `pread` straight into the joined weights, piece by piece, because a memory map
would count every page it touches as this process's memory, beside the weights made of them. Format:
8 bytes little-endian header length, a JSON header of name -> dtype, shape, data_offsets, the data.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pipeserve.errors import ConfigError
from pipeserve.stages.config import ModelConfig
from pipeserve.stages.llama import LlamaStage

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 8 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_stage(
    folder: str | Path,
    config: ModelConfig,
    *,
    first_layer: int,
    stop_layer: int,
    has_embedding: bool,
    has_head: bool,
    dtype: torch.dtype,
    attention: str = "auto",
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> LlamaStage:
    """The stage with its weights in `dtype`. `progress` is called with the bytes of each read.

    Raises ConfigError for a checkpoint that is missing, truncated, pickled or of another shape.
    """
    stage = LlamaStage(
        config,
        first_layer=first_layer,
        stop_layer=stop_layer,
        has_embedding=has_embedding,
        has_head=has_head,
        attention=attention,
    )
    with Checkpoint(Path(folder), progress) as checkpoint:
        for module, names, has_bias in stage.checkpoint_tensors():
            weight, bias = checkpoint.read(names, "weight", module.shape, dtype), None
            if has_bias:
                bias = checkpoint.read(names, "bias", module.shape[:1], dtype)
            module.set(weight, bias)
    return stage


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    path: Path
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


class Checkpoint:
    """A safetensors checkpoint, in one file or sharded with an index. Opens shards on first use."""

    def __init__(self, folder: Path, progress: Callable[[int], None]) -> None:
        self._folder = folder
        self._progress = progress
        self._shard_of = _shard_of_tensor(folder)
        self._files: dict[Path, int] = {}
        self._headers: dict[Path, dict[str, _Entry]] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(
        self, names: Sequence[str], part: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Tensor `part` ("weight" or "bias") of each name, joined along dim 0 to `shape`."""
        entries = {name: self._find(name) for name in (f"{name}.{part}" for name in names)}
        self._check_shapes(entries, shape)
        joined = torch.empty(shape, dtype=dtype)
        flat, done = joined.view(-1), 0
        for name, entry in entries.items():
            size = math.prod(entry.shape)
            self._read_into(flat[done : done + size], name, entry)
            done += size
        return joined

    def _check_shapes(self, entries: dict[str, _Entry], shape: tuple[int, ...]) -> None:
        found = [entry.shape for entry in entries.values()]
        joins = all(len(each) == len(shape) and each[1:] == shape[1:] for each in found)
        if not joins or sum(each[0] for each in found) != shape[0]:
            raise ConfigError(
                f"{self._folder}: {' + '.join(entries)} has shape {' + '.join(map(str, found))}, "
                f"config.json asks for {shape}; take config and weights from one checkpoint"
            )

    def _read_into(self, target: Tensor, name: str, entry: _Entry) -> None:
        """Reads in pieces, so that no second copy of a large tensor ever exists."""
        descriptor, dtype = self._open(entry.path), _DTYPES[entry.dtype]
        piece = bytearray(min(_PIECE_BYTES, entry.num_bytes))
        done = 0
        while done < entry.num_bytes:
            view = memoryview(piece)[: entry.num_bytes - done]
            got = os.preadv(descriptor, [view], entry.offset + done)
            if got < len(view):
                raise ConfigError(
                    f"{entry.path} is truncated: {name} needs "
                    f"{entry.offset + entry.num_bytes} bytes; fetch the file again"
                )
            values = torch.frombuffer(view, dtype=dtype)
            first = done // dtype.itemsize
            target[first : first + len(values)].copy_(values)
            done += got
            self._progress(got)

    def _find(self, name: str) -> _Entry:
        path = self._shard_of.get(name)
        if path is None:
            raise ConfigError(
                f"{self._folder} has no tensor {name}, which its config.json asks for; "
                "take config and weights from one checkpoint"
            )
        if path not in self._headers:
            self._headers[path] = _read_header(self._open(path), path)
        entry = self._headers[path].get(name)
        if entry is None:
            raise ConfigError(f"{path} has no tensor {name}, as its index says; fetch both again")
        if entry.dtype not in _DTYPES:
            raise ConfigError(
                f"{path}: {name} has dtype {entry.dtype}, supported: {', '.join(_DTYPES)}; "
                "give a checkpoint that is not quantised"
            )
        return entry

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = _open(path)
        return self._files[path]


def _shard_of_tensor(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: folder / shard for name, shard in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is no safetensors index; fetch it again") from None
    if single.exists():
        descriptor = _open(single)
        try:
            return dict.fromkeys(_read_header(descriptor, single), single)
        finally:
            os.close(descriptor)
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise ConfigError(
            f"{folder} holds only pickled weights, which can run code when read; "
            "convert them to safetensors (save_pretrained of transformers does)"
        )
    raise ConfigError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json; "
        "give a Hugging Face model folder with safetensors"
    )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; fetch the file again") from None


def _read_header(descriptor: int, path: Path) -> dict[str, _Entry]:
    """Every tensor that the file says it holds."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or 8 + length > size:
        raise ConfigError(f"{path} is truncated: {size} bytes, no whole header; fetch it again")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        return {name: _entry(path, 8 + length, **fields) for name, fields in header.items()}
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is not a safetensors file: its header makes no sense; fetch it again"
        ) from None


def _entry(
    path: Path, data_start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> _Entry:
    """One line of the header. Raises ValueError where size and shape contradict each other."""
    start, stop = data_offsets
    if dtype in _DTYPES and stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError
    return _Entry(path, dtype, tuple(shape), data_start + start, stop - start)
