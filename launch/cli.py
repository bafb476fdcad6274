"""The `pipeserve` command: its verbs, whose flags are in `commands/`, and how it ends.

What goes wrong is one line on stderr. Exit codes: 0 done, 1 the run failed, 2 the arguments or the
config are wrong, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer

import pipeserve
from pipeserve.errors import ConfigError, PipeserveError
from pipeserve.launch.commands.bench import bench
from pipeserve.launch.commands.calibrate import calibrate
from pipeserve.launch.commands.chat import chat
from pipeserve.launch.commands.doctor import doctor
from pipeserve.launch.commands.generate import generate
from pipeserve.launch.commands.report import report
from pipeserve.launch.commands.serve import serve
from pipeserve.launch.commands.simulate import simulate
from pipeserve.launch.commands.tune import tune

# typer may carry its own copy of click, so its classes are reached through what typer exports.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    help="Serve one large language model over several devices as a pipeline.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (generate, serve, chat, bench, doctor, calibrate, simulate, tune, report):
    app.command()(verb)


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
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    if version:
        print(pipeserve.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


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
