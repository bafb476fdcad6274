"""`pipeserve report`: its flags."""

from pathlib import Path
from typing import Annotated

import typer

from pipeserve.launch.inputs.options import JsonTo


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
