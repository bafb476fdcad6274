"""JSON Lines in and out: input errors name file and line; results are on disk as soon as made.

What is written is strict: no NaN, no half a surrogate pair, and no character but the newline at
which a reader might end a line.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeserve.errors import ConfigError, PipeserveError, one_line

_BOM = "\ufeff"  # at the start of a file that Windows wrote, and within one that was put together
_ESCAPED = {char: f"\\u{char:04x}" for char in (0x85, 0x2028, 0x2029)}  # line ends, to some readers


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
    lines = [line.lstrip(_BOM) for line in lines]
    if not any(map(str.strip, lines)):
        raise ConfigError(f"{path}: empty; give one JSON object a line")
    if next(filter(str.strip, lines)).lstrip().startswith("["):
        raise ConfigError(f"{path}: a JSON array, not JSONL; give one JSON object a line")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            reason = f"not JSON: {error.msg} at column {error.colno}"
            raise ConfigError(f"{path}:{number + 1}: {reason}") from None
        except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits
            raise ConfigError(f"{path}:{number + 1}: not JSON: {one_line(error)}") from None
        if not isinstance(value, dict):
            raise ConfigError(f'{path}:{number + 1}: not an object such as {{"prompt": "Hello"}}')
        yield number, value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys are there once: of two it would be a guess which is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is there twice; give it once")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def strict_line(value: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON, without its newline, that every reader takes."""
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        line.encode()
    except ValueError:  # not finite, or no text: of such a line only
        value = _strict(value)
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if ascii_only:
        return json.dumps(value)
    return line if line.isascii() else line.translate(_ESCAPED)


def _strict(value: Any) -> Any:
    """`value` with null for numbers that are not finite, and U+FFFD for half a surrogate pair."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def check_writable(path: Path) -> None:
    """Raise ConfigError unless `path` can be written. Leaves what is there as it is."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a writable file") from None
    if is_new:
        path.unlink()


def write_json(path: Path | None, numbers: Mapping[str, Any]) -> None:
    """What `--json` writes, where it was given."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneLines:
    """What a file of results holds already."""

    indices: frozenset[int] = frozenset()
    """Of the prompts that are answered, or that were found unable to run."""
    num_errors: int = 0
    """How many of them were unable to run."""
    num_bytes: int = 0
    """Up to the end of the last whole line."""


def read_done(path: Path, job: str) -> DoneLines:
    """What `path` holds of `job`. A line is whole when its newline is there; one that a killed
    process began is not counted. Changes nothing.

    Raises ConfigError when a whole line is no result, or one of another job.
    """
    indices, failed, num_bytes = set(), set(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            num_bytes += len(line)
            if not line.strip():
                continue
            result = _parse_result(line, f"{path}:{number}")
            if result["job"] != job:
                raise ConfigError(
                    f"{path}:{number} is of another job: prompts, model, dtype, seed or sampling "
                    "were others; give what it was begun with, or --overwrite, or another --output"
                )
            indices.add(result["index"])
            if has_error(result):
                failed.add(result["index"])
    return DoneLines(indices=frozenset(indices), num_errors=len(failed), num_bytes=num_bytes)


def has_error(result: dict[str, Any]) -> bool:
    """Whether the prompt, or one of its samples, could not be run to its end."""
    samples = result.get("outputs", ())
    return "error" in result or any("error" in sample for sample in samples)


def _parse_result(line: bytes, place: str) -> dict[str, Any]:
    try:
        result = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        result = None
    is_result = isinstance(result, dict) and {"index", "job"} <= result.keys()
    if not is_result or type(result["index"]) is not int:
        raise ConfigError(
            f"{place} is no result that --resume can go on from; give --overwrite, or another "
            "--output"
        )
    return result


class ResultFile:
    """A JSONL file of the results of one job. Nothing of an older file is lost before the first.

    Each result says of which job it is, so that the file alone tells what is left to do.
    """

    def __init__(
        self, path: Path, job: str, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        """With `resume`, keeps what is there, which `done` then says, but for a half-written line.

        Raises ConfigError when `path` exists and is to be neither overwritten nor resumed, is not
        of this job, is unwritable, or is being written by another process.
        """
        if path.is_file() and not (overwrite or resume):
            raise ConfigError(
                f"{path} exists; give --resume to go on with it, --overwrite to replace it, or "
                "another --output"
            )
        self.path = path
        self.done = DoneLines()
        self._job = job
        self._is_new = not path.exists()
        self._replaces = overwrite
        self._num_written = 0
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; give a writable file") from None
        try:
            self._take(resume)
        except BaseException:
            self._file.close()
            raise

    def _take(self, resume: bool) -> None:
        """Make the file ours alone, and ready for the next line."""
        if not self.path.is_file():
            return  # such as /dev/stdout: anyone may write to it
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            raise ConfigError(
                f"{self.path} is being written by another process; wait for it, or give another "
                "--output"
            ) from None
        if resume:
            self.done = read_done(self.path, self._job)
            self._file.truncate(self.done.num_bytes)

    def write(self, result: dict[str, Any]) -> None:
        """One line, flushed. Raises PipeserveError when the disk takes no more."""
        try:
            if self._replaces and os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
            self._replaces = False
            self._file.write(strict_line({**result, "job": self._job}) + "\n")
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
