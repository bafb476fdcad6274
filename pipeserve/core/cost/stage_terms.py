"""What one stage takes for each term of a microbatch's cost, learnt from what it observes. Pure.

A Kalman filter (recursive least squares with a prior and a drift: Haykin, "Adaptive Filter Theory",
chapter 14). An observation is the sum of the terms, so it moves the rates of those that were large
in it, and all of them together: that a stage as a whole is slow is likelier than that its terms
changed apart. A term that is not seen for long stays as it was. Errors are shares of the
prediction, for noise grows with what is timed.
"""

from collections.abc import Sequence
from operator import ge, mul

_TOGETHER, _APART = 0.5, 0.2
"""How far rates may be off before anything was observed, as a share (standard deviation): all of
them alike, and each for itself, where a profile of the device was measured."""
_APART_IN_A_GUESS = 1.0
"""Where it was not."""
_LEVEL = 0.1
"""How far the stage's level follows what the terms leave over of the latest observation."""
_DRIFT = 0.01
"""Of each rate's own variance, as a share of the noise's, from one observation to the next."""
_NOISE, _LEAST_NOISE, _MOST_NOISE = 0.1, 0.01, 0.3
"""Standard deviation of an observation, as a share: at first, at least (what never varied would let
nothing else be believed) and at most (or nothing would be too far off)."""
_NOISE_WEIGHT = 0.1
"""Of the latest observation in it."""
_BOUND = 3.0
"""Standard deviations; what lies further out is not learnt from."""
_IN_A_ROW = 3
"""Of those, on the same side, are no hiccups: the stage has become another one."""
_LEAST = 0.02
"""Of a term's first rate, or more work might cost no more."""
_FURTHEST = 1e6
"""Times as long as thought at first, or as short: what is further off says nothing of the stage."""


class StageTerms:
    """Of one stage. `rates` times the terms are what a microbatch takes."""

    __slots__ = (
        "_deviations",
        "_far",
        "_is_guess",
        "_leasts",
        "_level",
        "_nearest",
        "_spread",
        "_times",
        "_variance",
        "rates",
    )

    def __init__(self, rates: Sequence[float], sizes: Sequence[float], is_guess: bool) -> None:
        """`rates`: what is thought of the seven of them (`PipelineCost._first` lists them); of a
        guess, how they stand to each other. `sizes`: as large as each may well be."""
        self.rates = tuple(rates)
        self._is_guess = is_guess
        apart = _APART_IN_A_GUESS if is_guess else _APART
        self._deviations = [apart * size for size in sizes]
        self._leasts = [_LEAST * rate for rate in rates]
        self._level, self._times = 1.0, list(rates)  # the rates are the level x the times
        self._spread = self._wide()  # covariance of the times
        self._variance = _NOISE**2
        self._far, self._nearest = 0, 1.0  # how many in a row, and how long the nearest was

    def update(self, terms: Sequence[float], seconds: float) -> float:
        """Takes an observation of a microbatch of these terms. By what share of the prediction it
        was off, as far as this stage's rates leave it over."""
        predicted: float = sum(map(mul, terms, self.rates))
        if not predicted:
            return 0.0  # there is nothing on this stage to be learnt
        ratio = min(max(seconds / predicted, 1 / _FURTHEST), _FURTHEST)
        if self._is_guess:
            self._is_guess = False
            self._rescale(ratio)
            return 0.0
        unit = self._level / predicted
        moved, total = self._told([unit * term for term in terms])
        error, off = ratio - 1, (ratio if ratio > 1 else 1 / ratio) - 1
        distance = off * off / total
        # What an error and what is left of it have in common is the noise.
        bounded = min(distance, _BOUND * _BOUND)
        variance = self._variance * (1 - _NOISE_WEIGHT + _NOISE_WEIGHT * bounded)
        self._variance = min(max(variance, _LEAST_NOISE**2), _MOST_NOISE**2)
        if distance > bounded:
            self._was_far(ratio)
            return 0.0
        self._far = 0
        self._narrow(moved, total)
        self._move(moved, error / total)
        left = error * self._variance / total
        self._level *= 1 + _LEVEL * left
        self._tell()
        return (1 - _LEVEL) * left

    def _told(self, shares: Sequence[float]) -> tuple[list[float], float]:
        """What an error tells of each rate, where the terms have these shares of the prediction;
        and the variance of errors. Like `_narrow` it runs for every microbatch on every stage, and
        spelt out it takes a third of the time."""
        a, b, c, d, e, f, g = shares
        moved = [
            r * a + s * b + t * c + u * d + v * e + w * f + x * g
            for r, s, t, u, v, w, x in self._spread
        ]
        r, s, t, u, v, w, x = moved
        return moved, r * a + s * b + t * c + u * d + v * e + w * f + x * g + self._variance

    def _narrow(self, moved: Sequence[float], total: float) -> None:
        """What was told is known now; and each rate drifts."""
        a, b, c, d, e, f, g = moved
        spread = []
        for each, (r, s, t, u, v, w, x) in zip(moved, self._spread, strict=True):
            k = each / total
            spread.append(
                [r - k * a, s - k * b, t - k * c, u - k * d, v - k * e, w - k * f, x - k * g]
            )
        drift = _DRIFT * self._variance
        for place, deviation in enumerate(self._deviations):
            spread[place][place] += drift * deviation * deviation
        self._spread = spread

    def _move(self, moved: Sequence[float], step: float) -> None:
        self._times = [time + step * each for time, each in zip(self._times, moved, strict=True)]
        if not all(map(ge, self._times, self._leasts)):
            for place, least in enumerate(self._leasts):
                if self._times[place] < least:
                    self._hold(place)

    def _hold(self, place: int) -> None:
        """No rate is less than its least: it is moved there, and others as far as they are tied to
        it."""
        row = self._spread[place]
        short = (self._leasts[place] - self._times[place]) / row[place]
        times = [time + short * s for time, s in zip(self._times, row, strict=True)]
        self._times = list(map(max, times, self._leasts))

    def _was_far(self, ratio: float) -> None:
        """One is a hiccup; some in a row on the same side are a change, by the least of them."""
        if self._far and (ratio > 1) == (self._nearest > 1):
            self._far += 1
            nearer = min if ratio > 1 else max
            self._nearest = nearer(self._nearest, ratio)
        else:
            self._far, self._nearest = 1, ratio
        if self._far == _IN_A_ROW:
            self._rescale(self._nearest)

    def _rescale(self, ratio: float) -> None:
        """All takes so many times as long; how the terms stand to each other is open again."""
        self._level = min(max(self._level * ratio, 1 / _FURTHEST), _FURTHEST)
        self._spread = self._wide()
        self._far = 0
        self._tell()

    def _wide(self) -> list[list[float]]:
        """As before anything was observed."""
        together = _TOGETHER**2
        spread = [[together * one * other for other in self._times] for one in self._times]
        for place, deviation in enumerate(self._deviations):
            spread[place][place] += deviation**2
        return spread

    def _tell(self) -> None:
        level = self._level
        self.rates = tuple([level * time for time in self._times])
