"""`pipeserve simulate`: its flags."""

from typing import Annotated, Any

import typer

from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.flags import given, run_config_of, run_flags, with_flags
from pipeserve.launch.inputs.options import (
    Explain,
    JsonTo,
    LengthsWorkload,
    Model,
    NumLengths,
    Recipe,
    RecordTo,
    Scale,
    TimeUnit,
)


@with_flags(*run_flags())
def simulate(
    model: Model = None,
    workload: LengthsWorkload = "sharegpt",
    num_prompts: NumLengths = None,
    scale: Scale = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second (Poisson), inf: all at once; by default the file's."),
    ] = None,
    burst: Annotated[
        int, typer.Option(help="So many requests come together, of as many --rate a second.")
    ] = 1,
    time_unit: TimeUnit = None,
    find_capacity: Annotated[
        bool,
        typer.Option(
            "--find-capacity", help="Search the highest rate with 99 % of times within --slo-tbt."
        ),
    ] = False,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Longest time to a request's first token, seconds.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="Longest mean time of a request's later tokens, seconds.")
    ] = None,
    attainment: Annotated[
        float | None,
        typer.Option(help="Share of requests that must meet --slo-ttft and --slo-tpot [0.9]."),
    ] = None,
    prefill_pool: Annotated[
        str | None, typer.Option(help="Prefill instances of their own: TPxPP*N.")
    ] = None,
    decode_pool: Annotated[
        str | None, typer.Option(help="Decode instances of their own: TPxPP*N.")
    ] = None,
    place: Annotated[
        str | None, typer.Option(help="Search the best pools, on NODESxGPUS with --rate.")
    ] = None,
    fast_network: Annotated[
        bool, typer.Option("--fast-network", help="Of --place: KV may go between nodes.")
    ] = False,
    json_file: JsonTo = None,
    record: RecordTo = None,
    explain: Explain = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Serve a workload on virtual time, on devices known by their cost profile alone."""
    from pipeserve.driver.shapes import find_shape
    from pipeserve.launch.inputs.jsonl import check_writable, write_json
    from pipeserve.launch.inputs.wanted import SimulationGoal, read_nodes, read_pools, read_slo
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import disaggregate, simulate
    from pipeserve.profiling.recording.writer import check_recordable

    run_config = run_config_of(model, config, flags)
    wanted = SimulationGoal(
        find_capacity=find_capacity,
        rate=rate,
        slo_tbt_s=run_config.slo_tbt,
        slo=read_slo(slo_ttft, slo_tpot, attainment),
        pools=read_pools(prefill_pool, decode_pool),
        nodes=read_nodes(place),
        fast_network=fast_network,
    )
    work = read_workload(
        workload,
        num_prompts,
        scale,
        rate,
        run_config.seed,
        default_num=1000,
        unit_s=time_unit,
        timed=not find_capacity,
        burst=burst,
    )
    if json_file is not None:
        check_writable(json_file)
    if find_capacity or wanted.pools or wanted.nodes:
        for flag, is_given in (("--record", record is not None), ("--explain", explain)):
            if is_given:
                raise ConfigError(
                    f"{flag} is for one run of one pipeline, and not a search or pools"
                )
    if record is not None:
        check_recordable(record)
    shape = find_shape(run_config.model, run_config.dtype)
    if wanted.pools or wanted.nodes:
        disaggregate.check_flags(given(RunConfig, flags))
        report = disaggregate.run(run_config, shape, work, wanted)
    else:
        report = simulate.run(run_config, shape, work, wanted, record, explain)
    write_json(json_file, report)
    return 0
