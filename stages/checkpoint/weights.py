"""Weights of one stage out of a safetensors folder: its own tensors and not a byte more.

Tensors are read with `pread` straight into the joined weights, piece by piece: a memory map
would count every page it touches as this process's memory, beside the weights made of them. Format:
8 bytes little-endian header length, a JSON header of name -> dtype, shape, data_offsets, the data.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pipeserve.errors import ConfigError
from pipeserve.stages.config.families import find_family
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.layers.leaf import Leaf, Rows
from pipeserve.stages.stage import Stage

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE_BYTES = 1 << 20
_HOST = torch.device("cpu")
_COMPUTED = ".rotary_emb.inv_freq"  # what old checkpoints keep in each layer, and nobody reads
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_weights(
    stage: Stage,
    folder: str | Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda num_read, num_bytes: None,
) -> None:
    """Set the weights of `stage`, in `dtype`. `progress` is called before the first read and after
    each, with the bytes read so far and those that there are to read.

    Raises ConfigError for a checkpoint that is missing, truncated, pickled or of another shape, and
    for weights that are not finite.
    """
    with Checkpoint(Path(folder)) as checkpoint:
        num_bytes = sum(
            checkpoint.num_bytes(leaf.source, part, shape)
            for leaf in stage.leaves()
            for part, shape in _parts(leaf)
        )
        progress(0, num_bytes)
        checkpoint.on_read = lambda num_read: progress(num_read, num_bytes)
        for leaf in stage.leaves():
            own, parts = leaf.dtype_in(dtype), _parts(leaf)
            tensors = [stage.backend.allocate(shape, own, _HOST) for _, shape in parts]
            for tensor, (part, _) in zip(tensors, parts, strict=True):
                checkpoint.read(leaf.source, part, tensor)
            leaf.set(*tensors)


def _parts(leaf: Leaf) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of a leaf's weight, and of its bias if it has one."""
    return [("weight", leaf.shape), ("bias", leaf.shape[:1])][: 1 + leaf.has_bias]


def check_checkpoint(folder: str | Path, config: ModelConfig) -> None:
    """Whether the checkpoint holds the model that `config` describes, by names and shapes alone.

    Reads headers only, so it can run before any process is started. Raises ConfigError.
    """
    whole_model = Stage(
        config, first_layer=0, stop_layer=config.num_layers, has_embedding=True, has_head=True
    )
    wanted, unwanted = set(), set()
    with Checkpoint(Path(folder)) as checkpoint:
        _check_no_adapter(Path(folder))
        for leaf in whole_model.leaves():
            for part, shape in _parts(leaf):
                checkpoint.find(leaf.source, part, shape)
                wanted |= {f"{rows.name}.{part}" for rows in leaf.source}
            if not leaf.has_bias:
                unwanted |= {f"{rows.name}.bias" for rows in leaf.source}
        layers = find_family(config.architecture).layers
        checkpoint.refuse(unwanted, others_than=wanted, below=f"{layers}.")


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

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


class Checkpoint:
    """A safetensors checkpoint, in one file or sharded with an index. Opens shards on first use."""

    def __init__(self, folder: Path) -> None:
        self.on_read: Callable[[int], None] = lambda num_read: None
        """Called after each read of data with the bytes read so far."""
        self._num_read = 0
        self._folder = folder
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

    def refuse(
        self, unwanted: Collection[str], *, others_than: Collection[str], below: str
    ) -> None:
        """Raises ConfigError for a tensor whose name is in `unwanted`, or begins with `below` and
        is not in `others_than`: the model has a part that config.json does not know of."""
        unwanted = {*unwanted, *map(_without_first, unwanted)}
        known = {*others_than, *map(_without_first, others_than)}
        starts = (below, _without_first(below))
        for name in self._shard_of:
            is_other = name.startswith(starts) and name not in known
            if name in unwanted or (is_other and not name.endswith(_COMPUTED)):
                raise ConfigError(
                    f"{self._folder} has a tensor {name}, which its config.json does not ask for; "
                    "take config and weights from one checkpoint"
                )

    def read(self, source: Sequence[Rows], part: str, joined: Tensor) -> None:
        """The rows of `part` ("weight" or "bias") that `source` names, one behind the other."""
        flat, done = joined.view(-1), 0
        for rows, entry in zip(source, self.find(source, part, joined.shape), strict=True):
            size = (rows.stop - rows.start) * math.prod(joined.shape[1:])
            self._read_into(flat[done : done + size], f"{rows.name}.{part}", entry, rows.start)
            done += size

    def num_bytes(self, source: Sequence[Rows], part: str, shape: tuple[int, ...]) -> int:
        """How many bytes `read` reads. Raises ConfigError as it does."""
        entries = self.find(source, part, shape)
        return sum(
            (rows.stop - rows.start) * entry.row_bytes
            for rows, entry in zip(source, entries, strict=True)
        )

    def find(self, source: Sequence[Rows], part: str, shape: tuple[int, ...]) -> list["_Entry"]:
        """The tensor behind each of `source`. Raises ConfigError where one is missing or not of
        the shape that the whole asks for."""
        entries = [self._find(rows, part) for rows in source]
        for rows, entry in zip(source, entries, strict=True):
            if entry.shape != (rows.of, *shape[1:]):
                raise ConfigError(
                    f"{self._folder}: {rows.name}.{part} has shape {entry.shape}, config.json asks "
                    f"for {(rows.of, *shape[1:])}; take config and weights from one checkpoint"
                )
        return entries

    def _read_into(self, target: Tensor, name: str, entry: "_Entry", first_row: int) -> None:
        """Reads in pieces, so that no second copy of a large tensor ever exists, and what is read
        is still in the core's cache when it is looked at."""
        descriptor, dtype = self._open(entry.path), _DTYPES[entry.dtype]
        offset = entry.offset + first_row * entry.row_bytes
        stop = offset + len(target) * dtype.itemsize
        for part in target.split(_PIECE_BYTES // dtype.itemsize):
            values = part if part.dtype == dtype else torch.empty(part.shape, dtype=dtype)
            got = os.preadv(descriptor, [values.view(torch.uint8).numpy()], offset)
            if got < values.nbytes:
                raise ConfigError(
                    f"{entry.path} is truncated: {name} needs {stop} bytes; fetch the file again"
                )
            if values is not part:
                part.copy_(values)
            _check_finite(part, values, name, entry.path)
            offset += got
            self._num_read += got
            self.on_read(self._num_read)

    def _find(self, rows: Rows, part: str) -> _Entry:
        name = self._stored_name(f"{rows.name}.{part}")
        instead = self._stored_name(f"{rows.instead}.{part}")
        if name not in self._shard_of and instead in self._shard_of:
            name = instead
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

    def _stored_name(self, name: str) -> str:
        short = _without_first(name)
        return short if name not in self._shard_of and short in self._shard_of else name

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = _open(path)
        return self._files[path]


def _without_first(name: str) -> str:
    """As a tensor is called in a model saved without its head."""
    return name.partition(".")[2]


def _check_finite(part: Tensor, values: Tensor, name: str, path: Path) -> None:
    """The least and the highest of all are NaN if one of them is, and cheap to have."""
    if all(map(math.isfinite, part.aminmax())):
        return
    if values.isfinite().all():
        raise ConfigError(
            f"{path}: {name} holds {values.abs().max():g}, over the largest {part.dtype} of "
            f"{torch.finfo(part.dtype).max:g}; give --dtype bfloat16 or float32"
        )
    raise ConfigError(
        f"{path}: {name} holds NaN or infinity; fetch the file again, or ask who made it"
    )


def _shard_of_tensor(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / shard for name, shard in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is no safetensors index; fetch it again") from None
    if single.exists():
        descriptor = _open(single)
        try:
            return dict.fromkeys(_read_header(descriptor, single), single)
        finally:
            os.close(descriptor)
    if (folder / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"{folder} holds the weights of an adapter alone; merge it with its base model "
            "(merge_and_unload of peft) and give the merged folder"
        )
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise ConfigError(
            f"{folder} holds only pickled weights, which can run code when read; "
            "convert them to safetensors (save_pretrained of transformers does)"
        )
    raise ConfigError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json; "
        "give a Hugging Face model folder with safetensors"
    )


def _check_no_adapter(folder: Path) -> None:
    """One that lies beside a model: transformers puts it on top where peft is installed."""
    if (folder / "adapter_config.json").exists() and any(folder.glob("adapter_model.*")):
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json) beside its model; merge the two "
            "(merge_and_unload of peft), or take the adapter's files away to run without it"
        )


def _open(path: Path) -> int:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a file; fetch it again")
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
