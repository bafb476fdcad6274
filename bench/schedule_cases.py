"""What `schedules.py` tries: policies with their knobs on the Falcon-180B job, each as a simulated
pipeline."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from pipeserve.configs import load_recipe, make_config
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.rough import ROUGH_GPU
from pipeserve.core.engine import Engine
from pipeserve.core.policies import get_policy
from pipeserve.launch.run.simulated import SimulatedRun, simulated_run
from pipeserve.profiling.simulation.simulator import SimulatedPipeline

LAYOUTS = {"TP1xPP8": "falcon-180b-8xa100", "TP4xPP2": "falcon-180b-2x4xa100"}
TRACES = {
    "sharegpt": "sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz",
    "arxiv": "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv.gz",
}
UNSEEN = {"mooncake": "mooncake_synthetic_trace.jsonl.gz"}
"""Not looked at while `uniform` was made; of its requests, those that fit the context."""
SLOS = {"strict": 1.0, "relaxed": 5.0}
"""Sarathi-Serve's for Falcon-180B (OSDI'24, table 3): P99 of the time between tokens."""
MAX_MODEL_LEN = 16_384
MAX_NUM_SEQS = 1024
UNIFORM_TOKENS = 2048
"""The one setting of `uniform`: a hard limit that nothing reaches."""
LONGEST = MAX_MODEL_LEN + MAX_NUM_SEQS  # a whole prompt beside every decode
PUBLISHED = {
    "request_level": [{"max_num_seqs": 8, "max_num_batched_tokens": LONGEST}],
    "orca": [{"max_num_seqs": 8, "max_num_batched_tokens": LONGEST}],
    "vllm": [{"max_num_seqs": 128, "max_num_batched_tokens": LONGEST}],
    "sarathi": [{"max_num_batched_tokens": 256}],
    "sarathi_serve": [{"max_num_batched_tokens": 512}, {"max_num_batched_tokens": 2048}],
    "splitfuse": [{"max_num_batched_tokens": 2048}],
    "token_throttle": [{"max_num_batched_tokens": 2048}],
}
"""As papers or code have them; of sarathi_serve the strict and the relaxed one."""
SWEPT: dict[str, list[dict[str, int]]] = {
    "request_level": [{"max_num_seqs": 32, "max_num_batched_tokens": LONGEST}],
    "orca": [{"max_num_seqs": 64, "max_num_batched_tokens": LONGEST}],
    "vllm": [{"max_num_batched_tokens": LONGEST}],
    "sarathi": [{"max_num_batched_tokens": 512}],
    "sarathi_serve": [{"max_num_batched_tokens": n} for n in (384, 256, 1024)],
    "splitfuse": [{"max_num_batched_tokens": n} for n in (384, 512)],
    "token_throttle": [{"max_num_batched_tokens": n} for n in (512, 1024, 4096)],
}
NEAREST = [
    "sarathi_serve", "token_throttle", "vllm", "splitfuse", "sarathi", "orca", "request_level"
]  # fmt: skip
"""What comes near `uniform` is searched first."""


NO_PROFILE = (0.0, 0.0)
"""As `Case.wrong`: the cost model starts from no profile at all."""


@dataclass(frozen=True, slots=True)
class Case:
    """A policy with its knobs, on a workload. Without an SLO of its own unless it heeds one."""

    layout: str
    workload: str
    policy: str
    knobs: tuple[tuple[str, int], ...]
    slo_s: float | None = None
    order: str = "fcfs"
    wrong: tuple[float, ...] = ()
    """Factors of the profile's terms that the policy's cost model starts from; `NO_PROFILE`."""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def cases(
    layouts: Sequence[str], workloads: Sequence[str], orders: Sequence[str]
) -> Iterator[Case]:
    cells = list(product(layouts, workloads, orders))
    for layout, workload, order in cells:
        for slo_s in SLOS.values():
            knobs = (("max_num_batched_tokens", UNIFORM_TOKENS),)
            yield Case(layout, workload, "uniform", knobs, slo_s, order)
    for policy in sorted(PUBLISHED, key=NEAREST.index):
        for given in [*PUBLISHED[policy], *SWEPT[policy]]:
            for layout, workload, order in cells:
                yield Case(layout, workload, policy, tuple(sorted(given.items())), order=order)


def case_of(entry: dict[str, Any]) -> Case:
    values = entry["case"]
    knobs = tuple((name, value) for name, value in values["knobs"])
    return Case(**{**values, "knobs": knobs, "wrong": tuple(values["wrong"])})


# ---- making pipelines ---------------------------------------------------------------------------


def setup_of(case: Case) -> SimulatedRun:
    values = {
        "policy": case.policy,
        "order": case.order,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        **dict(case.knobs),
    }
    setup = simulated_run(make_config(load_recipe(LAYOUTS[case.layout]), values))
    return replace(setup, limits=replace(setup.limits, max_tbt_s=case.slo_s))


def make_pipeline(case: Case, setup: SimulatedRun) -> SimulatedPipeline:
    policy = get_policy(case.policy)
    cost = None
    if policy.traits.reads_cost:
        profile = setup.profile
        if case.wrong:
            no_profile = case.wrong == NO_PROFILE
            profile = ROUGH_GPU if no_profile else WrongProfile(profile, *case.wrong)
        size = setup.config.tensor_parallel_size
        cost = PipelineCost(profile, setup.shape, setup.plan, size)
    return SimulatedPipeline(Engine(setup.plan, policy, setup.limits, cost), setup.times)


class WrongProfile:
    """A profile whose matrix products and attention are off by these factors."""

    def __init__(self, profile: Any, linear: float, attention: float) -> None:
        self._profile = profile
        self.linear = _Scaled(profile.linear, linear)
        self.attention = _Scaled(profile.attention, attention)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profile, name)


class _Scaled:
    """Times of another, times a factor."""

    def __init__(self, times: Any, factor: float) -> None:
        self._times, self._factor = times, factor

    def __getattr__(self, name: str) -> Any:
        method, factor = getattr(self._times, name), self._factor
        return lambda *where: factor * method(*where)
