"""DistServe's published latency model of OPT on A100-80GB, as stage times of a simulation.

Source: LLMServe/DistServe @ 82831f1 (Apache-2.0), `simdistserve/estimators/profile_data/profiler-
a100-80g.{distserve,vllm}.json` for the coefficients, and for how they are used `time_estimator.py`
and `worker.py`. In milliseconds, on each of P stages:

    prefill    (a + b * tokens + c * sum of squared prompt lengths) / P + P
    decode     (a + b * context tokens + c * requests) / P        two fits, parted at 95 requests
    stage 0    2 + 0.0001 * context tokens, besides: what the driver's call costs there

The time for moving activations is in the fits; the time for moving KV is not modelled there.
These are not bare measurements: commit 4c68ed9 (2024-05-01, "Realign the curve") multiplied the
prefill coefficients by 1.1 (distserve) and 1.4 (vllm) and vllm's decode coefficients by 1.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pipeserve.core.nouns import Microbatch
from pipeserve.errors import ConfigError
from pipeserve.profiling.simulation.stage_times import StageTimes

LARGE_BATCH = 95
"""Decodes from which the second fit holds."""
CALL_MS = 2.0
CALL_MS_PER_TOKEN = 1e-4


class Line(NamedTuple):
    """Milliseconds of one forward pass over all layers."""

    fixed: float
    per_token: float
    """Of a prompt token, or of a token of context."""
    per_other: float
    """Of a squared prompt length, or of a decode."""

    def scaled(self, factor: float) -> "Line":
        return Line(*(factor * ms for ms in self))


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """One model on one tensor-parallel group."""

    prefill: Line
    decode_small: Line
    decode_large: Line

    def scaled(self, prefill: float, decode: float) -> "LatencyFit":
        """As many times as slow."""
        small, large = self.decode_small.scaled(decode), self.decode_large.scaled(decode)
        return LatencyFit(self.prefill.scaled(prefill), small, large)


class PublishedTimes(StageTimes):
    """A `StageTimes` from a `LatencyFit` and the number of stages."""

    control_s = 0.0

    def __init__(self, fit: LatencyFit, num_stages: int) -> None:
        self._fit = fit
        self._num_stages = num_stages
        self._hops = (0.0,) * (num_stages - 1)

    def compute_s(self, microbatch: Microbatch) -> Sequence[float]:
        """A microbatch of prompts and decodes costs what the two would in turn: the published
        worker never mixes them."""
        prompt_tokens = squares = decodes = context = 0
        for chunk in microbatch.chunks:
            num_tokens = chunk.stop - chunk.start
            if num_tokens > 1 or not chunk.start:
                prompt_tokens += num_tokens
                squares += num_tokens * num_tokens
            else:
                decodes += 1
                context += chunk.stop
        stage_ms = first_ms = 0.0
        if prompt_tokens:
            stage_ms += self._prefill_ms(prompt_tokens, squares)
            first_ms += CALL_MS + CALL_MS_PER_TOKEN * prompt_tokens
        if decodes:
            stage_ms += self._decode_ms(decodes, context)
            first_ms += CALL_MS + CALL_MS_PER_TOKEN * (context - decodes)
        rest = (stage_ms / 1e3,) * (self._num_stages - 1)
        return ((stage_ms + first_ms) / 1e3, *rest)

    def hop_s(self, microbatch: Microbatch) -> Sequence[float]:
        return self._hops

    def _prefill_ms(self, num_tokens: int, squares: int) -> float:
        fixed, per_token, per_square = self._fit.prefill
        ms = fixed + per_token * num_tokens + per_square * squares
        return ms / self._num_stages + self._num_stages

    def _decode_ms(self, num_decodes: int, context: int) -> float:
        """`context` counts the token being decoded."""
        is_small = num_decodes < LARGE_BATCH
        line = self._fit.decode_small if is_small else self._fit.decode_large
        ms = line.fixed + line.per_token * context + line.per_other * num_decodes
        return ms / self._num_stages


def published_times(
    engine: str, model: str, tensor_parallel_size: int, num_stages: int
) -> PublishedTimes:
    """`engine` is "distserve" or "vllm" (0.2.3). Raises ConfigError where nothing was measured."""
    fits = FITS.get((engine, model), {})
    if tensor_parallel_size not in fits:
        known = ", ".join(f"{e} {m} TP {'/'.join(map(str, f))}" for (e, m), f in FITS.items())
        raise ConfigError(
            f"there is no published latency of {engine} {model} at TP {tensor_parallel_size}: "
            f"choose from {known}"
        )
    return PublishedTimes(fits[tensor_parallel_size], num_stages)


def _fit(*numbers: float) -> LatencyFit:
    return LatencyFit(Line(*numbers[:3]), Line(*numbers[3:6]), Line(*numbers[6:]))


FITS: Mapping[tuple[str, str], Mapping[int, LatencyFit]] = MappingProxyType(
    {
        ("distserve", "opt-13b"): {
            1: _fit(
                18.10255, 0.1019123, 7.122264e-06,
                19.9347, 0.0006269357, 0.03850698,
                7.166189, 0.0005798, 0.158311,
            ),
            2: _fit(
                14.74297, 0.06857721, 2.449573e-06,
                13.2948, 0.0003410922, 0.06296393,
                10.63874, 0.0003118337, 0.08562914,
            ),
            4: _fit(
                12.0623, 0.0380814, 5.22625e-07,
                10.25623, 0.000187867, 0.03269274,
                10.48351, 0.0001712089, 0.04566649,
            ),
        },
        ("distserve", "opt-66b"): {
            2: _fit(
                43.05881, 0.2742293, 2.247804e-05,
                48.28802, 0.0009424344, 0.1275502,
                28.72769, 0.0004744848, 0.2961779,
            ),
            3: _fit(
                32.99823, 0.1956826, 1.220525e-05,
                35.80154, 0.0005845005, 0.09526698,
                22.65386, 0.0005358489, 0.2085144,
            ),
            4: _fit(
                29.44164, 0.1513522, 8.317451e-06,
                30.76028, 0.0004519476, 0.0632842,
                27.47082, 0.0004046846, 0.1248067,
            ),
            8: _fit(
                25.49066, 0.1065918, 3.39105e-06,
                23.15511, 0.0002269149, 0.04800638,
                21.71773, 0.000375809, 0.08978614,
            ),
        },
        ("vllm", "opt-13b"): {
            1: _fit(
                22.0522, 0.1405092, 8.076585e-06,
                23.47504, 0.0005929345, 0.06072686,
                20.20636, 0.0004907727, 0.1200031,
            ),
            2: _fit(
                27.44081, 0.09054533, 8.452054e-06,
                24.54058, 0.0002244015, 0.08715787,
                17.94777, 0.0004570851, 0.1117908,
            ),
            4: _fit(
                30.53632, 0.05150645, 4.232473e-07,
                25.90114, 7.753634e-05, 0.05528087,
                23.88388, 0.0002840016, 0.06276524,
            ),
        },
        ("vllm", "opt-66b"): {
            2: _fit(
                58.3822, 0.3826408, -7.114149e-06,
                57.07344, 0.003646114, 0.2249374,
                26.98376, 0.006200132, 0.4482569,
            ),
            3: _fit(
                45.74453, 0.2778128, 3.646247e-05,
                44.93959, 0.0008096153, 0.2128798,
                43.69603, 0.0008402567, 0.2400647,
            ),
            4: _fit(
                42.96549, 0.2128658, 4.601017e-05,
                39.58179, 0.0006945722, 0.1358087,
                40.85972, 0.0004264871, 0.1950837,
            ),
            8: _fit(
                38.93119, 0.1573682, 4.531676e-06,
                31.17604, 0.0002755654, 0.06797704,
                29.08777, 0.000602772, 0.1389609,
            ),
        },
    }
)  # fmt: skip
"""By engine and model, then by tensor-parallel size."""
