"""The `pipeserve` command: verbs, flags, errors of one line, exit codes.

Alone sees both the runtime and the profiler, and hands one to the other. Exit codes: 0 done, 1 the
run failed, 2 the arguments or the config are wrong, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pipeserve
from pipeserve.configs import RunConfig, load_recipe, make_config
from pipeserve.errors import ConfigError, PipeserveError
from pipeserve.launch.inputs.flags import (
    given,
    given_params,
    run_flags,
    sampling_flags,
    server_flags,
    with_flags,
)
from pipeserve.launch.inputs.load_target import Target
from pipeserve.launch.inputs.options import (
    Explain,
    JsonTo,
    Lengths,
    Live,
    Model,
    NumLengths,
    OverwriteOutput,
    Recipe,
    RecordTo,
    Scale,
    TimeUnit,
)
from pipeserve.launch.run import starting

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver
    from pipeserve.launch.inputs.workload import Workload

# typer may carry its own copy of click, so its classes are reached through what typer exports.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    help="Serve one large language model over several devices as a pipeline.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code; errors meant for users are one line on stderr."""
    command = typer.main.get_command(app)
    _open_what_is_closed()
    _take_all_text(sys.stdout)
    try:
        return command.main(arguments, prog_name="pipeserve", standalone_mode=False) or 0
    except UsageError as error:
        return _fail(_name_nearest(error.format_message()), 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except PipeserveError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):  # newer typer returns 130 by itself
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"{error}; make room and try again", 1)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(pipeserve.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@with_flags(*sampling_flags(), *run_flags())
def generate(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts, token ids or messages.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSONL to write results to.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace output and recording where they exist.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the output file holds; run the rest.")
    ] = False,
    print_text: Annotated[
        bool, typer.Option("--print", help="Print prompts and texts instead of JSON.")
    ] = False,
    record: RecordTo = None,
    live: Live = False,
    explain: Explain = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Complete one prompt, or every line of a JSONL file, and write results as they end.

    A line is {"prompt": TEXT}, {"prompt_token_ids": [...]} or {"messages": [...]}, with sampling
    parameters of its own if wanted. Its result repeats it and has text, token_ids, finish_reason,
    logprobs and prompt_logprobs where asked for, and all samples as outputs where n is over 1.
    """
    from pipeserve.launch.inputs import prompts as given_prompts
    from pipeserve.launch.verbs import generate as verb

    run_config = _run_config(model, config, flags)
    options = given_params(flags)
    given_prompts.check_options(options)
    wants_logprobs = bool({"logprobs", "prompt_logprobs"} & options.keys())
    if (prompt is None) == (prompts is None):
        raise ConfigError("give one of --prompt TEXT and --prompts FILE.jsonl")
    if output is not None and print_text:
        raise ConfigError("--output and --print each take the results; give one")
    if live and output is None and sys.stdout.isatty():
        raise ConfigError("--live takes the terminal, and so do the results; give --output FILE")
    _check_terminal(live, explain)
    if print_text and wants_logprobs:
        raise ConfigError("--print shows no logprobs; leave it out to have them in JSON")
    if resume and (prompts is None or output is None):
        raise ConfigError("--resume goes on with an --output file of --prompts; give both")
    if resume and overwrite:
        raise ConfigError("--resume keeps the output file, --overwrite replaces it; give one")
    if prompts is None:
        lines = [given_prompts.one_prompt(prompt, options, chat)]
    else:
        lines = given_prompts.read_prompts(prompts, options, chat)
    start = partial(
        starting.recorded_driver,
        run_config,
        record,
        overwrite=overwrite,
        explained=explain,
        check=partial(given_prompts.check_lines, lines),
    )
    if output is not None:
        if prompts is not None and output.exists() and output.samefile(prompts):
            raise ConfigError(f"{output} holds the prompts; give another --output")
        job = given_prompts.job_of(run_config, lines)
        return verb.write_to(output, job, lines, overwrite, resume, start, live)
    if prompts is not None or wants_logprobs:
        write = verb.print_text if print_text else verb.print_json
        return verb.run(start, lines, write, live)
    with start() as (driver, records), records.shown() if live else nullcontext():
        from pipeserve.frontend.llm import LLM

        records.start_writing()
        return verb.stream_text(LLM.on(driver), lines[0])


def _check_terminal(live: bool, explain: bool) -> None:
    if live and explain:
        raise ConfigError("--live and --explain both write to stderr; give one")


@app.command()
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

    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import bench as verb

    if url is not None:
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
        work = read_workload(workload, num_prompts, scale, rate, seed, unit_s=time_unit)
        return _bench_server(target, work, repeat, json_file)
    run_config = _run_config(model, config, flags)
    _check_terminal(live, explain)
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
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _bench_server(target: Target, work: "Workload", repeat: int, json_file: Path | None) -> int:
    from rich.console import Console

    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.verbs.bench_server import bench_server, print_server_report

    if json_file is not None:
        check_writable(json_file)
    report = bench_server(target, work, None, repeat)
    print_server_report(report, target, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["errors"] else 0


def _encoder(driver: "Driver") -> Callable[[str], Sequence[int]] | None:
    """What makes ids of text, where there is a model to say how."""
    if driver.model_folder is None:
        return None
    from pipeserve.frontend.tokenizer import Tokenizer

    return Tokenizer(driver.model_folder).encode


@app.command()
@with_flags(*server_flags(), *run_flags())
def serve(model: Model = None, config: Recipe = None, **flags: Any) -> int:
    """Serve a model over HTTP, by OpenAI's API, until a signal ends it."""
    from pipeserve.launch.verbs import serve as verb
    from pipeserve.server.options import ServerOptions

    return verb.serve(
        _run_config(model, config, flags), ServerOptions(**given(ServerOptions, flags))
    )


@app.command()
@with_flags(*sampling_flags(), *run_flags())
def chat(
    model: Annotated[
        str | None, typer.Argument(help="As of generate, or the address of a server.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Of a server.")] = None,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Talk to a model, or to a server (http://...), in the terminal."""
    from pipeserve.launch.verbs import chat as verb

    options = given_params(flags)
    if model is not None and model.startswith(("http://", "https://")):
        return verb.talk(verb.of_server(model, api_key, options), system)
    from pipeserve.frontend.llm import LLM
    from pipeserve.frontend.params import params_from

    run_config = _run_config(model, config, flags)
    with starting.open_driver(run_config) as driver:
        llm = LLM.on(driver)
        defaults = replace(llm.get_default_sampling_params(), max_tokens=None)
        return verb.talk(verb.of_pipeline(llm, params_from(options, defaults)), system)


@app.command()
@with_flags(*run_flags())
def calibrate(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="YAML file to write the profile to.")] = Path(
        "device-profile.yaml"
    ),
    overwrite: OverwriteOutput = False,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Measure this machine's stages, and write the cost profile that simulate takes."""
    from pipeserve.configs.device_profiles import save_profile
    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.verbs import calibrate as verb
    from pipeserve.machine import device_name, total_memory_bytes
    from pipeserve.profiling.calibration.samples import Samples
    from pipeserve.profiling.recording.recording import Ring
    from pipeserve.stages.checkpoint.sources import resolve
    from pipeserve.stages.families import read_config

    run_config = _run_config(model, config, flags)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; give --overwrite, or another --output")
    check_writable(output)
    with starting.status("looking for the model") as say:
        num_layers = read_config(resolve(run_config.model, say)).num_layers
    samples = Samples(run_config.pipeline_parallel_size)
    measured, ring = verb.measured_run(run_config, num_layers), Ring()
    with starting.open_driver(measured, samples, ring.record) as driver:
        profile, fit = verb.calibrate(driver, ring, samples, device_name(), total_memory_bytes())
    save_profile(profile, output)
    print(
        f"{output}: {profile.name}, {profile.provenance['observations']} observations, error "
        f"{fit.median_error:.1%} in the median of those held out"
    )
    return 0


@app.command()
@with_flags(*run_flags())
def simulate(
    model: Model = None,
    workload: Lengths = "sharegpt",
    num_prompts: NumLengths = None,
    scale: Scale = 1.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second (Poisson), inf: all at once; by default the file's."),
    ] = None,
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
    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.inputs.wanted import Wanted, read_nodes, read_pools, read_slo
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import disaggregate, simulate
    from pipeserve.profiling.recording.writer import check_recordable

    run_config = _run_config(model, config, flags)
    wanted = Wanted(
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
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


@app.command()
@with_flags(*run_flags())
def tune(
    model: Model = None,
    workload: Lengths = "sharegpt",
    num_prompts: NumLengths = None,
    scale: Scale = 1.0,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second to serve; by default as many as can be.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to use; by default as many as the run has.", min=1)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="YAML file to write the best recipe to; else it is printed.")
    ] = None,
    overwrite: OverwriteOutput = False,
    num_processes: Annotated[
        int | None,
        typer.Option("--processes", help="To search with; by default one a core.", min=1),
    ] = None,
    json_file: JsonTo = None,
    config: Recipe = None,
    **flags: Any,
) -> int:
    """Search the layout, layer split, window and policy that serve a workload best within
    --slo-tbt, on virtual time. What is given as a flag is not searched."""
    from pipeserve.driver.shapes import find_shape
    from pipeserve.launch.inputs.jsonl import check_writable
    from pipeserve.launch.inputs.workload import read_workload
    from pipeserve.launch.verbs import tune as verb

    run_config = _run_config(model, config, flags)
    work = read_workload(
        workload, num_prompts, scale, rate, run_config.seed, default_num=1000, timed=False
    )
    if output is not None and output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; give --overwrite, or another --output")
    for path in filter(None, (output, json_file)):
        check_writable(path)
    shape = find_shape(run_config.model, run_config.dtype)
    fixed = given(RunConfig, flags)
    report = verb.tune(run_config, shape, work, rate, gpus, fixed, num_processes, output)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="A folder that --record was given; two to compare.", metavar="DIR..."),
    ],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="The page; by default DIR/report.html.")
    ] = None,
    json_file: JsonTo = None,
    perfetto_file: Annotated[
        Path | None,
        typer.Option("--perfetto", help="Trace for ui.perfetto.dev; by default DIR/trace.json."),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Try out what to change, on the recorded requests.")
    ] = False,
) -> int:
    """Show where the time of a recorded run went, or what moved between two."""
    from pipeserve.launch.verbs import report as verb

    return verb.report(folders, html_file, json_file, perfetto_file, advise)


def _run_config(model: str | None, recipe: str | None, flags: dict[str, Any]) -> RunConfig:
    overrides = given(RunConfig, flags)
    if model is not None:
        overrides["model"] = model
    return make_config(load_recipe(recipe) if recipe is not None else {}, overrides)


def _name_nearest(message: str) -> str:
    """For an unknown verb, name the nearest; for an unknown flag, typer does that itself."""
    if not message.startswith("No such command") or "Did you mean" in message:
        return message
    verbs = [command.callback.__name__ for command in app.registered_commands]
    nearest = get_close_matches(message.split("'")[1], verbs, n=1, cutoff=0.5)
    return f"{message} Did you mean {nearest[0]!r}?" if nearest else f"{message} Verbs: {verbs}"


def _open_what_is_closed() -> None:
    """Standard streams that the caller has closed (`2>&-`) lead nowhere. Otherwise what is printed
    on stderr goes to standard output, and the next file that is opened takes the place of either,
    and gets what libraries write there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest that is free
                os.set_inheritable(number, True)
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115


def _take_all_text(stream: Any) -> None:
    """What the stream's encoding cannot say is escaped, as on stderr, instead of an error."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _fail(message: str, exit_code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
