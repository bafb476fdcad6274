"""Chats as they are published (ShareGPT): a prompt, and how long its answer was.

As vLLM's and SGLang's benchmarks do: the first two turns of each conversation, the second for its
length alone, and only where both are 4 tokens or more, the prompt at most 1,024 and both together
at most 2,048 (`is_valid_sequence` in vLLM's vllm/benchmarks/datasets/utils.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipeserve.launch.inputs.rows import Row
from pipeserve.profiling.simulation.workloads import WorkItem

_LEAST_TOKENS = 4
_MOST_PROMPT_TOKENS = 1024
_MOST_TOKENS = 2048


class Conversation(NamedTuple):
    """Its first two turns."""

    prompt: str
    answer: str


def is_conversation(values: Mapping[str, Any]) -> bool:
    return "conversations" in values


def conversations_of(rows: Iterable[Row]) -> tuple[list[Conversation], int]:
    """Those with two turns of text, and how many have not."""
    found, num_left_out = [], 0
    for row in rows:
        turns = row.values.get("conversations")
        texts = [_text(turn) for turn in turns[:2]] if isinstance(turns, list) else []
        if len(texts) == 2 and None not in texts:
            found.append(Conversation(*texts))
        else:
            num_left_out += 1
    return found, num_left_out


def _text(turn: Any) -> str | None:
    """ShareGPT's turns have `value`, those of SGLang's custom data sets `content`."""
    if not isinstance(turn, dict):
        return None
    text = turn.get("value", turn.get("content"))
    return text if isinstance(text, str) else None


def requests_of(
    conversations: Iterable[Conversation],
    num_wanted: int | None,
    encode: Callable[[str], Sequence[int]],
) -> tuple[list[WorkItem], int]:
    """The first `num_wanted` whose lengths are within the limits, and how many were not."""
    items, num_left_out = [], 0
    for conversation in conversations:
        if len(items) == num_wanted:
            break
        prompt, num_output = tuple(encode(conversation.prompt)), len(encode(conversation.answer))
        if _is_within(len(prompt), num_output):
            items.append(WorkItem(prompt=prompt, max_tokens=num_output))
        else:
            num_left_out += 1
    return items, num_left_out


def _is_within(num_prompt: int, num_output: int) -> bool:
    return (
        min(num_prompt, num_output) >= _LEAST_TOKENS
        and num_prompt <= _MOST_PROMPT_TOKENS
        and num_prompt + num_output <= _MOST_TOKENS
    )
