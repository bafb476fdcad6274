"""JSON Lines in and out: input errors name file and line; results are on disk as soon as made."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError, PipeserveError


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 0, object) of each line that is not blank.

    Raises ConfigError (FILE:LINE, counted from 1 there, as editors do) for what is no object, for
    an unreadable file, and for a file without any.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a readable JSONL file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not any(map(str.strip, lines)):
        raise ConfigError(f"{path}: empty; give one JSON object a line")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at column {error.colno}"
            raise ConfigError(f"{path}:{number + 1}: {reason}") from None
        if not isinstance(value, dict):
            raise ConfigError(f'{path}:{number + 1}: not an object such as {{"prompt": "Hello"}}')
        yield number, value


def check_writable(path: Path) -> None:
    """Raise ConfigError unless `path` can be written. Leaves what is there as it is."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a writable file") from None
    if is_new:
        path.unlink()


class ResultFile:
    """A JSONL file of results. Nothing of an older file is lost before the first result."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        """Raises ConfigError when `path` exists and is not to be overwritten, or is unwritable."""
        if path.is_file() and not overwrite:
            raise ConfigError(f"{path} exists; give --overwrite, or another --output")
        self.path = path
        self._is_new = not path.exists()
        self._num_written = 0
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; give a writable file") from None

    def write(self, result: dict[str, Any]) -> None:
        """One line, flushed. Raises PipeserveError when the disk takes no more."""
        try:
            if self._num_written == 0 and os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
            self._file.write(json.dumps(result, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise PipeserveError(
                f"{self.path}: {error.strerror}; make room and try again"
            ) from None
        self._num_written += 1

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # of a write that failed, and said so
            self._file.close()
        if self._is_new and self._num_written == 0:
            self.path.unlink()
