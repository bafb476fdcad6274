"""How many tokens a request took."""

from collections.abc import Iterable
from typing import Any

from pipeserve.frontend.completion import Delta


class Usage:
    """Counted as deltas come; a prompt counts once, however many samples it has."""

    def __init__(self, prompts: Iterable[tuple[int, ...]]) -> None:
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_output_tokens = 0
        self.num_cached_tokens = 0

    def count(self, delta: Delta, has_output: bool = True) -> None:
        if has_output:
            self.num_output_tokens += len(delta.token_ids)
        if delta.sample == 0:
            self.num_cached_tokens += delta.num_cached

    def told(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def wants_usage(body: Any) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each event has it."""
    options = body.stream_options
    if options is None:
        return False, False
    told = bool(options.include_usage)
    return told, told and bool(options.continuous_usage_stats)
