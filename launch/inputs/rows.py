"""Rows of a file: CSV by its header, or JSON objects, one a line or in an array; gzipped or not."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipeserve.errors import ConfigError

_GZIP = b"\x1f\x8b"


class Row(NamedTuple):
    """One row, and where it stands, for messages: FILE:LINE, or FILE: element N of an array."""

    place: str
    values: Mapping[str, Any]
    is_json: bool


def read_rows(path: Path) -> Iterator[Row]:
    """Each row as it is read, so that the first of a long file do not cost the whole of it; an
    array is read whole. What the file is, its first character says. A byte order mark, blank
    lines and any line ends are passed over. Columns may be separated by `,`, `;` or tabs.

    Raises ConfigError: unreadable, not UTF-8, damaged, not what it began as.
    """
    try:
        with path.open("rb") as raw:
            is_packed = path.suffix == ".gz" or raw.peek(2)[:2] == _GZIP
            data = gzip.GzipFile(fileobj=raw) if is_packed else raw
            with TextIOWrapper(data, encoding="utf-8-sig", newline="") as text:
                yield from _rows(path, text)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {reason}; give a readable file") from None


def _rows(path: Path, text: TextIO) -> Iterator[Row]:
    num_blank, first = 0, ""
    for first in text:
        if first.strip():
            break
        num_blank += 1
    lines = chain([first], text)
    if first.lstrip().startswith("["):
        yield from _elements(path, "\n" * num_blank + "".join(lines))
    elif first.lstrip().startswith("{") or {".json", ".jsonl"} & set(path.suffixes):
        yield from _objects(path, lines, num_blank)
    elif first.strip():
        yield from _table(path, first, lines, num_blank)


def _table(path: Path, header: str, lines: Iterator[str], num_blank: int) -> Iterator[Row]:
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=header.count), skipinitialspace=True)
    names = reader.fieldnames or ()
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: column {name!r} is there twice; keep one")
    for row in reader:
        place = f"{path}:{reader.line_num + num_blank}"
        more = row.pop(None, [])
        if any(map(str.strip, more)):  # which of them belong to the header, one cannot know
            raise ConfigError(
                f"{place}: {len(names) + len(more)} fields under a header of {len(names)}; quote "
                "fields that hold a separator, and name every column"
            )
        yield Row(place, row, is_json=False)


def _objects(path: Path, lines: Iterator[str], num_blank: int) -> Iterator[Row]:
    for number, line in enumerate(lines, start=num_blank + 1):
        if line.strip():
            place = f"{path}:{number}"
            yield Row(place, _object(place, _parsed(place, line)), is_json=True)


def _elements(path: Path, text: str) -> Iterator[Row]:
    for number, element in enumerate(_parsed(str(path), text), start=1):
        place = f"{path}: element {number}"
        yield Row(place, _object(place, element), is_json=True)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ConfigError(f"{place}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of 4,301 digits, 1,000 brackets
        raise ConfigError(f"{place}: not JSON that can be read: {error}") from None


def _object(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f'{place}: not a JSON object such as {{"prompt": "Hello"}}')
    return value
