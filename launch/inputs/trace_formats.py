"""How published traces name their columns, and in which unit their times are."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pipeserve.errors import ConfigError

MILLISECOND, NANOSECOND = 1e-3, 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way in which traces are published. Names are compared without case, spaces and `_`."""

    source: str
    prompt: str
    """Column of prompt tokens."""
    output: str
    """Column of output tokens."""
    arrival: str | None = None
    """Column of arrival times; None where the trace has none."""
    unit_s: float | None = None
    """Seconds of one unit of its times; None where they are dates, or where one cannot know."""
    mark: str | None = None
    """A column that only this one has, of several with the same names."""
    priority: str | None = None
    """Column of whole numbers, the lowest to be served first; None where the trace has none."""


FORMATS = (
    Format(
        source="Azure's traces of 2023, 2024 and 2025 (AzurePublicDataset)",
        prompt="ContextTokens",
        output="GeneratedTokens",
        arrival="TIMESTAMP",
    ),
    Format(
        source="BurstGPT, with and without failures (HPMLL/BurstGPT)",
        prompt="Request tokens",
        output="Response tokens",
        arrival="Timestamp",
        unit_s=1,
    ),
    Format(
        source="Bailian's (alibaba-edu/qwen-bailian-usagetraces-anon)",
        prompt="input_length",
        output="output_length",
        arrival="timestamp",
        unit_s=1,
        mark="chat_id",
    ),
    Format(  # also what AIPerf, GuideLLM, SGLang and vLLM (timed_trace) replay, in either unit
        source="Mooncake's (kvcache-ai/Mooncake)",
        prompt="input_length",
        output="output_length",
        arrival="timestamp",
    ),
    Format(
        source="Vidur's and Sarathi-Serve's",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        arrival="arrived_at",
        unit_s=1,
    ),
    Format(  # request_metrics.csv, sequence_metrics.csv: times since the request before
        source="the request metrics that Vidur and Sarathi-Serve write",
        prompt="request_num_prefill_tokens",
        output="request_num_decode_tokens",
        arrival="request_inter_arrival_delay",
        unit_s=1,
    ),
    Format(
        source="Splitwise's simulator",
        prompt="prompt_size",
        output="token_size",
        arrival="arrival_timestamp",
        unit_s=1,
    ),
    Format(
        source="LLMServingSim's",
        prompt="input_toks",
        output="output_toks",
        arrival="arrival_time_ns",
        unit_s=NANOSECOND,
    ),
    Format(
        source="Baseten's completion traces, as CSV or JSON",
        prompt="input_tokens",
        output="output_tokens",
        arrival="timestamp_start_unix_ms",
        unit_s=MILLISECOND,
    ),
    Format(
        source="GuideLLM's data sets",
        prompt="prompt_tokens_count",
        output="output_tokens_count",
    ),
    Format(
        source="logs of OpenAI's API",
        prompt="prompt_tokens",
        output="completion_tokens",
    ),
    Format(
        source="pipeserve's own short form",
        prompt="prefill",
        output="decode",
        arrival="arrival_s",
        unit_s=1,
        priority="priority",
    ),
)
_GAPS = "request_inter_arrival_delay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Of one file, by the names that it uses."""

    prompt: str
    output: str
    arrival: str | None
    unit_s: float | None
    """Of its times; None: dates, or not known."""
    are_gaps: bool
    """Its times are since the row above, not since one moment."""
    priority: str | None = None


def has_lengths(names: Iterable[str]) -> bool:
    """Whether these columns are a trace's."""
    keys = set(map(_key, names))
    return all(keys & _names(role) for role in ("prompt", "output"))


def find_columns(place: str, names: Collection[str | None]) -> Columns:
    """Which of `names` say what, by the names that `FORMATS` has, and never by a part of a name.

    Raises ConfigError, which begins with `place`: none that are known, or several for one thing.
    """
    names = [name for name in names if name]
    prompt, output = _one(place, names, "prompt"), _one(place, names, "output")
    if prompt is None or output is None:
        missing = "prompt" if prompt is None else "output"
        known = ", ".join(dict.fromkeys(getattr(each, missing) for each in FORMATS))
        raise ConfigError(
            f"{place}: no column of {missing} tokens by a known name ({known}); columns here: "
            f"{', '.join(names)[:200] or 'none'}"
        )
    arrival = _one(place, names, "arrival")
    keys = set(map(_key, names))
    unit_s = next((each.unit_s for each in FORMATS if _is_of(each, keys)), None)
    return Columns(
        prompt=prompt,
        output=output,
        arrival=arrival,
        unit_s=unit_s,
        are_gaps=arrival is not None and same_name(arrival, _GAPS),
        priority=_one(place, names, "priority"),
    )


def same_name(one: str, other: str) -> bool:
    """Without case, spaces and `_`."""
    return _key(one) == _key(other)


def _is_of(format: Format, keys: Collection[str]) -> bool:
    wanted = (format.prompt, format.output, format.arrival, format.mark)
    return format.arrival is not None and all(_key(name) in keys for name in wanted if name)


def _one(place: str, names: Iterable[str], role: str) -> str | None:
    found = [name for name in names if _key(name) in _names(role)]
    if len(found) > 1:
        whats = {"arrival": "arrival times", "priority": "priorities"}
        what = whats.get(role, f"{role} tokens")
        raise ConfigError(f"{place}: columns {', '.join(found)} all say {what}; keep one")
    return found[0] if found else None


def _names(role: str) -> set[str]:
    return {_key(name) for each in FORMATS if (name := getattr(each, role))}


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "", name).casefold()
