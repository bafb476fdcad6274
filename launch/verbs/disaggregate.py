"""`pipeserve simulate` with prefill and decode on pools of their own, as DistServe serves.

`docs/simulate.md` says what is simulated and documents the keys of `--json`.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.core.cost.device import DeviceProfile
from pipeserve.core.cost.memory import kv_blocks_beside_weights
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.shape import ModelShape
from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.wanted import Pools, SimulationGoal
from pipeserve.launch.inputs.workload import Workload
from pipeserve.launch.run.simulated import check_made_for
from pipeserve.launch.show.tables import attainment_line, print_notes, run_table
from pipeserve.profiling.recording.summary import summarize, window
from pipeserve.profiling.search.capacity import busy_in, ceiling_rate, poisson_arrivals
from pipeserve.profiling.search.goodput import attainment, find_goodput, meets
from pipeserve.profiling.search.placement import (
    BLOCK_SIZE,
    Cluster,
    Parallelism,
    instances,
    pairs,
    place_apart,
    place_together,
)
from pipeserve.profiling.search.service import Service
from pipeserve.profiling.simulation.disaggregated import KvLink
from pipeserve.profiling.simulation.simulator import SimulatedPipeline, arrivals_in_order
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.profiling.simulation.workloads import check_within_context

TRIAL_REQUESTS = 300
_SEARCH_STEPS = 256
_USED = ("device_profile", "dtype", "gpu_memory_utilization", "max_model_len", "order", "seed")


def check_flags(given: Iterable[str]) -> None:
    """Raises ConfigError for a flag that says what pools have of their own. A recipe may say it:
    it is also that of one pipeline."""
    for name in given:
        if name not in _USED:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} has no effect on pools and --place; leave it out")


def run(
    config: RunConfig, shape: ModelShape, workload: Workload, wanted: SimulationGoal
) -> dict[str, Any]:
    """Answers, prints, and returns the object that `--json` writes. Raises ConfigError and
    CapacityError."""
    console = Console()
    pools, nodes = wanted.pools, wanted.nodes
    service = make_service(config, shape, workload, wanted)
    if nodes is not None:
        report = search_placement(service, nodes, wanted.fast_network, wanted.rate, workload)
        print_placement(report, console)
    elif wanted.find_capacity:
        report = search_goodput(service, pools, workload)
        print_goodput(report, console)
    else:
        report = simulate_pools(service, pools, workload)
        print_report(report, console)
    report["notes"] = list(workload.notes)
    print_notes(report, console)
    return report


def make_service(
    config: RunConfig, shape: ModelShape, workload: Workload, wanted: SimulationGoal
) -> Service:
    """What serves and how well. Raises ConfigError."""
    if config.device_profile is None:
        raise ConfigError("no device profile: give --device-profile NAME or FILE")
    profile = load_profile(config.device_profile)
    check_made_for(profile, shape, config)
    max_model_len = config.max_model_len or shape.max_position_embeddings
    lengths = workload.token_lengths()
    check_within_context(lengths, max_model_len, workload.length_scale)

    if wanted.pools is not None:
        inside_node = wanted.pools.num_gpus <= profile.devices_per_node
    else:  # algorithm 2 moves KV inside a node, algorithm 1 anywhere
        inside_node = not wanted.fast_network or wanted.nodes[0] == 1

    def times(parallelism: Parallelism) -> ProfiledTimes:
        shape.check_divides(parallelism.tp)
        plan = split_layers(shape.num_layers, parallelism.pp)
        return ProfiledTimes(profile, shape, plan, parallelism.tp, config.seed)

    def kv_tokens(parallelism: Parallelism) -> int:
        blocks = kv_blocks_beside_weights(
            shape,
            split_layers(shape.num_layers, parallelism.pp),
            tensor_parallel_size=parallelism.tp,
            device_bytes=profile.memory_bytes * config.gpu_memory_utilization,
            block_size=BLOCK_SIZE,
        )
        return blocks * BLOCK_SIZE

    return Service(
        shape=shape,
        lengths=lengths,
        priorities=workload.request_priorities(),
        order="fcfs" if config.order == "auto" else config.order,
        slo=wanted.slo,
        times=times,
        bytes_per_gpu=profile.memory_bytes * config.gpu_memory_utilization,
        kv_tokens=kv_tokens,
        link=_kv_link(profile, inside_node),
        widen=True,
        num_requests=TRIAL_REQUESTS,
        seed=config.seed,
    )


def _searching(service: Service, candidates: Iterable[Parallelism]) -> Service:
    """With rates to begin a search at: what the first candidate that the profile knows could
    serve. Raises ConfigError where there is none."""
    for candidate in candidates:
        try:
            highest = ceiling_rate(service.times(candidate), service.lengths) / candidate.num_gpus
        except ConfigError:
            continue
        return replace(service, highest_per_gpu=highest, resolution=highest / _SEARCH_STEPS)
    raise ConfigError(
        f"{service.shape.name} fits no way of using these GPUs that the device profile knows; give "
        "more GPUs"
    )


def _kv_link(profile: DeviceProfile, inside_node: bool) -> KvLink:
    """KV goes from one device to another, at the bandwidth of one link."""
    link = profile.intra_node if inside_node else profile.inter_node
    return KvLink(alpha_s=link.alpha_s, bytes_per_s=link.bytes_per_s)


# ---- what is asked ------------------------------------------------------------------------------


def simulate_pools(service: Service, pools: Pools, workload: Workload) -> dict[str, Any]:
    """Serves the workload to its end. Returns the object that `--json` writes.

    Raises CapacityError for a request that an instance could never hold.
    """
    arrivals = arrivals_in_order(workload.arrival_times_s(), service.lengths, service.priorities)
    prefill, decode = _pipelines(service, pools)
    simulation = service.simulation(prefill, decode, arrivals)
    simulation.run_until()
    records = [served.record() for served in simulation.served]
    between = window(records)
    return {
        **asdict(summarize(records)),
        "attainment": attainment(simulation.served, service.slo)._asdict(),
        **_common(service, pools, workload),
        "pools": {
            "prefill": [{"busy": busy_in(pipeline, *between)} for pipeline in prefill],
            "decode": [{"busy": busy_in(pipeline, *between)} for pipeline in decode],
        },
    }


def search_goodput(service: Service, pools: Pools, workload: Workload) -> dict[str, Any]:
    """The highest Poisson rate at which enough requests are within the SLO; 0 for none."""
    service = _searching(service, [pools.prefill.parallelism])

    def is_met(rate: float) -> bool:
        arrivals = poisson_arrivals(service.lengths, rate, service.seed, service.priorities)
        simulation = service.simulation(*_pipelines(service, pools), arrivals)
        return meets(simulation, service.slo, TRIAL_REQUESTS // 3, TRIAL_REQUESTS, rate)

    num_gpus = pools.num_gpus
    highest, resolution = service.highest_per_gpu * num_gpus, service.resolution * num_gpus
    rate = find_goodput(is_met, highest, resolution, widen=True)
    return {
        "goodput_rps": rate,
        "goodput_rps_per_gpu": rate / num_gpus,
        **_common(service, pools, workload),
    }


def search_placement(
    service: Service, nodes: tuple[int, int], fast_network: bool, rate: float, workload: Workload
) -> dict[str, Any]:
    """DistServe's algorithm 1 where the network between nodes is fast, else 2, for `rate` requests
    a second. `placement` is None where no candidate is within the SLO."""
    cluster = Cluster(
        num_nodes=nodes[0], gpus_per_node=nodes[1], bytes_per_gpu=service.bytes_per_gpu
    )
    candidates = instances(service.shape, cluster)
    service = _searching(service, candidates)
    if fast_network:
        found = place_apart(candidates, service.prefill_per_gpu, service.decode_per_gpu, rate)
    else:
        found = place_together(pairs(service.shape, cluster), service.pair_per_gpu, rate)
    return {
        "placement": None if found is None else {**asdict(found), "num_gpus": found.num_gpus},
        "algorithm": 1 if fast_network else 2,
        "rate": rate,
        "slo": asdict(service.slo),
        "workload": workload.name,
    }


def _pipelines(
    service: Service, pools: Pools
) -> tuple[list[SimulatedPipeline], list[SimulatedPipeline]]:
    prefill, decode = pools.prefill, pools.decode
    return (
        [service.prefill(prefill.parallelism) for _ in range(prefill.num_instances)],
        [service.decode(decode.parallelism) for _ in range(decode.num_instances)],
    )


def _common(service: Service, pools: Pools, workload: Workload) -> dict[str, Any]:
    return {
        "slo": asdict(service.slo),
        "policy": f"{service.prefill_policy} | {service.decode_policy}",
        "workload": workload.name,
        "num_gpus": pools.num_gpus,
        "parallelism": {
            name: {**pool.parallelism._asdict(), "instances": pool.num_instances}
            for name, pool in (("prefill", pools.prefill), ("decode", pools.decode))
        },
    }


# ---- printing -----------------------------------------------------------------------------------


def print_report(report: dict[str, Any], console: Console) -> None:
    """A run over two pools as tables."""
    console.print(run_table(report))
    table = Table(title="instances, busy shares of their stages")
    for name in ("pool", "instance", "stages"):
        table.add_column(name, justify="right")
    for pool, found in report["pools"].items():
        for number, instance in enumerate(found):
            shares = " ".join(f"{share:.0%}" for share in instance["busy"])
            table.add_row(pool, str(number), shares)
    console.print(table)
    console.print(f"{attainment_line(report['attainment'])} ({_limits(report)})")


def print_goodput(report: dict[str, Any], console: Console) -> None:
    if report["goodput_rps"]:
        console.print(
            f"goodput {report['goodput_rps']:.2f} requests/s, {report['goodput_rps_per_gpu']:.2f} "
            f"for each of {report['num_gpus']} GPUs ({_limits(report)})"
        )
    else:
        console.print(f"cannot: no rate is within the SLO ({_limits(report)}); give a looser one")


def print_placement(report: dict[str, Any], console: Console) -> None:
    found = report["placement"]
    if found is None:
        console.print(
            f"cannot: no placement fits and is within the SLO ({_limits(report)}); give a looser "
            "one, or more GPUs"
        )
        return
    for name in ("prefill", "decode"):
        tp, pp = found[name]
        console.print(f"{name}: {found[f'num_{name}']} of TP{tp} x PP{pp}")
    console.print(
        f"{found['num_gpus']} GPUs for {report['rate']:g} requests/s, "
        f"{found['rate_per_gpu']:.2f} requests/s each (algorithm {report['algorithm']}, "
        f"{_limits(report)})"
    )


def _limits(report: dict[str, Any]) -> str:
    slo = report["slo"]
    return (
        f"TTFT within {slo['ttft_s']:g} s and TPOT within {slo['tpot_s']:g} s for "
        f"{slo['share']:.0%}"
    )
