"""Reads what `writer.py` wrote: whatever is there of it, and notes on what is not."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeserve.core.records import Headed, Span
from pipeserve.errors import ConfigError
from pipeserve.profiling.recording.recording import Recording, no_collection
from pipeserve.profiling.recording.writer import KINDS, SCHEMA, files_of

_NULL_IS = {"input_s": -inf, "cpu_s": nan, "between_cpu_s": nan}


class _File(NamedTuple):
    """A JSON Lines file of a recording."""

    name: str
    run: str
    schema: int
    fields: dict[str, list[str]]
    body: bytes
    """Whole lines behind the head."""


def read_recording(folder: Path) -> Recording:
    """The recording in `folder`, with what is missing or could not be read in its notes.

    Raises ConfigError where nothing of it can be.
    """
    paths = files_of(folder)
    if not paths:
        raise ConfigError(f"{folder} holds no recording; give a folder that --record was given")
    notes: list[str] = []
    meta = _read_meta(folder / "run.json", notes)
    files = [file for path in paths if (file := _read_file(path, notes)) is not None]
    runs = Counter([meta["run"]] if meta else [])
    runs.update(file.run for file in files)
    if not runs:
        raise ConfigError(f"{folder}: nothing of the recording can be read: {'; '.join(notes)}")
    run, _ = runs.most_common(1)[0]
    if meta and meta["run"] != run:
        notes.append("run.json is of another run, and left out")
        meta = {}
    recording = Recording(meta, notes=notes)
    recording.spans = [[] for _ in range(_num_stages(meta, files))]
    with no_collection():
        for file in files:
            if file.run != run:
                notes.append(f"{file.name} is of another run, and left out")
                continue
            if file.schema > SCHEMA:
                notes.append(f"{file.name} is of a newer pipeserve: what it adds is left out")
            elif file.schema < SCHEMA:
                notes.append(
                    f"{file.name} is of an older pipeserve: what lacks a field is left out"
                )
            _take_file(recording, file)
    _note_missing(recording, {file.name for file in files})
    return recording


def _read_meta(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        if isinstance(meta["run"], str) and isinstance(meta["plan"]["stages"], list):
            return meta
        notes.append("run.json is damaged: what was run is not known")
    except FileNotFoundError:
        notes.append("run.json is missing: what was run is not known")
    except OSError as error:
        notes.append(f"run.json: {error.strerror}: what was run is not known")
    except (ValueError, KeyError, TypeError):
        notes.append("run.json is damaged: what was run is not known")
    return {}


def _read_file(path: Path, notes: list[str]) -> _File | None:
    if path.name == "run.json":
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return None
    first, _, rest = data.partition(b"\n")
    try:
        head = json.loads(first)
        run, schema, fields = str(head["run"]), int(head["schema"]), dict(head["fields"])
    except (ValueError, KeyError, TypeError):
        notes.append(f"{path.name} has no head, and is left out")
        return None
    whole, _, cut = rest.rpartition(b"\n")
    if cut:
        notes.append(f"{path.name} breaks off within its last line")
    return _File(path.name, run, schema, fields, whole)


def _num_stages(meta: Mapping[str, Any], files: list[_File]) -> int:
    if meta:
        return len(meta["plan"]["stages"])
    return max([_stage_of(file.name) + 1 for file in files])


def _stage_of(name: str) -> int:
    """-1 for the driver's file."""
    number = name.removeprefix("stage-").removesuffix(".jsonl")
    return int(number) if number.isdigit() else -1


def _take_file(recording: Recording, file: _File) -> None:
    """Puts a file's records into the recording, and what is wrong with it into the notes."""
    stage = _stage_of(file.name)
    if stage < 0:
        num_bad = _take_driver(recording, file)
    elif stage < recording.num_stages:
        kind = _StoredSpan if b"null" in file.body else Span
        decoder = _decoder_of(kind, file.fields.get("span", []))
        spans, num_bad = _decode_lines(file.body, decoder)
        recording.spans[stage] = spans if kind is Span else [_without_null(Span, s) for s in spans]
    else:
        recording.notes.append(f"{file.name} is of no stage of this run, and left out")
        return
    if num_bad:
        recording.notes.append(f"{file.name}: {num_bad} damaged lines are left out")


def _take_driver(recording: Recording, file: _File) -> int:
    """Returns how many lines are damaged."""
    takers = {
        "arrived": recording.arrived,
        "ended": recording.ended,
        "planned": recording.planned,
        "completed": recording.completed,
        "headed": recording.headed,
        "ping": recording.pings,
        "fault": recording.faults,
    }
    kinds = {**KINDS, "headed": _StoredHeaded}
    decoders = {name: _decoder_of(kind, file.fields.get(name, [])) for name, kind in kinds.items()}
    lines, num_bad = _decode_lines(file.body, msgspec.json.Decoder(tuple[str, msgspec.Raw]))
    for name, raw in lines:
        if name not in KINDS:
            num_bad += file.schema <= SCHEMA
            continue
        try:
            takers[name].append(decoders[name].decode(raw))
        except (msgspec.DecodeError, UnicodeDecodeError):
            num_bad += 1
    heads = [_without_null(Headed, head) for head in recording.headed]
    recording.headed = [head for head in heads if head.stage == 0]
    return num_bad + len(heads) - len(recording.headed)


def _decode_lines(body: bytes, decoder: "_Decoder") -> tuple[list[Any], int]:
    """What the lines say, and how many of them are damaged."""
    has_blank = body.startswith(b"\n") or b"\n\n" in body  # which decode_lines would not mind
    if not has_blank:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            return decoder.decode_lines(body), 0
    found, num_bad = [], 0
    for line in body.split(b"\n"):
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            num_bad += 1
    return found, num_bad


class _ByName:
    """Decodes records whose fields are not ours, as those of another version: by their names. One
    that is not there has its default."""

    def __init__(self, kind: type, fields: list[str]) -> None:
        self._kind = kind
        self._places = {name: fields.index(name) for name in kind._fields if name in fields}

    def decode(self, line: Any) -> Any:
        values = msgspec.json.decode(line, type=list)
        try:
            named = {name: values[place] for name, place in self._places.items()}
            whole = self._kind._field_defaults | named
            return msgspec.convert([whole[name] for name in self._kind._fields], self._kind)
        except LookupError:
            raise msgspec.ValidationError("a field is missing") from None

    def decode_lines(self, body: bytes) -> list[Any]:
        return [self.decode(line) for line in body.split(b"\n") if line]


_Decoder = msgspec.json.Decoder | _ByName


def _decoder_of(kind: type, fields: list[str]) -> _Decoder:
    if list(fields) == list(kind._fields):
        return msgspec.json.Decoder(kind)
    return _ByName(kind, list(fields))


def _nullable(kind: Any) -> Any:
    """The same record, as JSON has it."""
    hints = kind.__annotations__.items()
    fields = [(name, hint | None if name in _NULL_IS else hint) for name, hint in hints]
    stored = NamedTuple(f"_Stored{kind.__name__}", fields)  # type: ignore[misc]
    stored._field_defaults.update(kind._field_defaults)
    return stored


_StoredSpan, _StoredHeaded = _nullable(Span), _nullable(Headed)


def _without_null(kind: type, stored: tuple) -> Any:
    """The record itself."""
    if None in stored:
        pairs = zip(kind._fields, stored, strict=True)
        stored = tuple([_NULL_IS[name] if value is None else value for name, value in pairs])
    return tuple.__new__(kind, stored)


def _note_missing(recording: Recording, names: set[str]) -> None:
    """What a whole recording has, and this one has not."""
    notes, completed = recording.notes, {entry.index for entry in recording.completed}
    if "driver.jsonl" not in names:
        notes.append("driver.jsonl is missing: no requests, plans and results")
    for stage, spans in enumerate(recording.spans):
        if f"stage-{stage}.jsonl" not in names:
            notes.append(f"stage-{stage}.jsonl is missing: nothing is known of stage {stage}")
        elif num_lost := len(completed - {span.index for span in spans}):
            notes.append(f"stage-{stage}.jsonl lacks {num_lost} of {len(completed)} microbatches")
    if not any(recording.spans):
        notes.append("no stage computed anything: the run was empty, or ended before its first")
