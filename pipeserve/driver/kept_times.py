"""What the parts of models took on this machine's ranks, and on others that this one has driven:
measured by `--pipeline-layers auto`, kept for runs that do not measure. One small file of JSON in
the cache; one that cannot be read counts as empty, and one that cannot be written is done without.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import pipeserve
from pipeserve.core.work import PartSeconds, Work
from pipeserve.errors import ConfigError
from pipeserve.stages.checkpoint.sources import cache_root

_NAME = "layer-times.json"
_MOST = 1000
"""Entries; the oldest go."""


class Kept(NamedTuple):
    """Of each stage."""

    parts: tuple[PartSeconds, ...]
    measured: str
    """The date of the oldest."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of what: all that times depend on but the rank."""

    model: str
    """The configuration, whole: a checkpoint of the same shape takes the same wherever it lies."""
    run: tuple[str, ...]
    """Types, device, attention, block size."""
    work: Work

    def key(self, device: str, stage: int, num_stages: int) -> str:
        """Of a rank on `device` (`KeeperHello.device`)."""
        ends = stage == 0, stage == num_stages - 1
        whole = (pipeserve.__version__, self.model, self.run, self.work, device, ends)
        return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]


def find_kept(what: Measured, devices: Sequence[str]) -> Kept | None:
    """What was kept for one rank of each stage; None unless all were measured."""
    entries = _read()
    num = len(devices)
    found = [entries.get(what.key(device, i, num)) for i, device in enumerate(devices) if device]
    if not num or len(found) < num or None in found:
        return None
    try:
        parts = tuple(
            PartSeconds(
                tuple(map(float, one["layers"])), float(one["embedding"]), float(one["head"])
            )
            for one in found
        )
        return Kept(parts, min(str(one["measured"]) for one in found))
    except (KeyError, TypeError, ValueError):
        return None


def keep(what: Measured, devices: Sequence[str], parts: Sequence[PartSeconds], name: str) -> None:
    """For later runs; `name` is for people who look into the file."""
    entries = _read()
    for stage, (device, one) in enumerate(zip(devices, parts, strict=True)):
        if device:
            entry = {
                "measured": str(date.today()),
                "model": name,
                "device": device,
                "layers": one.layers,
                "embedding": one.embedding,
                "head": one.head,
            }
            key = what.key(device, stage, len(devices))
            entries.pop(key, None)  # the latest stand at the end
            entries[key] = entry
    with contextlib.suppress(OSError, ConfigError):
        _write(dict(list(entries.items())[-_MOST:]))


def _read() -> dict[str, Any]:
    try:
        entries = json.loads((cache_root() / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(entries: dict[str, Any]) -> None:
    """Whole or not at all, whoever else does so."""
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=_NAME, delete=False, encoding="utf-8"
    ) as file:
        json.dump(entries, file, indent=1)
    os.replace(file.name, folder / _NAME)
