"""Workloads: which prompts, how long, when. Built-in ones draw lengths that fit published traces.

Pure: files are read, and text is tokenised, elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from pipeserve.core.view import Limits
from pipeserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One request of a workload."""

    prompt: str | tuple[int, ...]
    """Text or token ids."""
    max_tokens: int
    """Output tokens, exactly: workloads run with `ignore_eos`."""
    arrival_s: float = 0.0
    """Seconds after the run's start."""
    priority: int = 0
    """`Request.priority`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDistribution:
    """Prompt and output lengths in tokens, as the quantiles of a trace at `_SHARES`.

    The two are drawn independently: in all three traces their rank correlation is under 0.12.
    """

    source: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]


_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

DISTRIBUTIONS = MappingProxyType(
    {
        "sharegpt": LengthDistribution(
            source="microsoft/sarathi-serve @ 72339db, data/processed_traces/"
            "sharegpt_8k_filtered_stats_llama2_tokenizer.csv, 30,731 requests (Apache-2.0)",
            prompt_tokens=(
                1, 12, 29, 74, 382, 777, 1203, 1730, 2401, 3235, 4278, 5696, 6563, 7434, 8141,
            ),
            output_tokens=(2, 6, 44, 84, 181, 271, 346, 415, 493, 581, 683, 834, 920, 998, 1024),
        ),
        "arxiv": LengthDistribution(
            source="microsoft/vidur @ 7d47513, data/processed_traces/"
            "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv, 28,257 requests (MIT)",
            prompt_tokens=(
                1, 73, 749, 1242, 1802, 2150, 2453, 2730, 2996, 3249, 3490, 3702, 3813, 3933, 4054,
            ),
            output_tokens=(5, 36, 60, 78, 104, 125, 145, 167, 192, 222, 268, 372, 736, 3271, 4056),
        ),
        "azure-conv": LengthDistribution(
            source="Azure/AzurePublicDataset @ b469a11, data/AzureLLMInferenceTrace_conv.csv, "
            "19,366 requests (CC-BY 4.0; Splitwise, ISCA 2024)",
            prompt_tokens=(
                2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 14050,
            ),
            output_tokens=(7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000),
        ),
    }
)  # fmt: skip


def draw_lengths(
    distribution: LengthDistribution, num_requests: int, rng: Random
) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request: the inverse of the quantiles, linear between
    them, at uniform draws."""
    return [
        (
            _at(distribution.prompt_tokens, rng.random()),
            _at(distribution.output_tokens, rng.random()),
        )
        for _ in range(num_requests)
    ]


def random_items(
    lengths: Sequence[tuple[int, int]], scale: float, vocab_size: int, rng: Random
) -> list[WorkItem]:
    """Requests of these lengths, each divided by `scale` (1 token at least), of random ids."""
    return [
        WorkItem(
            prompt=tuple(rng.randrange(vocab_size) for _ in range(max(1, int(num_prompt / scale)))),
            max_tokens=max(1, int(num_output / scale)),
        )
        for num_prompt, num_output in lengths
    ]


def poisson_times(num_requests: int, rate: float, rng: Random, burst: int = 1) -> list[float]:
    """Seconds at which requests arrive, the first at 0: a Poisson process of `rate` a second, or of
    bursts of so many at once, of as many requests a second."""
    now, times = 0.0, []
    for number in range(num_requests):
        if number and number % burst == 0:
            now += rng.expovariate(rate / burst)
        times.append(now)
    return times


def check_within_context(
    lengths: Sequence[tuple[int, int]], max_model_len: int, scale: float | None
) -> None:
    """Raise ConfigError for the first request without a prompt or longer than the context.

    `lengths`: prompt and output tokens of all, divided by `scale` already; None: they are prompts,
    which are as long as they are.
    """
    for index, (num_prompt, _) in enumerate(lengths):
        if num_prompt == 0:
            raise ConfigError(
                f"request {index} of the workload has an empty prompt; give it a token"
            )
    _check_room(lengths, max_model_len, f"the context holds {max_model_len}", scale)


def check_within_limits(
    lengths: Sequence[tuple[int, int]], limits: Limits, scale: float | None
) -> None:
    """Likewise, and for one that the KV cache cannot hold. (The last token's KV is never
    computed.)"""
    check_within_context(lengths, limits.max_model_len, scale)
    num_slots = limits.num_blocks * limits.block_size
    room = f"the KV cache has room for {num_slots}"
    _check_room(lengths, num_slots + 1, room, scale, ", or give the KV cache more memory")


def _check_room(
    lengths: Sequence[tuple[int, int]], most: int, room: str, scale: float | None, more: str = ""
) -> None:
    """What it proposes suits all requests, not only the first that is too long."""
    over = [index for index, pair in enumerate(lengths) if sum(pair) > most]
    if not over:
        return
    num_prompt, num_output = lengths[over[0]]
    remedy = "shorten it, or use"
    if scale is not None:
        longest = max(map(sum, lengths))
        # Dividing has cut off less than a token of each of the two.
        wanted = scale * (longest if scale == 1 else longest + 2) / most
        remedy = f"use --scale {math.ceil(wanted)} or"
    raise ConfigError(
        f"request {over[0]} of the workload has {num_prompt} + {num_output} tokens, {room}; "
        f"{remedy} another workload{more}"
    )


def _at(quantiles: Sequence[int], share: float) -> int:
    right = next(place for place, known in enumerate(_SHARES) if known > share)
    left = right - 1
    part = (share - _SHARES[left]) / (_SHARES[right] - _SHARES[left])
    return round(quantiles[left] + part * (quantiles[right] - quantiles[left]))
