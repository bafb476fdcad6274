"""Reproduces what the papers report, on our simulator, and writes docs/reproduction.md.

    python bench/reproduce.py [--traces DIR] [--quick] [--output FILE]

Each part is a script of its own that prints its section in Markdown; they run one after the other,
each in its own process, on one core. `--traces`: a folder with the published length traces, for
the parts that can use them. `--quick`: fewer requests, to see whether everything runs; its figures
are noisier, so write them elsewhere with `--output`.
"""

import argparse
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "docs" / "reproduction.md"

HEAD = """\
# What the papers report, on our simulator

Written by `{command}` on {date}, in {minutes:.0f} minutes of one core's time (Python
{python}, numpy {numpy}, pipeserve {pipeserve}), seed 0 where nothing else is said. Each section can
be made alone by its own script in `bench/`.

Everything here is simulated: the engine and the policies are those that serve, the stages are
virtual servers whose times come from a device profile (docs/cost-model.md) with the fit's own
residuals as noise (`profiling/simulation/stage_times.py`). The profiles hold device time alone: no
host time, unless a row says so. A figure is "within" when ours is at most 20 % off the paper's
(exactly equal where the target says 0 %). Where it is not, an assumption follows that moves it,
with the figures before and after. An assumption that gives the paper's figure is not thereby
shown to be what the paper had."""


def parts(quick: bool, traces: Path | None) -> list[tuple[str, list[str]]]:
    """Script and arguments of each section, in order; those that are not there are left out."""
    given = ["--traces", str(traces)] if traces else []
    wanted = [
        ("reproduce_sarathi.py", ["--requests", "1000"] if quick else []),
        ("reproduce_sarathi_serve.py", [*given, *(["--quick"] if quick else [])]),
        ("reproduce_distserve.py", ["--seeds", "1"] if quick else []),
    ]
    return [(script, arguments) for script, arguments in wanted if (HERE / script).exists()]


def run_part(script: str, arguments: Sequence[str]) -> str:
    """Its section. What it says of errors goes to the terminal; a failure ends everything."""
    print(f"{script} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def head(command: str) -> str:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = spent.ru_utime + spent.ru_stime
    return HEAD.format(
        command=command,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        minutes=max(1, seconds / 60),
        python=platform.python_version(),
        numpy=version("numpy"),
        pipeserve=version("pipeserve"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    flags = ["--traces DIR"] * bool(args.traces) + ["--quick"] * args.quick
    command = " ".join(["python bench/reproduce.py", *flags])
    sections: list[str] = []
    for script, arguments in parts(args.quick, args.traces):
        sections.append(run_part(script, arguments))
        page = [head(command).strip(), *sections]
        args.output.write_text("\n\n".join(page) + "\n")  # so far: a later part may fail


if __name__ == "__main__":
    main()
