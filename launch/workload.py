"""What `--workload` names: a JSONL file, a CSV trace of lengths, or a built-in distribution."""

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError
from pipeserve.launch.jsonl import read_objects
from pipeserve.profiling.workloads import (
    DISTRIBUTIONS,
    WorkItem,
    draw_lengths,
    random_items,
    with_poisson_arrivals,
)

_DEFAULT_NUM_PROMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What `--workload` names, read before any process starts: requests, or lengths only."""

    name: str
    items: tuple[WorkItem, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()
    """(prompt tokens, output tokens); the ids are drawn once the vocabulary is known."""
    scale: float = 1.0
    rate: float | None = None
    """Requests a second, as a Poisson process; None: the items' own arrivals."""
    seed: int = 0

    def with_ids(self, vocab_size: int) -> list[WorkItem]:
        """The requests; the same for the same seed and vocabulary."""
        rng = Random(f"{self.seed}/requests")
        items = list(self.items) or random_items(self.lengths, self.scale, vocab_size, rng)
        return items if self.rate is None else with_poisson_arrivals(items, self.rate, rng)


def read_workload(
    name: str, num_prompts: int | None, scale: float, rate: float | None, seed: int
) -> Workload:
    """A built-in distribution by name, a JSONL file, or a CSV[.gz] trace of lengths.

    Raises ConfigError: unknown name, unreadable file, FILE:LINE of a bad line, a number out of
    range.
    """
    for flag, value in (("--num-prompts", num_prompts), ("--scale", scale), ("--rate", rate)):
        if value is not None and value <= 0:
            raise ConfigError(f"{flag} is {value}, must be over 0")
    shared = {"name": name, "rate": rate, "seed": seed}
    rng = Random(f"{seed}/lengths")
    if name in DISTRIBUTIONS:
        num_prompts = num_prompts or _DEFAULT_NUM_PROMPTS
        lengths = draw_lengths(DISTRIBUTIONS[name], num_prompts, rng)
        return Workload(lengths=tuple(lengths), scale=scale, **shared)
    if name.endswith((".csv", ".csv.gz")):
        lengths = _read_trace(Path(name))
        lengths = rng.sample(lengths, min(num_prompts or len(lengths), len(lengths)))
        return Workload(lengths=tuple(lengths), scale=scale, **shared)
    if not Path(name).exists():
        known = ", ".join(DISTRIBUTIONS)
        raise ConfigError(
            f"no workload {name!r}; give a JSONL file, a CSV trace, or one of {known}"
        )
    if scale != 1:
        raise ConfigError(
            f"--scale is {scale}, but {name} holds prompts, not lengths; leave it out"
        )
    return Workload(items=tuple(_read_items(Path(name))[:num_prompts]), **shared)


def _read_items(path: Path) -> list[WorkItem]:
    items = []
    for number, line in read_objects(path):
        try:
            items.append(_parse_item(line))
        except ConfigError as error:
            raise ConfigError(f"{path}:{number + 1}: {error}") from None
    return items


def _parse_item(line: dict[str, Any]) -> WorkItem:
    check_keys(line, ["prompt", "prompt_token_ids", "max_tokens", "arrival_s"])
    prompt, ids = line.get("prompt"), line.get("prompt_token_ids")
    if (prompt is None) == (ids is None):
        raise ConfigError("a line has one of prompt and prompt_token_ids")
    is_text = ids is None and isinstance(prompt, str)
    is_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not (is_text or is_ids):
        raise ConfigError("prompt must be text, prompt_token_ids a list of whole numbers")
    max_tokens, arrival_s = line.get("max_tokens"), line.get("arrival_s", 0.0)
    if type(max_tokens) is not int or max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens!r}, must be a whole number of 1 or more")
    if type(arrival_s) not in (int, float) or not 0 <= arrival_s < float("inf"):
        raise ConfigError(f"arrival_s is {arrival_s!r}, must be seconds of 0 or more")
    return WorkItem(
        prompt=prompt if is_text else tuple(ids), max_tokens=max_tokens, arrival_s=arrival_s
    )


def _read_trace(path: Path) -> list[tuple[int, int]]:
    """The lengths of a trace whose columns are named prefill or context, decode or generated."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {reason}; give a readable CSV file") from None
    columns = list(rows[0]) if rows else []
    prompt = next((c for c in columns if "prefill" in c.lower() or "context" in c.lower()), None)
    output = next((c for c in columns if "decode" in c.lower() or "generated" in c.lower()), None)
    if prompt is None or output is None:
        raise ConfigError(
            f"{path}: no rows with a prefill (or context) and a decode (or generated) column"
        )
    try:
        return [(int(float(row[prompt])), int(float(row[output]))) for row in rows]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a length is no number: {error}") from None
