"""Causes of idle time planted on real stages: does the ledger find them?

    python bench/planted_causes.py [--repeat 5] [NAME ...]

Each plant runs beside its baseline, on tiny random models with two stages; the table has medians
over the repeats. Delays hold on any machine. What is planted as work (a window too small, uneven
layers, ...) takes a machine with a core for each stage and nothing else to do: on a busy one the
cores that others take are `jitter`, and truly so.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from commands import one_of
from report import plain_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from checkpoints import tiny_llama
from planted_real import (
    LARGE_VOCABULARY,
    PROMPTS,
    ROWS,
    SMALL,
    SMALL_LIMITS,
    SPLITS,
    WAITS,
    WIDE,
    WIDE_LIMITS,
    WORK,
    Scene,
    Stages,
    added,
)

UNEVEN, LARGE = "uneven layers", "a large vocabulary"
NAMES = [*WAITS, *WORK, UNEVEN, LARGE]
Added = dict[str, float]
PATIENT = {"hang_timeout": 5.0, "heartbeat_interval": 20.0}
"""A stage that hangs is killed before it is missed."""


def shared(plants: dict, model: str, limits: dict, repeat: int) -> Iterator[tuple[str, str, Added]]:
    """Plants that need no stages of their own. What kills a stage, has them."""
    with Stages(model, 2, **limits) as stages:
        for _ in range(repeat):
            for name, plant in plants.items():
                before = stages.record(plant.before)
                if plant.planted.killed is None:
                    yield name, plant.cause, added(before, stages.record(plant.planted))
                    continue
                with Stages(model, 2, **limits, restart=False, **PATIENT) as killed:
                    yield name, plant.cause, added(before, killed.record(plant.planted))


def of_two(
    name: str,
    cause: str,
    scene: Scene,
    stages: tuple[Callable[[], Stages], Callable[[], Stages]],
    repeat: int,
) -> Iterator[tuple[str, str, Added]]:
    """The same run on two kinds of stages."""
    before, planted = stages
    with before() as these, planted() as those:
        for _ in range(repeat):
            yield name, cause, added(these.record(scene), those.record(scene))


def all_of(folder: Path, wanted: list[str], repeat: int) -> Iterator[tuple[str, str, Added]]:
    """Name, cause and what was added, of every run."""
    small = tiny_llama(folder / "small", **SMALL)
    wide = tiny_llama(folder / "wide", **WIDE)
    large = tiny_llama(folder / "large", **SMALL, vocab_size=LARGE_VOCABULARY)
    for plants, model, limits in ((WAITS, small, SMALL_LIMITS), (WORK, wide, WIDE_LIMITS)):
        chosen = {name: plant for name, plant in plants.items() if not wanted or name in wanted}
        if chosen:
            yield from shared(chosen, model, limits, repeat)

    def split(name: str) -> Stages:
        return Stages(wide, 2, **WIDE_LIMITS, pipeline_layers=SPLITS[name])

    def vocabulary(model: str) -> Stages:
        return Stages(model, 2, **SMALL_LIMITS, pipeline_layers=(2, 2))

    name = UNEVEN
    if not wanted or name in wanted:
        stages = (lambda: split("even")), (lambda: split("uneven"))
        yield from of_two(name, "stage_imbalance", PROMPTS, stages, repeat)
    name = LARGE
    if not wanted or name in wanted:
        stages = (lambda: vocabulary(small)), (lambda: vocabulary(large))
        yield from of_two(name, "head_and_sampling", ROWS, stages, repeat)


def row(name: str, cause: str, runs: list[Added]) -> list[str]:
    """Of the table: medians over the runs."""
    total_s = median(sum(run.values()) for run in runs)
    shares = {each: median(run[each] / sum(run.values()) for run in runs) for each in runs[0]}
    own = [run[cause] / sum(run.values()) for run in runs]
    other = max((each for each in shares if each != cause), key=lambda each: abs(shares[each]))
    return [
        name,
        f"`{cause}`",
        f"{total_s:.2f} s",
        f"{median(own):.1%} ({min(own):.1%} to {max(own):.1%})",
        f"`{other}` {shares[other]:+.1%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", type=one_of(NAMES), metavar="NAME", help="of plants; all by default"
    )
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Added]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, cause, seconds in all_of(Path(folder), arguments.names, arguments.repeat):
            found.setdefault((name, cause), []).append(seconds)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    header = ["planted", "cause", "added idle", "share on it", "largest other"]
    print(plain_table(header, [row(*key, runs) for key, runs in found.items()]))


if __name__ == "__main__":
    main()
