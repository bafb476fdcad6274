"""The layers of each stage as users write them: a list of ours, or Megatron-LM's layout string.

A layout (`--pipeline-model-parallel-layout` there) names what each stage holds: E the embedding, t
a decoder layer, L the loss, which is our head; | ends a stage, *N repeats a letter or what stands
in parentheses, commas are for the reader. `Et*16|t*14L` is 16,14.
"""

import re
from collections.abc import Sequence

from pipeserve.errors import ConfigError

AUTO = "auto"
FORMS = "whole numbers, such as 16,14, a layout such as 'Et*16|t*14L', or auto"
_MOST_LETTERS = 10_000
_SHOWN = 80
_LETTERS = {"E": "the embedding", "t": "a layer", "L": "the head"}


def parse_layers(layers: object) -> object:
    """ "16,14", [16, 14] or a layout as (16, 14), "auto" as it is; what is none of these is left
    for RunConfig to refuse. Raises ConfigError for a layout that cannot be."""
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        return tuple(layers)
    if not isinstance(layers, str):
        return layers
    text = "".join(layers.split()).strip("'\"")  # as scripts pass it on
    parts = text.split(",")
    if all(map(str.isdecimal, parts)):
        return tuple(map(int, parts))
    return parse_layout(text) if re.search(r"[EtL|*()]", text) and text != AUTO else text


def parse_layout(text: str) -> tuple[int, ...]:
    """Decoder layers of each stage. Raises ConfigError."""
    stages = _unrolled(text.replace(",", ""), text).split("|")
    for letter in "".join(stages):
        if letter == "m":
            _refuse(text, "it has m, layers of multi-token prediction, which nothing here computes")
        if letter not in _LETTERS:
            known = ", ".join(f"{letter} {what}" for letter, what in _LETTERS.items())
            _refuse(text, f"it has {letter!r}; known are {known}, | and *N")
    order = "".join(stages)
    if order.count("E") != 1 or not order.startswith("E"):
        _refuse(text, "it has to begin with E, the embedding, and have no other")
    if order.count("L") != 1 or not order.endswith("L"):
        _refuse(text, "it has to end with L, the head, and have no other")
    if "E" not in stages[0] or "L" not in stages[-1]:
        _refuse(text, "E has to be in the first stage and L in the last")
    return tuple(stage.count("t") for stage in stages)


def _unrolled(text: str, written: str) -> str:
    """Without repetitions: first those of parentheses, which do not nest, then of a letter."""
    for pattern in (r"\(([^()]*)\)\*(\d{1,9})", r"([^*()])\*(\d{1,9})"):
        num = sum(len(part) * int(times) for part, times in re.findall(pattern, text))
        if num > _MOST_LETTERS:
            _refuse(written, f"it has over {_MOST_LETTERS} letters")
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    if re.search(r"[*()]", text):
        _refuse(
            written, "*N has to follow a letter or (...), and parentheses have no others inside"
        )
    return text


def _refuse(text: str, why: str) -> None:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    raise ConfigError(f"the layout {shown!r} cannot be read: {why}; give one such as 'Et*16|t*14L'")
