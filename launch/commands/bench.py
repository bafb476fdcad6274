"""`pipeserve bench`: its flags."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeserve.launch.commands.in_job import in_job
from pipeserve.launch.inputs.flags import (
    check_terminal,
    job_flags,
    run_config_of,
    run_flags,
    with_flags,
)
from pipeserve.launch.inputs.load_target import Target
from pipeserve.launch.inputs.options import (
    Explain,
    JsonTo,
    Live,
    Model,
    Recipe,
    RecordTo,
    Scale,
    TimeUnit,
)
from pipeserve.launch.run import starting

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver


@with_flags(*run_flags(), *job_flags())
@in_job
def bench(
    model: Model = None,
    workload: Annotated[
        str,
        typer.Option(help="Prompts, conversations, a trace, or sharegpt, arxiv, azure-conv."),
    ] = "sharegpt",
    num_prompts: Annotated[
        int | None, typer.Option(help="Requests; all of a file, 64 of a distribution.")
    ] = None,
    scale: Scale = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second (Poisson), inf: all at once; by default the file's."),
    ] = None,
    burst: Annotated[
        int, typer.Option(help="So many requests come together, of as many --rate a second.")
    ] = 1,
    time_unit: TimeUnit = None,
    repeat: Annotated[int, typer.Option(help="Runs; the median one is reported.", min=1)] = 1,
    url: Annotated[
        str | None,
        typer.Option(help="Measure a server of OpenAI's API, in place of a pipeline made here."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Of --url.")] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="Of --url: search the highest rate served.")
    ] = False,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Of --url: longest time to first token, seconds.")
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Of --url: share of requests that must keep the limits.")
    ] = 0.9,
    json_file: JsonTo = None,
    record: RecordTo = None,
    live: Live = False,
    explain: Explain = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Measure throughput, TTFT, TBT, and each stage's busy share and memory on a workload."""
    from rich.console import Console

    from pipeserve.launch.inputs.jsonl import check_writable, write_json
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import bench as verb

    if url is not None:
        from pipeserve.launch.verbs import bench_server

        target = Target(
            url=url,
            model=model,
            api_key=api_key,
            find_capacity=find_capacity,
            rate=rate,
            slo_ttft_s=slo_ttft,
            slo_tbt_s=flags["slo_tbt"],
            attainment=attainment,
        )
        seed = flags["seed"] or 0
        work = read_workload(
            workload, num_prompts, scale, rate, seed, unit_s=time_unit, burst=burst
        )
        if json_file is not None:
            check_writable(json_file)
        report = bench_server.bench_server(target, work, None, repeat)
        bench_server.print_server_report(report, target, Console())
        write_json(json_file, report)
        return 1 if report["errors"] else 0
    run_config = run_config_of(model, config, flags)
    check_terminal(live, explain)
    seed = run_config.seed
    work = read_workload(workload, num_prompts, scale, rate, seed, unit_s=time_unit, burst=burst)
    if json_file is not None:
        check_writable(json_file)
    with (
        starting.recorded_driver(run_config, record, explained=explain, may_emulate=True) as (
            driver,
            records,
        ),
        records.shown() if live else nullcontext(),
    ):
        report = verb.bench(driver, records, _encoder(driver), work, repeat)
    verb.print_report(report, Console())
    write_json(json_file, report)
    return 0


def _encoder(driver: "Driver") -> Callable[[str], Sequence[int]] | None:
    """What makes ids of text, where there is a model to say how."""
    if driver.model_folder is None:
        return None
    from pipeserve.frontend.tokenizer import Tokenizer

    return Tokenizer(driver.model_folder).encode
