"""What the time along a critical path went to: seconds by component, as one list of numbers.

An idle interval is the difference of two of them, of the path to its end and that to its beginning;
here such a difference becomes seconds by cause.
"""

from operator import itemgetter, sub

from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.step_parts import (
    ALL_REDUCE,
    BASE,
    CONTEXT,
    DECODES,
    HEAD,
    IMBALANCE,
    JITTER,
    NUM_PARTS,
    PREFILL,
    RANK_WAIT,
)

Vector = list[float]

# Its components: the parts of compute (step_parts.py), what lies between, and two counts of steps.
LINK, FEEDBACK, PLANNING, CONTROL, NO_REQUESTS, FAULT, UNKNOWN = range(NUM_PARTS, NUM_PARTS + 7)
PREFILL_STEPS, STEPS, SIZE = range(NUM_PARTS + 7, NUM_PARTS + 10)

_PLACE = {cause: place for place, cause in enumerate(CAUSES)}
_PLACE_OF = {
    PREFILL: _PLACE["prefill_length"],
    PREFILL_STEPS: _PLACE["prefill_vs_decode"],
    DECODES: _PLACE["decode_count"],
    CONTEXT: _PLACE["context_length"],
    IMBALANCE: _PLACE["stage_imbalance"],
    HEAD: _PLACE["head_and_sampling"],
    ALL_REDUCE: _PLACE["all_reduce"],
    RANK_WAIT: _PLACE["rank_wait"],
    JITTER: _PLACE["jitter"],
    LINK: _PLACE["link"],
    FEEDBACK: _PLACE["token_feedback"],
    PLANNING: _PLACE["planning"],
    CONTROL: _PLACE["control"],
    NO_REQUESTS: _PLACE["no_requests"],
    FAULT: _PLACE["fault"],
    UNKNOWN: _PLACE["unknown"],
}
_COMPONENT_OF = {place: component for component, place in _PLACE_OF.items()}
_by_place = itemgetter(*[_COMPONENT_OF.get(place, SIZE) for place in range(len(CAUSES))])
"""Of a vector with one more component, which is 0: what no component is put down to."""
_FORGETTING = 0.99


def later(vector: Vector, component: int, seconds: float) -> Vector:
    """A copy, `seconds` later for one reason."""
    vector = vector.copy()
    vector[component] += seconds
    return vector


# ---- differences ------------------------------------------------------------------------------
# Their counts become seconds: `STEPS` those of missing steps, `PREFILL_STEPS` those of prefill that
# one path has in more steps than the other.


def step_by_step(difference: Vector, last_parts: Vector) -> Vector:
    """Steps that are missing count as the stage's last one; the rest is how steps differ."""
    num_missing = difference[STEPS]
    if num_missing:
        for part in range(JITTER):
            difference[part] -= num_missing * last_parts[part]
        difference[PREFILL_STEPS] -= num_missing * last_parts[PREFILL_STEPS]
        difference[STEPS] = num_missing * sum(last_parts[:JITTER])
    # Equal for all steps; what is left of it, nothing explains.
    difference[JITTER] += difference[BASE]
    difference[BASE] = 0.0
    if difference[PREFILL] * difference[PREFILL_STEPS] > 0:
        difference[PREFILL_STEPS], difference[PREFILL] = difference[PREFILL], 0.0
    else:
        difference[PREFILL_STEPS] = 0.0
    return difference


def at_an_edge(difference: Vector) -> Vector:
    """Before a stage's first step and behind its last, all steps are missing ones."""
    difference[STEPS] = sum(difference[:NUM_PARTS])
    difference[:NUM_PARTS] = [0.0] * NUM_PARTS
    difference[PREFILL_STEPS] = 0.0
    return difference


def divide(wanted: Vector, seconds: float) -> Vector:
    """An interval by component: what is below 0 is taken off the others in proportion."""
    positive = [value if value > 0 else 0.0 for value in wanted]
    total = sum(positive)
    if not total:  # the records contradict each other
        positive[UNKNOWN] = total = 1.0
    seconds = max(seconds, 0.0)
    return [value / total * seconds for value in positive]  # in this order never infinite


def carry(wanted: Vector, split: Vector) -> Vector:
    """What the next intervals are to make good. Paths of different history (two chains of
    microbatches that take turns) differ to and fro, by what lies long back; so it cancels.

    Steps that a path has too many of cancel nothing: microbatches were not missing because others
    were there before.
    """
    left = [_FORGETTING * value for value in map(sub, wanted, split)]
    if left[STEPS] < 0:
        positive = sum([value for value in left[:STEPS] if value > 0])
        kept = 1 + left[STEPS] / positive if positive > 0 else 0.0
        left[:STEPS] = [value * kept if value > 0 else value for value in left[:STEPS]]
        left[STEPS] = 0.0
    return left


def by_cause(split: Vector, missing: str) -> tuple[float, ...]:
    causes = list(_by_place((*split, 0.0)))
    causes[_PLACE[missing]] += split[STEPS]
    return tuple(causes)
