"""What `--workload` names: prompts, conversations, a trace, or a built-in distribution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from pipeserve.configs.recipes import check_keys
from pipeserve.errors import ConfigError
from pipeserve.frontend.params import check_priority
from pipeserve.launch.inputs.conversations import (
    Conversation,
    conversations_of,
    is_conversation,
    requests_of,
)
from pipeserve.launch.inputs.rows import Row, read_rows
from pipeserve.launch.inputs.trace_formats import has_lengths
from pipeserve.launch.inputs.traces import starting_again, trace_of
from pipeserve.profiling.simulation.workloads import (
    DISTRIBUTIONS,
    WorkItem,
    draw_lengths,
    poisson_times,
    random_items,
)

_LEAST = 1e-9
"""Of a rate or a scale: what is smaller can only be meant as 0."""

_MOST_ARRIVAL_S = 1e9
"""What is larger can only be meant as seconds since 1970, and be waited for in vain."""
_MOST_REQUESTS = 10_000_000
"""They are all made before the first runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What `--workload` names, read before any process starts: requests, or lengths only."""

    name: str
    items: tuple[WorkItem, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    """How long their answers were, a tokenizer says."""
    num_wanted: int | None = None
    """Of the conversations; None: all."""
    lengths: tuple[tuple[int, int], ...] = ()
    """(prompt tokens, output tokens); the ids are drawn once the vocabulary is known."""
    arrivals_s: tuple[float, ...] = ()
    """Of a trace, parallel to `lengths`; empty where it has none."""
    priorities: tuple[int, ...] = ()
    """Likewise."""
    scale: float = 1.0
    rate: float | None = None
    """Requests a second, as a Poisson process, `inf` for all at once; None: the workload's own
    arrivals."""
    burst: int = 1
    """So many come together at each event of that process."""
    seed: int = 0
    notes: tuple[str, ...] = ()
    """What a reader of the result has to know."""

    @property
    def length_scale(self) -> float | None:
        """What lengths are divided by; None: it holds prompts, which are as long as they are."""
        return self.scale if self.lengths else None

    def tokenized(self, encode: Callable[[str], Sequence[int]] | None) -> "Workload":
        """With ids in place of text. Raises ConfigError: text, and no tokenizer to `encode` it; no
        conversation within the limits."""
        if encode is None:
            self.token_lengths()  # raises for text
            return self
        if self.conversations:
            return self._sampled(encode)
        items = (
            replace(item, prompt=tuple(encode(item.prompt)))
            if isinstance(item.prompt, str)
            else item
            for item in self.items
        )
        return replace(self, items=tuple(items))

    def _sampled(self, encode: Callable[[str], Sequence[int]]) -> "Workload":
        items, num_left_out = requests_of(self.conversations, self.num_wanted, encode)
        if not items:
            raise ConfigError(
                f"{self.name}: none of {num_left_out:,} conversations has 4 to 1,024 prompt tokens "
                "and an answer of 4 or more, 2,048 together; give longer or shorter ones"
            )
        notes = list(self.notes)
        if num_left_out:
            notes.append(
                "left out, under 4 tokens, over 1,024 of prompt or over 2,048 in all, as vLLM's "
                f"benchmark does: {num_left_out:,} of {num_left_out + len(items):,} conversations"
            )
        items, note = _repeated(self.name, items, self.num_wanted)
        return replace(self, items=tuple(items), conversations=(), notes=(*notes, *note))

    def with_ids(self, vocab_size: int) -> list[WorkItem]:
        """The requests; the same for the same seed and vocabulary."""
        rng = Random(f"{self.seed}/requests")
        items = self.items or random_items(self.lengths, self.scale, vocab_size, rng)
        parts = zip(items, self.arrival_times_s(), self.request_priorities(), strict=True)
        return [replace(item, arrival_s=at_s, priority=each) for item, at_s, each in parts]

    def token_lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request. Raises ConfigError for text prompts."""
        if self.lengths:
            return [
                (max(1, int(prompt / self.scale)), max(1, int(output / self.scale)))
                for prompt, output in self.lengths
            ]
        if self.conversations or any(isinstance(item.prompt, str) for item in self.items):
            raise ConfigError(
                f"{self.name} has prompts as text, and without a model there is no tokenizer; "
                "give prompt_token_ids, or a trace of lengths"
            )
        return [(len(item.prompt), item.max_tokens) for item in self.items]

    def arrival_times_s(self) -> Sequence[float]:
        """When each request comes, in the order of `token_lengths()`; the same for every model."""
        num_requests = len(self.items or self.lengths)
        if self.rate is not None:
            rng = Random(f"{self.seed}/arrivals")
            return poisson_times(num_requests, self.rate, rng, self.burst)
        if self.items:
            return [item.arrival_s for item in self.items]
        return self.arrivals_s or [0.0] * num_requests

    def request_priorities(self) -> Sequence[int]:
        """Of each request, in the order of `token_lengths()`; 0 where the workload names none."""
        if self.items:
            return [item.priority for item in self.items]
        return self.priorities or [0] * len(self.lengths)


def read_workload(
    name: str,
    num_prompts: int | None,
    scale: float,
    rate: float | None,
    seed: int,
    default_num: int = 64,
    unit_s: float | None = None,
    timed: bool = True,
    burst: int = 1,
) -> Workload:
    """A built-in distribution by name (`default_num` requests), or a file: prompts, conversations
    or a trace, whose times are in units of `unit_s` seconds, or in what its format says. Without
    `timed`, or with a `rate`, they are of no account.

    Of prompts and of a trace with arrivals the first `num_prompts` are taken, of the others any;
    where there are fewer, they begin again, and a note says so. Raises ConfigError: unknown name,
    unreadable file, the place of a bad row, a number out of range.
    """
    if num_prompts is not None and not 1 <= num_prompts <= _MOST_REQUESTS:
        raise ConfigError(f"--num-prompts is {num_prompts}, must be 1 to {_MOST_REQUESTS:,}")
    if not _LEAST < scale < float("inf"):
        raise ConfigError(f"--scale is {scale}, must be over {_LEAST:g} and finite")
    if rate is not None and not rate > _LEAST:
        raise ConfigError(f"--rate is {rate}, must be over {_LEAST:g}, or inf for all at once")
    if burst != 1 and (rate is None or burst < 1):
        raise ConfigError(
            f"--burst is {burst}: give how many requests come together, and --rate beside it"
        )
    if unit_s is not None and not 0 < unit_s < float("inf"):
        raise ConfigError(
            f"--timed-trace-sec-multiplier is {unit_s}, must be over 0 and finite: the seconds of "
            "one unit"
        )
    shared = {"name": name, "rate": rate, "burst": burst, "seed": seed}
    rng = Random(f"{seed}/lengths")
    if name in DISTRIBUTIONS:
        _check_no_unit(name, unit_s)
        num_prompts = num_prompts or default_num
        lengths = draw_lengths(DISTRIBUTIONS[name], num_prompts, rng)
        return Workload(lengths=tuple(lengths), scale=scale, **shared)
    if not Path(name).exists():
        known = ", ".join(DISTRIBUTIONS)
        raise ConfigError(
            f"no workload {name!r}; give a file of prompts, a trace, or one of {known}"
        )
    rows = read_rows(Path(name))
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{name}: no rows; give a trace, or one JSON object a line")
    rows = chain([first], rows)
    if has_lengths(first.values) or not first.is_json:
        trace = trace_of(Path(name), rows, num_prompts, unit_s)
        arrivals_s = trace.arrivals_s
        chosen = range(len(trace.lengths))
        if arrivals_s:
            arrivals_s = tuple(starting_again(arrivals_s, num_prompts or len(chosen)))
        else:
            chosen = rng.sample(chosen, min(num_prompts or len(chosen), len(chosen)))
        chosen, note = _repeated(name, chosen, num_prompts)
        return Workload(
            lengths=tuple(trace.lengths[row] for row in chosen),
            arrivals_s=arrivals_s,
            priorities=tuple(trace.priorities[row] for row in chosen if trace.priorities),
            notes=trace.notes + (trace.time_notes if timed and rate is None else ()) + note,
            scale=scale,
            **shared,
        )
    _check_no_unit(name, unit_s)
    if scale != 1:
        raise ConfigError(
            f"--scale is {scale}, but {name} holds prompts, not lengths; leave it out"
        )
    if is_conversation(first.values):
        conversations, num_left_out = conversations_of(rows)
        if not conversations:
            raise ConfigError(f"{name}: no conversation has two turns of text; give others")
        rng.shuffle(conversations)
        num_all = num_left_out + len(conversations)
        note = f"left out, without two turns of text: {num_left_out:,} of {num_all:,} conversations"
        return Workload(
            conversations=tuple(conversations),
            num_wanted=num_prompts,
            notes=(note,) if num_left_out else (),
            **shared,
        )
    items = list(islice(map(_read_item, rows), num_prompts))
    times = starting_again([item.arrival_s for item in items], num_prompts or len(items))
    items, notes = _repeated(name, items, num_prompts)
    items = [replace(item, arrival_s=time_s) for item, time_s in zip(items, times, strict=True)]
    return Workload(items=tuple(items), notes=notes, **shared)


def _repeated(
    name: str, found: Sequence[Any], num_wanted: int | None
) -> tuple[list[Any], tuple[str, ...]]:
    """As many as are wanted, from the first again where there are fewer, as vLLM's benchmark fills
    up; and the note that says so."""
    if num_wanted is None or len(found) >= num_wanted:
        return list(found), ()
    note = f"{name} begins again: it has {len(found):,} of {num_wanted:,} requests"
    return list(islice(cycle(found), num_wanted)), (note,)


def _check_no_unit(name: str, unit_s: float | None) -> None:
    if unit_s is not None:
        raise ConfigError(
            f"--timed-trace-sec-multiplier is for a trace's times, and {name} is no trace; leave "
            "it out"
        )


def _read_item(row: Row) -> WorkItem:
    try:
        return _parse_item(dict(row.values))
    except ConfigError as error:
        raise ConfigError(f"{row.place}: {error}") from None


def _parse_item(line: dict[str, Any]) -> WorkItem:
    if "output_tokens" in line and "max_tokens" not in line:  # so in vLLM's custom data sets
        line["max_tokens"] = line.pop("output_tokens")
    check_keys(line, ["prompt", "prompt_token_ids", "max_tokens", "arrival_s", "priority"])
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
    if type(arrival_s) not in (int, float) or not 0 <= arrival_s < _MOST_ARRIVAL_S:
        raise ConfigError(
            f"arrival_s is {arrival_s!r}, must be seconds after the run's start, of 0 or more and "
            f"under {_MOST_ARRIVAL_S:,.0f}; take the first one's off each where they are dates"
        )
    return WorkItem(
        prompt=prompt if is_text else tuple(ids),
        max_tokens=max_tokens,
        arrival_s=arrival_s,
        priority=check_priority(line.get("priority", 0)),
    )
