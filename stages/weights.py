"""Weights of one stage out of a safetensors folder: its own tensors and not a byte more.

Tensors are read with `pread` straight into the joined weights, piece by piece, because a memory map
would count every page it touches as this process's memory, beside the weights made of them. Format:
8 bytes little-endian header length, a JSON header of name -> dtype, shape, data_offsets, the data.
"""

import json
import os
from collections.abc import Callable
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
            weight = checkpoint.read([f"{name}.weight" for name in names], dtype)
            bias = checkpoint.read([f"{name}.bias" for name in names], dtype) if has_bias else None
            _check_shape(module, names, weight)
            module.set(weight, bias)
    return stage


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Checkpoint:
    """A safetensors checkpoint, in one file or sharded with an index. Opens shards on first use."""

    def __init__(self, folder: Path, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._shard_of = _shard_of_tensor(folder)
        self._files: dict[Path, int] = {}
        self._entries: dict[str, _Entry] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, names: list[str], dtype: torch.dtype) -> Tensor:
        """The named tensors joined along dim 0, in `dtype`."""
        entries = [self._find(name) for name in names]
        trailing = {entry.shape[1:] for entry in entries}
        if len(trailing) > 1:
            raise ConfigError(f"{names[0]} and its neighbours do not join: {sorted(trailing)}")
        rows = sum(entry.shape[0] for entry in entries)
        joined = torch.empty((rows, *entries[0].shape[1:]), dtype=dtype)
        flat, done = joined.view(-1), 0
        for name, entry in zip(names, entries, strict=True):
            size = entry.num_bytes // entry.dtype.itemsize
            self._read_into(flat[done : done + size], name, entry)
            done += size
        return joined

    def _read_into(self, target: Tensor, name: str, entry: _Entry) -> None:
        """Reads in pieces, so that no second copy of a large tensor ever exists."""
        descriptor = self._open(entry.path)
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
            values = torch.frombuffer(view, dtype=entry.dtype)
            first = done // entry.dtype.itemsize
            target[first : first + len(values)].copy_(values)
            done += got
            self._progress(got)

    def _find(self, name: str) -> _Entry:
        if name not in self._shard_of:
            raise ConfigError(
                f"the checkpoint has no tensor {name}; its config.json does not fit its weights"
            )
        if name not in self._entries:
            self._read_header(self._shard_of[name])
        if name not in self._entries:
            raise ConfigError(f"{self._shard_of[name]} has no tensor {name}, as its index says")
        return self._entries[name]

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}; fetch the shard again") from None
        return self._files[path]

    def _read_header(self, path: Path) -> None:
        descriptor = self._open(path)
        header, data_start = _header(descriptor, path)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                continue  # not one of ours unless asked for: then it is reported as missing
            start, stop = entry["data_offsets"]
            self._entries[name] = _Entry(
                path,
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                data_start + start,
                stop - start,
            )


def _shard_of_tensor(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{index} is no safetensors index; fetch it again") from None
        return {name: folder / shard for name, shard in weight_map.items()}
    if single.exists():
        descriptor = os.open(single, os.O_RDONLY)
        try:
            header, _ = _header(descriptor, single)
        finally:
            os.close(descriptor)
        return {name: single for name in header if name != "__metadata__"}
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise ConfigError(
            f"{folder} holds only pickled weights, which can run code when read; "
            "convert them to safetensors (save_pretrained of transformers does)"
        )
    raise ConfigError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json; "
        "give a Hugging Face model folder with safetensors"
    )


def _header(descriptor: int, path: Path) -> tuple[dict, int]:
    """The JSON header, and the offset at which the data starts."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or 8 + length > size:
        raise ConfigError(f"{path} is truncated: {size} bytes, no whole header; fetch it again")
    try:
        return json.loads(os.pread(descriptor, length, 8)), 8 + length
    except ValueError:
        raise ConfigError(f"{path} is not a safetensors file: its header is no JSON") from None


def _check_shape(module: torch.nn.Module, names: tuple[str, ...], weight: Tensor) -> None:
    if tuple(weight.shape) != module.shape:
        raise ConfigError(
            f"{' + '.join(names)} has shape {tuple(weight.shape)}, config.json asks for "
            f"{module.shape}; the config does not fit the checkpoint"
        )
