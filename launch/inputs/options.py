"""Flags that several verbs have, beside those that are made from dataclasses (flags.py)."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="Folder, GGUF file, hub id (org/name or org/name@revision), or smollm2-135m.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option("--config", help="Recipe, by name or as a YAML file.", show_default=False),
]
RecordTo = Annotated[
    Path | None,
    typer.Option("--record", help="Folder to write the run's recording to.", show_default=False),
]
Live = Annotated[
    bool,
    typer.Option("--live", help="Show stages, microbatches and idle by cause while it runs."),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Say on stderr why each microbatch looks as it does.")
]
Scale = Annotated[float, typer.Option(help="Divide the lengths of a trace by this.")]
LengthsWorkload = Annotated[
    str, typer.Option(help="Trace, JSONL of token ids, or sharegpt, arxiv, azure-conv.")
]
NumLengths = Annotated[
    int | None, typer.Option(help="Requests; all of a file, 1000 of a distribution.")
]
TimeUnit = Annotated[
    float | None,
    typer.Option(
        "--timed-trace-sec-multiplier",
        help="Seconds of one unit of a trace's times (0.001: milliseconds); by default as its "
        "format or its numbers say.",
    ),
]
JsonTo = Annotated[Path | None, typer.Option("--json", help="Write the numbers here, too.")]
OverwriteOutput = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output file if it exists.")
]
