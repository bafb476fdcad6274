"""`pipeserve simulate` with prefill and decode on pools of their own, as DistServe serves.

`docs/simulate.md` says what is simulated and documents the keys of `--json`.
"""

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeserve.configs import RunConfig
from pipeserve.configs.device_profiles import load_profile
from pipeserve.core.device import DeviceProfile, check_profile
from pipeserve.core.partition import split_layers
from pipeserve.core.shape import ModelShape
from pipeserve.errors import ConfigError
from pipeserve.launch.tables import attainment_line, run_table
from pipeserve.launch.wanted import Pools, Wanted
from pipeserve.launch.workload import Workload
from pipeserve.profiling.capacity import busy_in, ceiling_rate, poisson_arrivals
from pipeserve.profiling.disaggregated import KvLink
from pipeserve.profiling.goodput import Slo, attainment, find_goodput, meets
from pipeserve.profiling.placement import (
    Cluster,
    Parallelism,
    Service,
    instances,
    pairs,
    place_apart,
    place_together,
)
from pipeserve.profiling.simulator import SimulatedPipeline, in_order
from pipeserve.profiling.stage_times import ProfiledTimes
from pipeserve.profiling.summary import summarize, window
from pipeserve.profiling.workloads import check_fits

_TRIAL_REQUESTS = 300
_HEADROOM = 4
"""Searches begin at so many times what one pipeline for prefill and decode could serve at most: a
pool that does only one of them serves more."""
_SEARCH_STEPS = 1024


def run(config: RunConfig, shape: ModelShape, workload: Workload, wanted: Wanted) -> dict[str, Any]:
    """Answers, prints, and returns the object that `--json` writes. Raises ConfigError and
    CapacityError."""
    console = Console()
    slo, pools, nodes = wanted.slo, wanted.pools, wanted.nodes
    num_gpus = nodes[0] * nodes[1] if nodes else pools.num_gpus
    service = _with_search(make_service(config, shape, workload, slo, num_gpus), num_gpus)
    if nodes is not None:
        report = search_placement(service, nodes, wanted.fast_network, wanted.rate, workload)
        print_placement(report, console)
    elif wanted.find_capacity:
        report = search_goodput(service, pools, workload)
        print_goodput(report, console)
    else:
        report = simulate(service, pools, workload)
        print_report(report, console)
    return report


def make_service(
    config: RunConfig, shape: ModelShape, workload: Workload, slo: Slo, num_gpus: int
) -> Service:
    """What serves and how well, over `num_gpus` devices in all. Raises ConfigError."""
    if config.device_profile is None:
        raise ConfigError("no device profile: give --device-profile NAME or FILE")
    profile = load_profile(config.device_profile)
    check_profile(profile, model=shape.name)
    max_model_len = config.max_model_len or shape.max_position_embeddings
    lengths = workload.token_lengths()
    for index, pair in enumerate(lengths):
        check_fits(index, *pair, max_model_len)

    def times(parallelism: Parallelism) -> ProfiledTimes:
        plan = split_layers(shape.num_layers, parallelism.pp)
        return ProfiledTimes(profile, shape, plan, parallelism.tp, config.seed)

    return Service(
        shape=shape,
        lengths=lengths,
        slo=slo,
        times=times,
        bytes_per_gpu=profile.memory_bytes * config.gpu_memory_utilization,
        link=_kv_link(profile, num_gpus),
        num_requests=_TRIAL_REQUESTS,
        seed=config.seed,
    )


def _with_search(service: Service, num_gpus: int) -> Service:
    """With rates to search through that are over what any candidate could serve."""
    cluster = Cluster(num_nodes=1, gpus_per_node=num_gpus, bytes_per_gpu=service.bytes_per_gpu)
    (smallest, *_) = instances(service.shape, cluster) or [Parallelism(num_gpus, 1)]
    ceiling = ceiling_rate(service.times(smallest), service.lengths) / smallest.num_gpus
    highest = _HEADROOM * ceiling
    return replace(service, highest_per_gpu=highest, resolution=highest / _SEARCH_STEPS)


def _kv_link(profile: DeviceProfile, num_gpus: int) -> KvLink:
    """KV goes from one device to another: inside the node where all of them are in one."""
    inside = num_gpus <= profile.devices_per_node
    link = profile.intra_node if inside else profile.inter_node
    return KvLink(alpha_s=link.alpha_s, bytes_per_s=link.bytes_per_s)


# ---- what is asked ------------------------------------------------------------------------------


def simulate(service: Service, pools: Pools, workload: Workload) -> dict[str, Any]:
    """Serves the workload to its end. Returns the object that `--json` writes.

    Raises CapacityError for a request that an instance could never hold.
    """
    arrivals = in_order(workload.arrival_times_s(), service.lengths)
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

    def is_met(rate: float) -> bool:
        arrivals = poisson_arrivals(service.lengths, rate, service.seed)
        simulation = service.simulation(*_pipelines(service, pools), arrivals)
        return meets(simulation, service.slo, _TRIAL_REQUESTS // 3, _TRIAL_REQUESTS, rate)

    num_gpus = pools.num_gpus
    highest, resolution = service.highest_per_gpu * num_gpus, service.resolution * num_gpus
    rate = find_goodput(is_met, highest, resolution)
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
    if fast_network:
        candidates = instances(service.shape, cluster)
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
            f"cannot: no placement is within the SLO ({_limits(report)}); give a looser one, or "
            "more GPUs"
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
