"""A recording in files, JSON Lines all but one, so that jq reads them.

    run.json        what was run (`docs/timeline.md` has its keys)
    driver.jsonl    ["planned", [...]] and so on: all that the driver told
    stage-N.jsonl   [...]: the spans of one stage

The first line of a JSON Lines file is its head: the run that it is of, and the names of the fields
that its records list. Numbers that JSON has not (NaN, infinity) are null. The blocks of chunks are
left out. `reader.py` reads them.
"""

import contextlib
import json
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pipeserve.core.nouns import Chunk
from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Fault,
    Headed,
    Ping,
    Planned,
    Record,
    Span,
)
from pipeserve.errors import ConfigError

SCHEMA = 3
KINDS: Mapping[str, type] = {
    kind.__name__.lower(): kind
    for kind in (Arrived, Ended, Planned, Completed, Headed, Ping, Fault)
}
"""Name -> record, of those in driver.jsonl."""
_NAMES = {kind: name for name, kind in KINDS.items()}
_FILE = re.compile(r"run\.json|driver\.jsonl|stage-\d+\.jsonl")
_FLUSH_S = 0.5
_FLUSH_BYTES = 1 << 19


def files_of(folder: Path) -> list[Path]:
    """Those that are there of a recording. Raises ConfigError when `folder` cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; give a folder that can be read") from None


def check_recordable(folder: Path, overwrite: bool = False) -> None:
    """Makes `folder`. Raises ConfigError when it cannot be written to, or when it holds a recording
    that is not to be overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--record {folder}: {error.strerror}; give a folder that can be written to"
        ) from None
    if not overwrite and files_of(folder):
        raise ConfigError(f"--record {folder} holds a recording already; give another folder")


class RecordingWriter:
    """Writes records as they are told, in batches. When the disk takes no more, it says so once, on
    stderr, and the run goes on unrecorded."""

    def __init__(self, folder: Path, meta: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """`meta` is what `run.json` says, and has the plan. Raises as `check_recordable`."""
        check_recordable(folder, overwrite)
        self.folder = folder
        self.run_id = secrets.token_hex(8)
        self._encode_into = msgspec.json.Encoder().encode_into
        num_stages = len(meta["plan"]["stages"])
        self._unwritten = [bytearray() for _ in range(1 + num_stages)]
        """Of each file, the driver's first: its records are encoded at once, or there would be too
        many of them to do so between two looks at what the stages say."""
        self._files: list[BinaryIO] = []
        self._next_flush_s = -inf
        with self._stopping_when_full():
            for old in files_of(folder):
                old.unlink()
            (folder / "run.json").write_text(
                json.dumps({"schema": SCHEMA, "run": self.run_id, **meta}, indent=1) + "\n"
            )
            fields = {name: kind._fields for name, kind in (*KINDS.items(), ("chunk", Chunk))}
            self._open("driver.jsonl", fields)
            for stage in range(num_stages):
                self._open(f"stage-{stage}.jsonl", {"span": Span._fields})

    def _open(self, name: str, fields: Mapping[str, tuple[str, ...]]) -> None:
        file = (self.folder / name).open("wb")
        self._files.append(file)
        head = {"run": self.run_id, "schema": SCHEMA, "fields": fields}
        file.write(json.dumps(head).encode() + b"\n")
        file.flush()

    def record(self, record: Record) -> None:
        """The `Recorder`. Writes when a plan was sent: the stages are busy then."""
        kind = type(record)
        if kind is Span:
            self._put(1 + record.stage, record)
            return
        self._put(0, (_NAMES[kind], _lean(record)))
        if kind is Planned and (
            record.sent_s >= self._next_flush_s or len(self._unwritten[0]) > _FLUSH_BYTES
        ):
            self.flush()
            self._next_flush_s = record.sent_s + _FLUSH_S

    def _put(self, file: int, line: Any) -> None:
        unwritten = self._unwritten[file]
        self._encode_into(line, unwritten, -1)
        unwritten += b"\n"

    def flush(self) -> None:
        """Write what was told so far."""
        with self._stopping_when_full():
            for file, unwritten in zip(self._files, self._unwritten, strict=False):
                if unwritten:
                    file.write(unwritten)
                    file.flush()
        for unwritten in self._unwritten:
            unwritten.clear()

    @contextlib.contextmanager
    def _stopping_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            print(
                f"warning: recording to {self.folder} ended: {error.strerror}; the run goes on",
                file=sys.stderr,
            )
            self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # of a write that failed, and said so
                file.close()
        self._files = []

    def close(self) -> None:
        """Write what is left. Safe to call twice."""
        self.flush()
        self._close_files()

    def __enter__(self) -> "RecordingWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _lean(record: Record) -> Record:
    """Without the ids of blocks, which nothing asks for later."""
    if type(record) is not Planned or not any(chunk.new_blocks for chunk in record.chunks):
        return record
    return record._replace(chunks=tuple([c._replace(new_blocks=()) for c in record.chunks]))
