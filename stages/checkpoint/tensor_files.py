"""Where the tensors of a safetensors folder lie: its files, their headers, and which bytes of them
are some rows of a tensor. Format: 8 bytes little-endian header length, a JSON header of name ->
dtype, shape, data_offsets, the data.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeserve.errors import ConfigError
from pipeserve.stages.layers.leaf import Rows

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CUT = {
    "model-rank-*-part-*.safetensors": "vLLM",
    "rank[0-9]*.safetensors": "TensorRT-LLM",
    "*-TP-[0-9]*.safetensors": "its maker",
    "mp_rank_*": "Megatron-LM or DeepSpeed",
    "iter_*/mp_rank_*": "Megatron-LM",
    "tp_*": "DeepSpeed",
    "consolidated.01.pth": "Llama's own code",
}
"""Files and folders of tensor-parallel checkpoints, and whose they are."""
_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Entry:
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


def spans_of(rows: Rows, entry: Entry) -> list[tuple[int, int]]:
    """Where in its file, [first byte, last): all rows at once, or a part of each."""
    size, columns = entry.row_bytes, rows.columns
    if columns is None or len(entry.shape) == 1:
        return [(entry.offset + rows.start * size, entry.offset + rows.stop * size)]
    first, stop = (at * size // columns.of for at in (columns.start, columns.stop))
    begins = range(entry.offset + rows.start * size, entry.offset + rows.stop * size, size)
    return [(begin + first, begin + stop) for begin in begins]


def pieces_of(spans: Sequence[tuple[int, int]], num_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The same, in lists of so many bytes at most."""
    together: list[tuple[int, int]] = []
    room = num_bytes
    for start, stop in spans:
        while start < stop:
            if not room:
                yield together
                together, room = [], num_bytes
            taken = min(stop - start, room)
            together.append((start, start + taken))
            start, room = start + taken, room - taken
    if together:
        yield together


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """By name. As in transformers a model.safetensors comes before an index: one that lies beside
    it is often left from the model that it was made of (mlx-swift-lm#554)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        descriptor = open_file(single)
        try:
            return dict.fromkeys(read_header(descriptor, single), single)
        finally:
            os.close(descriptor)
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / shard for name, shard in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index} is no safetensors index; fetch it again") from None
    if (folder / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"{folder} holds the weights of an adapter alone; merge it with its base model "
            "(merge_and_unload of peft) and give the merged folder"
        )
    for pattern, made_by in _CUT.items():
        if any(folder.glob(pattern)):
            raise ConfigError(
                f"{folder} holds a checkpoint that {made_by} has cut for its ranks ({pattern}); "
                "give the Hugging Face folder that it was made from, of which each rank here reads "
                "its part"
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


def check_no_adapter(folder: Path) -> None:
    """One that lies beside a model: transformers puts it on top where peft is installed."""
    if (folder / "adapter_config.json").exists() and any(folder.glob("adapter_model.*")):
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json) beside its model; merge the two "
            "(merge_and_unload of peft), or take the adapter's files away to run without it"
        )


def open_file(path: Path) -> int:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a file; fetch it again")
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; fetch the file again") from None


def read_header(descriptor: int, path: Path) -> dict[str, Entry]:
    """Every tensor that the file says it holds."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or 8 + length > size:
        if os.pread(descriptor, len(_POINTER), 0) == _POINTER:
            raise ConfigError(f"{path} is a pointer of Git LFS to the weights; run git lfs pull")
        raise ConfigError(f"{path} is truncated: {size} bytes, no whole header; fetch it again")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        return {name: _entry(path, 8 + length, **fields) for name, fields in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{path} is not a safetensors file: its header makes no sense; fetch it again"
        ) from None


def _entry(
    path: Path, data_start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> Entry:
    """One line of the header. Raises ValueError where size and shape contradict each other, and
    for bytes that are none of a tensor's."""
    start, stop = data_offsets
    if not 0 <= start <= stop or min(shape, default=0) < 0:
        raise ValueError
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError
    return Entry(path, dtype, tuple(shape), data_start + start, stop - start)
