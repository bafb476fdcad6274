"""The pictures of docs/timeline.md: real runs in which one cause was planted, as the report draws
them.

    python bench/timeline_pictures.py [CAUSE ...]

Each is the clearest of several runs on three stages, or on two of two ranks each: the part of it in
which the cause takes most, drawn by report.html in a headless Chromium, with a legend of what can
be seen there. Needs Chromium; better looking on a machine with a core for each rank.
"""

import argparse
import base64
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from checkpoints import tiny_llama
from chromium import PATH, Page
from commands import one_of
from planted_real import (
    FEW,
    LARGE_VOCABULARY,
    PAIRS,
    PROMPTS,
    ROWS,
    SMALL,
    SMALL_LIMITS,
    WIDE,
    WIDE_LIMITS,
    Scene,
    Stages,
    replace,
)

from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.pages.html_report import write_report
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.simulation.simulator import Arrival

FOLDER = Path(__file__).parents[1] / "docs" / "timeline"
RUNS = 8
WIDTH = 1200
SHOWN = 0.012
"""Of the time that is seen: what takes less is left out of the legend."""


@dataclass(frozen=True)
class Picture:
    cause: str
    stages: str
    """Of `stages_of`."""
    scene: Scene
    seconds: float
    """How much of the run is seen."""
    has_tracks: bool = False
    """Whether KV and requests over time are seen too."""
    lost: int | None = None
    """Stage whose file was removed."""


def groups(*sizes: int, num_tokens: int, apart_s: float = 0.05) -> list[Arrival]:
    """Requests that come, and stay, in groups."""
    return [
        Arrival(apart_s * place, 16, num_tokens)
        for place, size in enumerate(sizes)
        for _ in range(size)
    ]


SUMMING = {
    "hidden_size": 2048,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "max_position_embeddings": 4096,
}
"""A model whose ranks have much to add up, and little to compute."""
LONG = [Arrival(0.0, 900, 60)] * 4
SHORT = [Arrival(0.0, 16, 60)] * 8
PICTURES = (
    Picture("fill", "even", PROMPTS, 0.2),
    Picture("drain", "even", PROMPTS, 0.2),
    Picture(
        "no_requests",
        "even",
        replace(PROMPTS, arrivals=[Arrival(0.28 * (n // 3), 256, 1) for n in range(15)]),
        0.9,
    ),
    Picture("too_few_microbatches", "even", replace(PROMPTS, window=1), 0.25),
    Picture(
        "kv_full",
        "even",
        replace(PROMPTS, limits={**PROMPTS.limits, "num_blocks": 17}),
        0.4,
        has_tracks=True,
    ),
    Picture(
        "prefill_length",
        "even",
        replace(PAIRS, arrivals=[Arrival(0.0, length, 1) for length in [64, 64, 1000] * 5]),
        0.8,
    ),
    Picture(
        "prefill_vs_decode",
        "even",
        Scene(
            arrivals=[
                *groups(4, 4, 4, num_tokens=60),
                Arrival(0.3, 1000, 1),
                Arrival(0.8, 1000, 1),
            ],
            policy="hybrid_only",
        ),
        0.45,
    ),
    Picture(
        "context_length",
        "even",
        Scene(arrivals=[*LONG, *SHORT], policy="request_level", limits={"max_num_seqs": 12}),
        0.12,
    ),
    Picture(
        "decode_count",
        "even",
        Scene(arrivals=groups(2, 2, 90, num_tokens=60), policy="hybrid_only"),
        0.14,
    ),
    Picture("stage_imbalance", "uneven", PROMPTS, 0.3),
    Picture("head_and_sampling", "large", ROWS, 0.1),
    Picture("all_reduce", "summing", PROMPTS, 0.3),
    Picture("rank_wait", "shared", replace(PROMPTS, halted=(3, 0.12, 0.4)), 0.6),
    Picture("token_feedback", "small", replace(FEW, feedback_s=0.03), 0.16),
    Picture(
        "planning",
        "even",
        replace(PROMPTS, pauses_s=lambda plan: 0.12 if plan % 8 == 4 else 0.0),
        0.6,
    ),
    Picture("control", "small", replace(FEW, plans_s=0.03), 0.16),
    Picture("link", "small", replace(FEW, link_s={1: 0.03}), 0.16),
    Picture("jitter", "even", replace(PROMPTS, halted=(1, 0.12, 0.4)), 0.6),
    Picture("fault", "killed", replace(PROMPTS, killed=(1, 12, 0.3)), 0.7),
    Picture("unknown", "even", PROMPTS, 0.4, lost=1),
)


def stages_of(folder: Path) -> dict[str, Callable[[], Stages]]:
    """How each kind is started."""
    small = tiny_llama(folder / "small", **{**SMALL, "num_hidden_layers": 12})
    wide = tiny_llama(folder / "wide", **{**WIDE, "num_hidden_layers": 9})
    few = {**SMALL, "num_hidden_layers": 6}
    large = tiny_llama(folder / "large", **few, vocab_size=LARGE_VOCABULARY)
    summing = tiny_llama(folder / "summing", **SUMMING)

    def start(
        model: str, layers: tuple[int, ...], limits: dict, ranks_per_stage: int = 1
    ) -> Callable[[], Stages]:
        return lambda: Stages(
            model,
            len(layers),
            **limits,
            pipeline_layers=layers,
            tensor_parallel_size=ranks_per_stage,
        )

    return {
        "small": start(small, (4, 4, 4), SMALL_LIMITS),
        "even": start(wide, (3, 3, 3), WIDE_LIMITS),
        "uneven": start(wide, (2, 5, 2), WIDE_LIMITS),
        "large": start(large, (2, 2, 2), SMALL_LIMITS),
        "killed": start(wide, (3, 3, 3), WIDE_LIMITS),
        "summing": start(summing, (1, 5), WIDE_LIMITS, 2),
        "shared": start(wide, (4, 5), WIDE_LIMITS, 2),
    }


# ---- which part ---------------------------------------------------------------------------------


def part(ledger: Ledger, picture: Picture) -> tuple[float, float, float]:
    """From, to (seconds of the run) and how much of the time seen the cause takes."""
    bins = max(round(ledger.seconds / picture.seconds * 20), 20)
    by_cause = ledger.over_time(bins).sum(axis=0)
    seen = min(20, bins)
    sums = np.array([by_cause[i : i + seen].sum(axis=0) for i in range(bins - seen + 1)])
    own = sums[:, list(CAUSES).index(picture.cause)]
    others = sums.sum(axis=1) - own
    best = int((own - 2 * others).argmax())
    step_s = ledger.seconds / bins
    from_s = best * step_s
    return from_s, from_s + seen * step_s, float((own - 2 * others)[best])


def clearest(stages: Stages, picture: Picture) -> tuple[Recording, Ledger, float, float]:
    """Of a few runs, and the part of it to look at."""
    found = []
    for _ in range(1 if picture.scene.killed else RUNS):
        recording = stages.record(picture.scene)
        if picture.lost is not None:
            recording.spans[picture.lost].clear()
        ledger = explain(recording)
        from_s, to_s, clearness = part(ledger, picture)
        found.append((clearness, (recording, ledger, from_s, to_s)))
    return max(found, key=lambda each: each[0])[1]


# ---- drawing ------------------------------------------------------------------------------------

_LAY_OUT = Path(__file__).with_suffix(".js").read_text()


def draw(page: Page, path: Path, picture: Picture, from_s: float, to_s: float) -> bytes:
    """The PNG of that part of a report."""
    page.open(path)
    page.settle()
    given = [picture.cause.replace("_", " "), from_s, to_s, SHOWN, picture.has_tracks]
    lay_out = f"({_LAY_OUT})({json.dumps(given)})"
    page.run(lay_out)
    page.settle()
    x, y, width, height = page.run(lay_out)
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    shot = page.call("Page.captureScreenshot", format="png", clip=clip)
    return base64.b64decode(shot["data"])


def draw_all(wanted: list[str]) -> Iterator[tuple[str, int]]:
    """Name and bytes of each."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, Page(WIDTH, 900) as page:
        folder = Path(name)
        for kind, start in stages_of(folder).items():
            chosen = [p for p in PICTURES if p.stages == kind and (not wanted or p.cause in wanted)]
            if not chosen:
                continue
            with start() as stages:
                for picture in chosen:
                    recording, ledger, from_s, to_s = clearest(stages, picture)
                    write_report(folder / "report.html", recording, ledger)
                    png = draw(page, folder / "report.html", picture, from_s, to_s)
                    (FOLDER / f"{picture.cause}.png").write_bytes(png)
                    yield picture.cause, len(png)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "causes",
        nargs="*",
        type=one_of([each.cause for each in PICTURES]),
        metavar="CAUSE",
        help="all by default",
    )
    arguments = parser.parse_args()
    if PATH is None:
        parser.error("there is no chromium, which draws them; install one")
    for cause, num_bytes in draw_all(arguments.causes):
        print(f"{cause}.png: {num_bytes / 1000:.1f} kB")


if __name__ == "__main__":
    main()
