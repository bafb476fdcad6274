"""Request traces: lengths, and arrivals where the file has them. CSV[.gz] or JSONL[.gz]."""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeserve.errors import ConfigError

# By the names that published traces use: Azure's, Vidur's, Sarathi-Serve's, Mooncake's.
_PROMPT = ("prefill", "context", "input_length")
_OUTPUT = ("decode", "generated", "output_length")
_ARRIVAL = ("timestamp", "arriv")
_MOST_TOKENS = 10**9
_MOST_SECONDS = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival."""

    lengths: tuple[tuple[int, int], ...]
    """(prompt tokens, output tokens), each at least 1."""
    arrivals_s: tuple[float, ...] = ()
    """Seconds after the first, parallel to `lengths`; empty where the trace has none."""


def is_trace(path: Path) -> bool:
    """Whether a file holds lengths: any CSV, and JSONL whose first object has `input_length`."""
    suffixes = path.suffixes[-2:]
    if ".csv" in suffixes or suffixes == [".jsonl", ".gz"]:
        return True
    try:
        with path.open(encoding="utf-8") as file:
            return '"input_length"' in file.readline()
    except (OSError, UnicodeDecodeError):
        return False  # whoever reads it as prompts says what is wrong


def read_trace(path: Path) -> Trace:
    """The requests of a trace whose columns (or JSON keys) are named prefill, context or
    input_length; decode, generated or output_length; and timestamp or arrived_at, if it has times.

    Times are seconds, dates, or milliseconds where the rows are JSON (Mooncake's). Raises
    ConfigError: unreadable, a column missing, FILE:LINE of a length below 1 or of a time before the
    one above it.
    """
    rows = _read_rows(path)
    columns = list(rows[0][1]) if rows else []
    prompt, output = _find(columns, _PROMPT), _find(columns, _OUTPUT)
    if prompt is None or output is None:
        raise ConfigError(
            f"{path}: no rows with a prefill (or context) and a decode (or generated) column; "
            f"columns here: {', '.join(columns) or 'none'}"
        )
    lengths = tuple(
        (_length(path, line, row, prompt), _length(path, line, row, output)) for line, row in rows
    )
    arrival = _find(columns, _ARRIVAL)
    arrivals_s = _arrivals(path, rows, arrival) if arrival is not None else ()
    return Trace(lengths=lengths, arrivals_s=arrivals_s)


def _read_rows(path: Path) -> list[tuple[int, Mapping[str, object]]]:
    """(line number from 1, row) of each row."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8") as file:
            if ".jsonl" in path.suffixes:
                return list(_json_rows(path, file))
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            _check_names(path, reader.fieldnames or ())
            return rows
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {reason}; give a readable trace") from None


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number + 1}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number + 1}: not a JSON object")
        yield number + 1, row


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: column {name!r} is there twice; keep one")


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((c for c in columns if c and any(name in c.lower() for name in names)), None)


def _length(path: Path, line: int, row: Mapping[str, object], column: str) -> int:
    value = row.get(column)
    shown = repr(value)[:40]
    try:
        number = int(float(str(value)))
        if number > _MOST_TOKENS:
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{path}:{line}: {column} is {shown}, must be a number of at most {_MOST_TOKENS}"
        ) from None
    if number < 1:
        raise ConfigError(
            f"{path}:{line}: {column} is {value}, must be at least 1 token; drop the row"
        )
    return number


def _arrivals(
    path: Path, rows: Sequence[tuple[int, Mapping[str, object]]], column: str
) -> tuple[float, ...]:
    unit_s = 1e-3 if ".jsonl" in path.suffixes else 1.0
    times: list[float] = []
    for line, row in rows:
        value = str(row.get(column))
        try:
            times.append(_seconds(value) * unit_s)
            if not abs(times[-1]) < _MOST_SECONDS:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{path}:{line}: {column} is {value[:40]!r}, must be seconds or a date"
            ) from None
        if len(times) > 1 and not times[-1] >= times[-2]:
            raise ConfigError(
                f"{path}:{line}: {column} is {value}, before the row above; sort the trace by time"
            )
    return tuple(time - times[0] for time in times)


def _seconds(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        # Azure's traces have seven digits after the second, Python's dates six.
        whole, _, part = value.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{part or 0}")
