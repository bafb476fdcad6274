"""Weights of one stage out of a safetensors folder: its own tensors and not a byte more.

Tensors are read with `pread` straight into the joined weights, piece by piece: a memory map
would count every page it touches as this process's memory, beside the weights made of them.
"""

import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.tensor_files import (
    DTYPES,
    Entry,
    check_no_adapter,
    files_of_tensors,
    open_file,
    pieces_of,
    read_header,
    spans_of,
)
from pipeserve.stages.config.families import find_family
from pipeserve.stages.config.model_config import ModelConfig
from pipeserve.stages.layers.leaf import Leaf, Rows
from pipeserve.stages.stage import Stage

_PIECE_BYTES = 1 << 20
_HOST = torch.device("cpu")
_COMPUTED = ".rotary_emb.inv_freq"  # what old checkpoints keep in each layer, and nobody reads


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
        check_no_adapter(Path(folder))
        for leaf in whole_model.leaves():
            for part, shape in _parts(leaf):
                checkpoint.find(leaf.source, part, shape)
                wanted |= {f"{rows.name}.{part}" for rows in leaf.source}
            if not leaf.has_bias:
                unwanted |= {f"{rows.name}.bias" for rows in leaf.source}
        layers = find_family(config.architecture).layers
        checkpoint.refuse(unwanted, others_than=wanted, below=f"{layers}.")


class Checkpoint:
    """A safetensors checkpoint, in one file or sharded with an index. Opens shards on first use."""

    def __init__(self, folder: Path) -> None:
        self.on_read: Callable[[int], None] = lambda num_read: None
        """Called after each read of data with the bytes read so far."""
        self._num_read = 0
        self._folder = folder
        self._shard_of = files_of_tensors(folder)
        self._files: dict[Path, int] = {}
        self._headers: dict[Path, dict[str, Entry]] = {}

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
            name = f"{rows.name}.{part}"
            self._read_into(flat[done : done + size], name, entry, spans_of(rows, entry))
            done += size

    def num_bytes(self, source: Sequence[Rows], part: str, shape: tuple[int, ...]) -> int:
        """How many bytes `read` reads. Raises ConfigError as it does."""
        entries = self.find(source, part, shape)
        pairs = zip(source, entries, strict=True)
        return sum(stop - start for pair in pairs for start, stop in spans_of(*pair))

    def find(self, source: Sequence[Rows], part: str, shape: tuple[int, ...]) -> list["Entry"]:
        """The tensor behind each of `source`. Raises ConfigError where one is missing or not of
        the shape that the whole asks for."""
        entries = [self._find(rows, part) for rows in source]
        for rows, entry in zip(source, entries, strict=True):
            row = shape[1:] if rows.columns is None or len(shape) == 1 else (rows.columns.of,)
            wanted = (rows.of, *row)
            if entry.shape != wanted:
                raise ConfigError(
                    f"{self._folder}: {rows.name}.{part} has shape {entry.shape}, config.json asks "
                    f"for {wanted}; {_remedy_for(entry.shape, wanted)}"
                )
        return entries

    def _read_into(
        self, target: Tensor, name: str, entry: "Entry", spans: Sequence[tuple[int, int]]
    ) -> None:
        """The bytes of `spans`, one behind the other, in pieces, so that no second copy of a large
        tensor ever exists, and what is read is still in the core's cache when it is looked at."""
        descriptor, dtype = self._open(entry.path), DTYPES[entry.dtype]
        first = 0
        for together in pieces_of(spans, _PIECE_BYTES):
            num_bytes = sum(stop - start for start, stop in together)
            part = target[first : first + num_bytes // dtype.itemsize]
            values = part if part.dtype == dtype else torch.empty(part.shape, dtype=dtype)
            view, done = memoryview(values.view(torch.uint8).numpy()), 0
            for start, stop in together:
                if os.preadv(descriptor, [view[done : done + stop - start]], start) < stop - start:
                    raise ConfigError(
                        f"{entry.path} is truncated: {name} needs {spans[-1][1]} bytes; "
                        "fetch the file again"
                    )
                done += stop - start
            if values is not part:
                part.copy_(values)
            _check_finite(part, values, name, entry.path)
            first += len(part)
            self._num_read += num_bytes
            self.on_read(self._num_read)

    def _find(self, rows: Rows, part: str) -> Entry:
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
            self._headers[path] = read_header(self._open(path), path)
        entry = self._headers[path].get(name)
        if entry is None:
            raise ConfigError(f"{path} has no tensor {name}, as its index says; fetch both again")
        if entry.dtype not in DTYPES:
            raise ConfigError(
                f"{path}: {name} has dtype {entry.dtype}, supported: {', '.join(DTYPES)}; "
                "give a checkpoint in one of these"
            )
        return entry

    def _stored_name(self, name: str) -> str:
        short = _without_first(name)
        return short if name not in self._shard_of and short in self._shard_of else name

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = open_file(path)
        return self._files[path]


def _remedy_for(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Of a tensor that is not of the shape."""
    short = [(own, all_) for own, all_ in zip(shape, wanted, strict=False) if own != all_]
    if len(shape) == len(wanted) and len(short) == 1:
        own, all_ = short[0]
        if 0 < own < all_ and all_ % own == 0:
            return (
                f"it looks cut for {all_ // own} tensor-parallel ranks; give the checkpoint that "
                "it was cut from, of which each rank here reads its part"
            )
    return "take config and weights from one checkpoint"


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
