"""Where to cut a model's layers: the contiguous cut whose slowest stage is fastest, within the
memory that there is. Exact, by dynamic programming over the stages; stages may be unequal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

_SAME = 1e-9
"""Sums of the same numbers in another order differ by less, as a share."""


@dataclass(frozen=True, slots=True)
class StageParts:
    """What one stage's device would take: each layer of the model, were it there, and all else."""

    layer_s: tuple[float, ...]
    """Seconds, in any unit that is the same for all stages."""
    other_s: float = 0.0
    """Embedding, head, and what a microbatch costs a stage whatever its layers."""
    layer_bytes: tuple[int, ...] = ()
    """Weights and KV; () is none."""
    other_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that stages take from."""

    num_bytes: int
    stages: tuple[int, ...]


class _Label(NamedTuple):
    """A cut of the first layers into the first stages."""

    merit: float
    """The smaller, the better."""
    used: tuple[int, ...]
    """Bytes of each room that a later stage takes from, too; 0 of the others."""
    counts: tuple[int, ...]


def best_cut(stages: Sequence[StageParts], rooms: Sequence[Room] = ()) -> tuple[int, ...] | None:
    """Layers of each stage, at least one; None where no cut fits the rooms.

    Of the cuts whose slowest stage is as fast as any allows, the one whose others come closest to
    it: few stages are then the slowest, whatever the next microbatch is. Among equals the earlier
    stage has more, so that the last one, which also samples, has the fewest.
    """
    tight = [room for room in rooms if _most_bytes(stages, room) > room.num_bytes]
    fastest = _search(stages, tight, max, inf)
    if fastest is None:
        return None
    most_s = fastest.merit

    def spare(merit: float, seconds: float) -> float:
        return merit + (most_s - seconds) ** 2

    return _search(stages, tight, spare, most_s * (1 + _SAME)).counts


def stage_seconds(stages: Sequence[StageParts], counts: Sequence[int]) -> list[float]:
    """Of each stage with so many layers."""
    found, first = [], 0
    for stage, count in zip(stages, counts, strict=True):
        found.append(stage.other_s + sum(stage.layer_s[first : first + count]))
        first += count
    return found


def _most_bytes(stages: Sequence[StageParts], room: Room) -> int:
    """More than this its stages take in no cut."""
    takers = [stages[number] for number in room.stages]
    layers = zip(*(taker.layer_bytes for taker in takers), strict=True)
    return sum(taker.other_bytes for taker in takers) + sum(map(max, layers))


def _search(
    stages: Sequence[StageParts],
    rooms: Sequence[Room],
    join: Callable[[float, float], float],
    most_s: float,
) -> _Label | None:
    """The cut of least merit in which no stage takes more than `most_s`. `join` makes the merit of
    the stages up to one of that before it and the one's seconds."""
    num_layers = len(stages[0].layer_s)
    reached = {0: [_Label(0.0, (0,) * len(rooms), ())]}
    for number, stage in enumerate(stages):
        num_left = len(stages) - number - 1
        layer_bytes = stage.layer_bytes or (0,) * num_layers
        following: dict[int, list[_Label]] = {}
        for start, labels in reached.items():
            seconds, num_bytes = stage.other_s, stage.other_bytes
            for stop in range(start + 1, num_layers - num_left + 1):
                seconds += stage.layer_s[stop - 1]
                num_bytes += layer_bytes[stop - 1]
                if seconds > most_s:
                    break
                if num_left or stop == num_layers:
                    here = following.setdefault(stop, [])
                    for label in labels:
                        used = _used_with(label.used, number, num_bytes, rooms)
                        if used is not None:
                            merit = join(label.merit, seconds)
                            here.append(_Label(merit, used, (*label.counts, stop - start)))
        reached = {stop: _not_worse(labels) for stop, labels in following.items()}
    return min(reached.get(num_layers, ()), key=lambda label: label.merit, default=None)


def _used_with(
    used: tuple[int, ...], number: int, num_bytes: int, rooms: Sequence[Room]
) -> tuple[int, ...] | None:
    """With those of a stage; None where they do not fit."""
    after = []
    for before, room in zip(used, rooms, strict=True):
        now = before + num_bytes if number in room.stages else before
        if now > room.num_bytes:
            return None
        after.append(now if number < max(room.stages) else 0)
    return tuple(after)


def _not_worse(labels: list[_Label]) -> list[_Label]:
    """Without those that another one is as good as, in merit and in every room."""
    kept: list[_Label] = []
    # By merit; where that is the same, more layers on the earlier stage first.
    for label in sorted(labels, key=lambda each: each.merit):
        same = [each for each in kept if each.used == label.used]
        if same and label.merit <= same[0].merit * (1 + _SAME):
            if label.counts > same[0].counts:
                kept[kept.index(same[0])] = label
        elif not any(_fits_as_well(each.used, label.used) for each in kept):
            kept.append(label)
    return kept


def _fits_as_well(used: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(one <= another for one, another in zip(used, other, strict=True))
