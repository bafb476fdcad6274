"""What `--workload` names: a JSONL file, a trace of lengths, or a built-in distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError
from pipeserve.launch.jsonl import read_objects
from pipeserve.launch.traces import is_trace, read_trace
from pipeserve.profiling.workloads import (
    DISTRIBUTIONS,
    WorkItem,
    draw_lengths,
    poisson_times,
    random_items,
)

_LEAST = 1e-9
"""Of a rate or a scale: what is smaller can only be meant as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What `--workload` names, read before any process starts: requests, or lengths only."""

    name: str
    items: tuple[WorkItem, ...] = ()
    lengths: tuple[tuple[int, int], ...] = ()
    """(prompt tokens, output tokens); the ids are drawn once the vocabulary is known."""
    arrivals_s: tuple[float, ...] = ()
    """Of a trace, parallel to `lengths`; empty where it has none."""
    scale: float = 1.0
    rate: float | None = None
    """Requests a second, as a Poisson process; None: the workload's own arrivals."""
    seed: int = 0

    def with_ids(self, vocab_size: int) -> list[WorkItem]:
        """The requests; the same for the same seed and vocabulary."""
        rng = Random(f"{self.seed}/requests")
        items = self.items or random_items(self.lengths, self.scale, vocab_size, rng)
        times = zip(items, self.arrival_times_s(), strict=True)
        return [replace(item, arrival_s=arrival_s) for item, arrival_s in times]

    def token_lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request. Raises ConfigError for text prompts."""
        if self.lengths:
            return [
                (max(1, int(prompt / self.scale)), max(1, int(output / self.scale)))
                for prompt, output in self.lengths
            ]
        if any(isinstance(item.prompt, str) for item in self.items):
            raise ConfigError(
                f"{self.name} has prompts as text, and without a model there is no tokenizer; "
                "give prompt_token_ids, or a trace of lengths"
            )
        return [(len(item.prompt), item.max_tokens) for item in self.items]

    def arrival_times_s(self) -> Sequence[float]:
        """When each request comes, in the order of `token_lengths()`; the same for every model."""
        num_requests = len(self.items or self.lengths)
        if self.rate is not None:
            return poisson_times(num_requests, self.rate, Random(f"{self.seed}/arrivals"))
        if self.items:
            return [item.arrival_s for item in self.items]
        return self.arrivals_s or [0.0] * num_requests


def read_workload(
    name: str,
    num_prompts: int | None,
    scale: float,
    rate: float | None,
    seed: int,
    default_num: int = 64,
) -> Workload:
    """A built-in distribution by name (`default_num` requests), a JSONL file, or a trace.

    Of a trace with arrivals the first `num_prompts` rows are taken, of one without any. Raises
    ConfigError: unknown name, unreadable file, FILE:LINE of a bad line, a number out of range.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ConfigError(f"--num-prompts is {num_prompts}, must be at least 1")
    for flag, value in (("--scale", scale), ("--rate", rate)):
        if value is not None and not _LEAST < value < float("inf"):
            raise ConfigError(f"{flag} is {value}, must be over {_LEAST:g} and finite")
    shared = {"name": name, "rate": rate, "seed": seed}
    rng = Random(f"{seed}/lengths")
    if name in DISTRIBUTIONS:
        num_prompts = num_prompts or default_num
        lengths = draw_lengths(DISTRIBUTIONS[name], num_prompts, rng)
        return Workload(lengths=tuple(lengths), scale=scale, **shared)
    if is_trace(Path(name)):
        trace = read_trace(Path(name))
        lengths, arrivals_s = trace.lengths, trace.arrivals_s
        count = min(num_prompts or len(lengths), len(lengths))
        lengths = lengths[:count] if arrivals_s else tuple(rng.sample(lengths, count))
        return Workload(lengths=lengths, arrivals_s=arrivals_s[:count], scale=scale, **shared)
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
    line = {key: value for key, value in line.items() if value is not None}
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
