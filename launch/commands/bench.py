"""`pipeserve bench`: its flags."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeserve.launch.inputs.flags import check_terminal, run_config_of, run_flags, with_flags
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


@with_flags(*run_flags())
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
    time_unit: TimeUnit = None,
    repeat: Annotated[int, typer.Option(help="Runs; the median one is reported.", min=1)] = 1,
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

    run_config = run_config_of(model, config, flags)
    check_terminal(live, explain)
    work = read_workload(workload, num_prompts, scale, rate, run_config.seed, unit_s=time_unit)
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
