"""What `learnt_costs.py` tries: pipelines with their loads, and what is wrong with the costs."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

from schedule_cases import Case, setup_of
from schedule_search import ceiling_of, lengths_of

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.device import DeviceProfile, Residuals
from pipeserve.core.cost.kernels import AttentionCost, Tables
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.rough import ROUGH_CPU, ROUGH_GPU
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.engine import Limits
from pipeserve.core.nouns import Microbatch, PipelinePlan
from pipeserve.profiling.simulation.stage_times import ProfiledTimes, StageTimes


class Cell(NamedTuple):
    """A pipeline and its load."""

    profile: DeviceProfile
    shape: ModelShape
    plan: PipelinePlan
    size: int
    """Of a stage, in devices."""
    limits: Limits
    lengths: Sequence[tuple[int, int]]
    rate: float


def a100(layout: str, workload: str, load: float) -> Cell:
    knobs = (("max_num_batched_tokens", 2048),)
    setup = setup_of(Case(layout, workload, "uniform", knobs, 1.0, "sjf"))
    lengths = lengths_of(workload, None)
    rate = load * ceiling_of(setup, lengths, 1.0).rate
    size = setup.config.tensor_parallel_size
    return Cell(setup.profile, setup.shape, setup.plan, size, setup.limits, lengths, rate)


CPU = replace(
    load_profile("a100-80gb-dgx"),
    name="CPU",
    kernels=None,
    tables=Tables(
        model="smollm2-135m",
        dtype="bfloat16",
        threads=1,
        layer=((1, 1.3e-3), (8, 1.4e-3), (16, 1.7e-3), (64, 3.6e-3), (512, 2.1e-2), (2048, 8.4e-2)),
        head=((1, 2.0e-3), (16, 4.8e-3), (256, 5.0e-2)),
        embedding=((1, 1e-5), (512, 5e-4)),
    ),
    attention=AttentionCost(
        prefill_overhead_s=5e-5,
        prefill_values_per_s=2e9,
        prefix_flops_per_s=1e11,
        causal_flops_per_s=8e10,
        query_tile=1,
        decode_overhead_s=2e-5,
        decode_sequence_s=1e-5,
        decode_bytes_per_s=1.2e10,
    ),
    host_s=5e-4,
    residuals=Residuals(jitter=0.03),
)
"""About a core of a server with SmolLM2-135M in bf16: no steps, and times that scatter."""


def guess_of(profile: DeviceProfile) -> DeviceProfile:
    """What a run on such devices starts from without their profile."""
    return ROUGH_CPU if profile is CPU else ROUGH_GPU


def cpu() -> Cell:
    shape = load_shape("smollm2-135m")
    limits = Limits(
        num_blocks=6000,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_model_len=4096,
        max_tbt_s=0.5,
        enable_prefix_caching=False,
        order="sjf",
    )
    rng = Random(0)
    lengths = [(rng.randint(1, 1500), rng.randint(2, 120)) for _ in range(5000)]
    return Cell(CPU, shape, split_layers(shape.num_layers, 2), 1, limits, lengths, 1.1)


CELLS = {
    "A100s PP2, Azure": lambda: a100("TP4xPP2", "azure-conv", 0.85),
    "A100s PP8, arXiv": lambda: a100("TP1xPP8", "arxiv", 0.8),
    "CPU PP2": cpu,
}


# ---- what is wrong ------------------------------------------------------------------------------


class Wrong(NamedTuple):
    """Factors of the profile that costs are predicted from."""

    weights: float = 1.0
    tokens: float = 1.0
    own: float = 1.0
    prefix: float = 1.0
    context: float = 1.0
    head: float = 1.0
    has_steps: bool = True


class WrongProfile:
    """A profile with these factors."""

    def __init__(self, profile: DeviceProfile, wrong: Wrong) -> None:
        self._profile = profile
        self.linear = _Linear(profile.linear, wrong)
        self.attention = _Attention(profile.attention, wrong)
        self.host_s = wrong.weights * profile.host_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profile, name)


class _Linear:
    def __init__(self, linear: Any, wrong: Wrong) -> None:
        self._linear, self._wrong = linear, wrong

    def layer_s(self, shape: ModelShape, num_tokens: int) -> float:
        weights_s = self._linear.layer_s(shape, 1)
        seconds = self._linear.layer_s(shape, num_tokens)
        if not self._wrong.has_steps:
            low, high = num_tokens // 128 * 128, num_tokens // 128 * 128 + 128
            ends = [self._linear.layer_s(shape, max(end, 1)) for end in (low, high)]
            seconds = ends[0] + (num_tokens - low) / 128 * (ends[1] - ends[0])
        return self._wrong.weights * weights_s + self._wrong.tokens * (seconds - weights_s)

    def head_s(self, shape: ModelShape, num_logits: int) -> float:
        return self._wrong.head * self._linear.head_s(shape, num_logits)

    def embedding_s(self, shape: ModelShape, num_tokens: int) -> float:
        return self._linear.embedding_s(shape, num_tokens)


class _Attention:
    def __init__(self, attention: AttentionCost, wrong: Wrong) -> None:
        self._attention, self._wrong = attention, wrong

    def prefill_s(self, shape: ModelShape, start: int, num_tokens: int) -> float:
        own = self._attention.prefill_s(shape, 0, num_tokens)
        prefix = self._attention.prefill_s(shape, start, num_tokens) - own
        return self._wrong.own * own + self._wrong.prefix * prefix

    def decode_s(self, shape: ModelShape, num_decodes: int, context: int) -> float:
        return self._wrong.context * self._attention.decode_s(shape, num_decodes, context)


class Changing(StageTimes):
    """Stages that may become slower while they run."""

    def __init__(self, times: ProfiledTimes, num_stages: int) -> None:
        self._times = times
        self.control_s, self.feedback_s = times.control_s, times.feedback_s
        self.latency_s = times.latency_s
        self.hop_s = times.hop_s
        self.factors = [1.0] * num_stages

    def compute_s(self, microbatch: Microbatch) -> list[float]:
        pairs = zip(self._times.compute_s(microbatch), self.factors, strict=True)
        return [seconds * factor for seconds, factor in pairs]


class Fault(NamedTuple):
    wrong: Wrong | None = Wrong()
    """None: no profile."""
    changes: tuple[tuple[float, float], ...] = ()
    """From then on the second stage takes so many times as long."""


FAULTS = {
    "the right profile": Fault(),
    "weights twice as dear": Fault(Wrong(weights=2.0)),
    "weights half as dear": Fault(Wrong(weights=0.5)),
    "tokens twice as dear": Fault(Wrong(tokens=2.0)),
    "tokens half as dear": Fault(Wrong(tokens=0.5)),
    "prefixes half as dear": Fault(Wrong(prefix=0.5)),
    "contexts half as dear": Fault(Wrong(context=0.5)),
    "contexts twice as dear": Fault(Wrong(context=2.0)),
    "head half as dear": Fault(Wrong(head=0.5)),
    "no steps of tiles": Fault(Wrong(has_steps=False)),
    "no profile": Fault(None),
    "right, a stage 1.5 times slower from 60 s on": Fault(changes=((60.0, 1.5),)),
    "right, a neighbour: 1.5 times every other 10 s": Fault(
        changes=tuple((60.0 + 10 * turn, (1.5, 1.0)[turn % 2]) for turn in range(12))
    ),
    "right, a stage 30 % slower by and by from 60 s on": Fault(
        changes=tuple((60.0 + 2 * step, 1 + 0.01 * step) for step in range(31))
    ),
    "no profile, a stage 1.5 times slower from 60 s on": Fault(None, ((60.0, 1.5),)),
}
