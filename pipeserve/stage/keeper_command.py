"""The command that a launcher starts for each rank: its keeper.

    python -m pipeserve.launch.keeper --control HOST:PORT                    (RANK, WORLD_SIZE set)
    torchrun --nproc-per-node 2 -m pipeserve.launch.keeper --control HOST:PORT

It ends when the driver says so (exit code 0), is gone (1) or will not have it (2). SIGTERM and
SIGINT come to all processes of a service, and its server may have requests to finish: `Endings`.
"""

import argparse
import os
import signal
import sys
import time

from pipeserve.addresses import split_address
from pipeserve.errors import ConfigError
from pipeserve.stage.keeper import Keeper
from pipeserve.wire.listener import is_loopback
from pipeserve.wire.secret import control_secret

_ONE_PRESS_S = 1.0
"""What comes within is one and the same: a launcher hands on what reaches its processes anyway."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeserve.launch.keeper", description=__doc__)
    parser.add_argument(
        "--control",
        default=os.environ.get("PIPESERVE_CONTROL"),
        help="HOST:PORT of the driver (default: $PIPESERVE_CONTROL)",
    )
    parser.add_argument(
        "--control-secret",
        metavar="FILE",
        help="file with the secret that the driver has, too (default: $PIPESERVE_CONTROL_SECRET)",
    )
    parser.add_argument("--rank", type=int, default=os.environ.get("RANK"))
    parser.add_argument("--world-size", type=int, default=os.environ.get("WORLD_SIZE"))
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to look for the driver (default: 120)",
    )
    parser.add_argument(
        "--host",
        default="",
        metavar="ADDRESS",
        help="of this machine, by which others reach the rank's stage (default: that by which it "
        "reaches the driver)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=40,
        metavar="SECONDS",
        help="how long to go on after SIGTERM or Ctrl-C while the driver does (default: 40); a "
        "second one ends it at once",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when standard input does; its first line is the secret, in hexadecimal digits",
    )
    arguments = parser.parse_args()
    for name in ("control", "rank", "world_size"):
        if getattr(arguments, name) is None:
            parser.error(f"--{name.replace('_', '-')} is needed where the launcher does not set it")
    return arguments


def _find_secret(arguments: argparse.Namespace) -> bytes:
    """Empty: none was given, and none is needed. Raises ConfigError."""
    if arguments.until_stdin_closes:
        return bytes.fromhex(sys.stdin.readline())
    secret = control_secret(arguments.control_secret)
    try:
        host, _ = split_address(arguments.control)
        is_near = secret is not None or is_loopback(host)
    except ValueError:
        raise ConfigError(
            f"--control {arguments.control!r} is not HOST:PORT, such as 10.0.0.1:29600 or "
            "[::1]:29600"
        ) from None
    except OSError:  # a name that nobody knows yet
        is_near = False
    if not is_near:
        raise ConfigError(
            f"the driver at {arguments.control} is on another machine, which takes a shared "
            "secret: give driver and keepers the same --control-secret FILE or "
            "PIPESERVE_CONTROL_SECRET"
        )
    return secret or b""


class Endings:
    """What SIGTERM and SIGINT do. A keeper that has joined goes on, within a time, while its driver
    does: that one may have got the same signal, and be draining."""

    def __init__(self, keeper: Keeper, timeout_s: int) -> None:
        self._keeper, self._timeout_s = keeper, timeout_s
        self._asked_s: float | None = None
        signal.signal(signal.SIGALRM, self._time_is_up)

    def came(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if not self._keeper.has_joined or not self._timeout_s:
            raise SystemExit(128 + signum)
        if self._asked_s is None:
            self._asked_s = now
            signal.alarm(self._timeout_s)
        elif now - self._asked_s > _ONE_PRESS_S:
            raise SystemExit(128 + signum)

    def _time_is_up(self, signum: int, frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)


def _end_on_signal(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, _end_on_signal)
    signal.signal(signal.SIGINT, _end_on_signal)
    try:
        secret = _find_secret(arguments)
    except ConfigError as error:
        print(f"error: keeper of rank {arguments.rank}: {error}", file=sys.stderr)
        sys.exit(2)
    keeper = Keeper(
        arguments.control,
        int(arguments.rank),
        int(arguments.world_size),
        arguments.join_timeout,
        secret,
        arguments.host,
    )
    endings = Endings(keeper, arguments.shutdown_timeout)
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, endings.came)
    if arguments.until_stdin_closes:
        keeper.end_with_driver()
    exit_code = keeper.run()
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):  # it ends already
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
