"""What the ranks that share a stage take to add up what they computed, told from the rest.

Stages tell it of each microbatch (`Span.all_reduce_s`), all sums of it together. What a rank waits
for another stays in the rest, for that is what the stage takes.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from pipeserve.core.cost.device import AllReduce
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan
from pipeserve.core.records import Span
from pipeserve.errors import ConfigError
from pipeserve.profiling.calibration.samples import Sample

_LEAST_SEEN = 3
"""Microbatches of a size."""


def without_sums(samples: Sequence[Sample], spans: Iterable[Span]) -> list[Sample]:
    """What stages took besides."""
    sums_s = {(span.stage, span.index): span.all_reduce_s for span in spans}
    return [
        replace(sample, seconds=sample.seconds - sums_s.get((sample.stage, sample.index), 0.0))
        for sample in samples
    ]


def fit_all_reduce(
    spans: Iterable[Span], plan: PipelinePlan, shape: ModelShape, group: int
) -> AllReduce:
    """Of so many ranks: medians by octaves of size. Sizes are the activations', as those of the
    cost model are. Raises ConfigError where none was seen."""
    by_octave: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for span in spans:
        num_sums = plan.stages[span.stage].num_layers * shape.sums_per_layer
        if num_sums and span.all_reduce_s > 0:
            num_bytes = span.num_tokens * shape.hidden_size * shape.bytes_per_value
            octave = span.num_tokens.bit_length()
            by_octave[octave].append((num_bytes, span.all_reduce_s / num_sums))
    points = tuple(
        (round(median(num_bytes for num_bytes, _ in seen)), median(seconds for _, seconds in seen))
        for _, seen in sorted(by_octave.items())
        if len(seen) >= _LEAST_SEEN
    )
    if not points:
        raise ConfigError(
            f"tensor_parallel_size is {group}, and no stage has told what its sums take; calibrate "
            "with --device cpu, where they are timed, or without -tp"
        )
    return AllReduce(group=group, nodes=1, points=points)
