"""What each rule of the cost model's learning is worth: taken out one at a time.

    python bench/learnt_costs_ablation.py [--seeds 1 2 3] [--only WORD]

Microbatches drawn at random run on the simulator's stages, which differ from the profile by its
residuals; each is predicted, and then observed. Figures: by what share of the truth a prediction
was off on the stage where it was most, median and P90 in %, while it matters. About a minute.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from learnt_cost_cases import CPU, guess_of
from report import plain_table

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost import pipeline_cost, stage_terms, token_curve
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.stage_terms import StageTerms
from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.profiling.simulation.stage_times import ProfiledTimes

A100 = load_profile("nc96ads-a100-v4")
DEVICES = {
    "A100s": (A100, load_shape("falcon-180b"), split_layers(80, 2), 4),
    "CPU": (CPU, load_shape("smollm2-135m"), split_layers(30, 2), 1),
}
LARGEST = {"A100s": (64, 6000, 1500), "CPU": (32, 1500, 500)}
"""Decodes, context of one, tokens of a chunk."""
DEARER = replace(A100.attention, decode_bytes_per_s=A100.attention.decode_bytes_per_s / 4)


class Scene(NamedTuple):
    what: str
    measured: range
    """Microbatches whose errors count."""
    device: str = "A100s"
    has_profile: bool = True
    factor: Callable[[int], float] = lambda index: 1.0
    """Of the second stage's times, by microbatch."""
    hiccups: float = 0.0
    """Share of observations that took twenty times as long."""
    jitter: float = 0.0
    alone: int = 0
    """So many microbatches at first are decodes alone, all much alike; then prompts alone."""
    dearer_from: int = 1 << 60
    """Attention of decodes takes four times as long from this microbatch on."""


SCENES = (
    Scene("A100s, right profile", range(200, 600)),
    Scene("A100s, no profile", range(10, 60), has_profile=False),
    Scene("CPU, no profile", range(60, 600), "CPU", has_profile=False),
    Scene("hiccups", range(100, 600), has_profile=False, hiccups=0.05),
    Scene("a stage 1.5 times slower", range(303, 333), factor=lambda n: 1 + 0.5 * (n >= 300)),
    Scene(
        "30 % slower by and by",
        range(220, 400),
        factor=lambda n: 1 + 0.3 * min(max(n - 200, 0) / 200, 1),
        jitter=0.03,
    ),
    Scene("contexts dearer", range(400, 500), jitter=0.01, dearer_from=300),
    Scene(
        "25 % slower, first prompts after decodes", range(60, 63), factor=lambda n: 1.25, alone=60
    ),
)


class WithoutEven(StageTerms):
    """Tokens cost what the profile's steps have them cost."""

    __slots__ = ()

    def __init__(self, rates: Sequence[float], sizes: Sequence[float], is_guess: bool) -> None:
        super().__init__(rates, (sizes[0], 0.0, *sizes[2:]), is_guess)


WITHOUT: dict[str, tuple[Any, dict[str, Any]]] = {
    "": (stage_terms, {}),
    "terms: a level for each stage": (stage_terms, {"_APART": 0.0, "_APART_IN_A_GUESS": 0.0}),
    "tokens that cost evenly": (pipeline_cost, {"StageTerms": WithoutEven}),
    "what rates have in common": (stage_terms, {"_TOGETHER": 0.0}),
    "sizes": (token_curve, {"_WEIGHT": 0.0}),
    "a level that follows": (stage_terms, {"_LEVEL": 0.0}),
    "a drift of terms": (stage_terms, {"_DRIFT": 0.0}),
    "ignoring hiccups": (stage_terms, {"_BOUND": 1e9}),
    "believing a change": (stage_terms, {"_IN_A_ROW": 1 << 60}),
}
"""What is taken out, and what stands for it."""


@cache
def load(device: str, alone: int, seed: int) -> list[Microbatch]:
    rng, (most, longest, largest) = Random(seed), LARGEST[device]
    made = []
    for index in range(600):
        starts = [rng.randrange(20, longest) for _ in range(rng.randint(1, most))]
        if alone:
            starts = [900 + index] * (rng.randint(8, 12) if index < alone else 0)
        spans = [(start, start + 1) for start in starts]
        if not spans or (not alone and rng.random() < 0.7):
            start = rng.choice((0, rng.randrange(longest // 2)))
            spans.append((start, start + rng.randint(2, largest)))
        chunks = [Chunk(RequestId(n), *span, (), None, 1) for n, span in enumerate(spans)]
        made.append(Microbatch(index, tuple(chunks)))
    return made


def errors(scene: Scene, seed: int) -> list[float]:
    profile, *rest = DEVICES[scene.device]
    times = partial(ProfiledTimes, slowdown=None, seed=seed)
    usual, dearer = times(profile, *rest), times(replace(profile, attention=DEARER), *rest)
    cost = PipelineCost(profile if scene.has_profile else guess_of(profile), *rest)
    rng, off = Random(seed), []
    for each in load(scene.device, scene.alone, seed)[: scene.measured.stop]:
        seconds = (dearer if each.index >= scene.dearer_from else usual).compute_s(each)
        seconds[1] *= scene.factor(each.index)
        predicted = cost.predict(each).seconds
        off.append(max(abs(p / s - 1) for p, s in zip(predicted, seconds, strict=True)))
        for stage, true in enumerate(seconds):
            hiccup = 20.0 if rng.random() < scene.hiccups else 1.0
            cost.observe(each.index, stage, true * hiccup * rng.lognormvariate(0, scene.jitter))
    return [off[index] for index in scene.measured]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="rows that have this in their names")
    given = parser.parse_args()
    rows = []
    for name, (module, values) in WITHOUT.items():
        if given.only not in name and name:
            continue
        assert all(hasattr(module, value) for value in values), name
        row = [name or "everything in"]
        with patch.dict(vars(module), values):
            for scene in SCENES:
                found = np.concatenate([errors(scene, seed) for seed in given.seeds])
                row.append("{:.1f}, {:.1f}".format(*100 * np.quantile(found, (0.5, 0.9))))
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    print(plain_table(["without", *[scene.what for scene in SCENES]], rows))


if __name__ == "__main__":
    main()
