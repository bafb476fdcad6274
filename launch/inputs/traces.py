"""Request traces: lengths, and arrivals where the file has them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from math import isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.rows import Row, read_rows
from pipeserve.launch.inputs.trace_formats import (
    MILLISECOND,
    NANOSECOND,
    Columns,
    find_columns,
    same_name,
)

_MOST_TOKENS = 10**9
_MOST_SECONDS = 1e12

_NUMBER, _ZONED, _LOCAL = "a number", "a date with a zone", "a date without a zone"
# A first time as large as this is counted from 1970, in this unit.
_SINCE_1970 = (
    (1e17, NANOSECOND, "nanoseconds"),
    (1e14, 1e-6, "microseconds"),
    (1e11, MILLISECOND, "milliseconds"),
    (1e9, 1.0, "seconds"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of arrival."""

    lengths: tuple[tuple[int, int], ...]
    """(prompt tokens, output tokens), each at least 1."""
    arrivals_s: tuple[float, ...] = ()
    """Seconds after the first, parallel to `lengths`; empty where the trace has none."""
    priorities: tuple[int, ...] = ()
    """Parallel to `lengths`; empty where the trace has none."""
    notes: tuple[str, ...] = ()
    """What was left out."""
    time_notes: tuple[str, ...] = ()
    """What was taken for granted of the times."""


class _Moment(NamedTuple):
    """A time as it stands in the file; a date as seconds since 1970."""

    place: str
    value: float
    kind: str


def read_trace(path: Path, num_rows: int | None = None, unit_s: float | None = None) -> Trace:
    """The requests of a trace in one of `trace_formats.FORMATS`; see `trace_of`."""
    return trace_of(path, read_rows(path), num_rows, unit_s)


def trace_of(
    path: Path, rows: Iterable[Row], num_rows: int | None = None, unit_s: float | None = None
) -> Trace:
    """The requests of `rows`; of a trace with times the first `num_rows` that are no failures.

    Rows without prompt or output tokens are requests that failed: left out, and counted in a note.
    Times are numbers or dates. A unit that the format does not settle is judged by the numbers,
    and a note says how; `unit_s`, the seconds of one unit, overrules it. Dates without a zone are
    taken as they stand, whatever the zone of this machine. Rows out of order are sorted by time.

    Raises ConfigError: no rows, no known columns, the place of a length or time that is none.
    """
    lengths, moments, priorities, columns, num_failed = _served(path, rows, num_rows)
    if not lengths:
        raise ConfigError(f"{path}: no row with prompt and output tokens; give a trace with some")
    notes = ()
    if num_failed:
        notes = (
            "left out, for they have no prompt or no output tokens (failed requests): "
            f"{num_failed:,} of {num_failed + len(lengths):,} rows",
        )
    if not moments:
        if unit_s is not None:
            raise ConfigError(
                f"--timed-trace-sec-multiplier is for times, and {path} has none; leave it out"
            )
        return Trace(lengths=tuple(lengths), priorities=tuple(priorities), notes=notes)
    time_notes: list[str] = []
    in_order = _in_order(moments, columns, time_notes)
    unit_s = _unit(moments, columns, unit_s, time_notes)
    first = moments[in_order[0]].value
    return Trace(
        lengths=tuple(lengths[index] for index in in_order),
        arrivals_s=tuple((moments[index].value - first) * unit_s for index in in_order),
        priorities=tuple(priorities[index] for index in in_order if priorities),
        notes=notes,
        time_notes=tuple(time_notes),
    )


def _served(
    path: Path, rows: Iterable[Row], num_rows: int | None
) -> tuple[list[tuple[int, int]], list[_Moment], list[int], Columns | None, int]:
    """Of the rows that are no failures: lengths; when, if that is known (then of the first
    `num_rows`); priorities, if they are known; the columns; and how many rows are failures."""
    columns, lengths, moments, priorities = None, [], [], []
    num_failed, clock = 0, 0.0
    for row in rows:
        columns = columns or find_columns(str(path), row.values)
        pair = _length(row, columns.prompt), _length(row, columns.output)
        if columns.arrival is not None:
            is_first = not lengths and not num_failed
            moment = _moment(row, columns.arrival, is_first=is_first, of=columns)
            clock = clock + moment.value if columns.are_gaps else moment.value
        if 0 in pair:
            num_failed += 1
            continue
        lengths.append(pair)
        if columns.priority is not None:
            priorities.append(_priority(row, columns.priority))
        if columns.arrival is not None:
            moments.append(moment._replace(value=clock))
            if len(moments) == num_rows:
                break
    return lengths, moments, priorities, columns, num_failed


def _length(row: Row, column: str) -> int:
    value = row.values.get(column)
    number = _number(value)
    if number is None or not number.is_integer() or not 0 <= number <= _MOST_TOKENS:
        raise ConfigError(
            f"{row.place}: {column} is {_shown(value)}, must be a whole number of 0 to "
            f"{_MOST_TOKENS:,} tokens"
        )
    return int(number)


def _priority(row: Row, column: str) -> int:
    value = row.values.get(column)
    number = _number(value)
    if number is None or not number.is_integer() or not -(2.0**63) <= number < 2.0**63:
        raise ConfigError(
            f"{row.place}: {column} is {_shown(value)}, must be a whole number of 64 bits"
        )
    try:
        return int(value)  # a float would round what is over 53 bits
    except ValueError:  # such as 1.0 in a table
        return int(number)


def _moment(row: Row, column: str, *, is_first: bool, of: Columns) -> _Moment:
    value = row.values.get(column)
    if of.are_gaps:
        gap = _gap(value, is_first)
        if gap is None:
            raise ConfigError(
                f"{row.place}: {column} is {_shown(value)}, must be seconds since the row above"
            )
        return _Moment(row.place, gap, _NUMBER)
    number = _number(value)
    if number is not None and isfinite(number):
        return _Moment(row.place, number, _NUMBER)
    date = _date(value)
    if date is None:
        raise ConfigError(f"{row.place}: {column} is {_shown(value)}, must be a number or a date")
    kind = _LOCAL if date.tzinfo is None else _ZONED
    return _Moment(row.place, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp(), kind)


def _gap(value: Any, is_first: bool) -> float | None:
    """Seconds since the row above; before the first there is none, so it may be blank."""
    number = _number(value)
    if is_first and (value in (None, "") or (number is not None and isnan(number))):
        return 0.0
    return number if number is not None and 0 <= number < _MOST_SECONDS else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _date(value: Any) -> datetime | None:
    """Digits after the sixth of a second's are dropped: Azure's traces have seven."""
    try:
        return datetime.fromisoformat(str(value).strip().replace(" UTC", "Z"))
    except ValueError:
        return None


def _shown(value: Any) -> str:
    return repr(value)[:40]


def _in_order(moments: Sequence[_Moment], columns: Columns, notes: list[str]) -> list[int]:
    """Indices by time, rows of the same time as they stand. Raises ConfigError: kinds of times
    mixed; a date without a zone before the one above, which may be a clock that was set back."""
    num_late = 0
    for before, moment in pairwise(moments):
        if moment.kind != before.kind:
            raise ConfigError(
                f"{moment.place}: {columns.arrival} is {moment.kind}, above it is {before.kind}; "
                "write all alike"
            )
        if moment.value < before.value:
            num_late += 1
            if moment.kind == _LOCAL:
                raise ConfigError(
                    f"{moment.place}: {columns.arrival} is before the row above, and has no zone: "
                    "perhaps its clock was set back; give a zone, or sort the rows"
                )
    if num_late:
        notes.append(f"sorted by time, for rows come before the row above them: {num_late:,}")
    return sorted(range(len(moments)), key=lambda index: moments[index].value)


def _unit(
    moments: Sequence[_Moment], columns: Columns, given_s: float | None, notes: list[str]
) -> float:
    """Seconds of one unit of the times."""
    values = [moment.value for moment in moments]
    if moments[0].kind != _NUMBER:
        if given_s is not None:
            raise ConfigError(
                f"--timed-trace-sec-multiplier is for numbers, and {columns.arrival} is "
                f"{moments[0].kind}; leave it out"
            )
        return 1.0
    unit_s = given_s or columns.unit_s
    if unit_s is None:
        unit_s, unit, reason = _judged(values, columns)
        notes.append(
            f"{columns.arrival} was taken as {unit}, for {reason}; "
            "--timed-trace-sec-multiplier gives another unit, in seconds"
        )
    span_s = (max(values) - min(values)) * unit_s
    if not span_s < _MOST_SECONDS:
        raise ConfigError(
            f"{columns.arrival} spans {span_s:.3g} s, over {_MOST_SECONDS:g}; see to its unit with "
            "--timed-trace-sec-multiplier"
        )
    return unit_s


def _judged(values: Sequence[float], columns: Columns) -> tuple[float, str, str]:
    """(seconds of one unit, its name, why)."""
    for least, unit_s, name in _SINCE_1970:
        if values[0] >= least:
            return unit_s, f"{name} since 1970", "its numbers are as large"
    if not all(value.is_integer() for value in values):
        return 1.0, "seconds", "its numbers have fractions"
    if same_name(columns.prompt, "input_length"):
        return MILLISECOND, "milliseconds", "its numbers are whole, as in Mooncake's traces"
    return 1.0, "seconds", "most traces have them"


def starting_again(times: Sequence[float], num: int) -> Iterator[float]:
    """`num` arrival times: `times` over and over, each time as long after the last of them as they
    are apart in the mean."""
    span = max(times) - min(times)
    period = span + span / max(1, len(times) - 1)
    for index in range(num):
        turn, place = divmod(index, len(times))
        yield times[place] + turn * period
