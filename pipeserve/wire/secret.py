"""The secret that driver and keepers share, so that they may find each other beyond one machine."""

import os
import stat
import sys
from pathlib import Path

from pipeserve.errors import ConfigError

VARIABLE = "PIPESERVE_CONTROL_SECRET"
_MOST_BYTES = 4096


def control_secret(file: str | None) -> bytes | None:
    """What `--control-secret FILE` holds, or else the variable; None: neither was given. A newline
    at its end is none of it.

    Raises ConfigError for what is empty, too long to be meant, or cannot be read.
    """
    if file is not None:
        return _checked(_read(Path(file)), f"--control-secret {file}")
    if VARIABLE in os.environ:
        return _checked(os.environb[VARIABLE.encode()], VARIABLE)
    return None


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            content = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--control-secret {file}: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        print(
            f"warning: --control-secret {file} can be read by others on this machine "
            f"(mode {status.st_mode & 0o777:o}); chmod 600 it",
            file=sys.stderr,
        )
    return content


def _checked(content: bytes, whence: str) -> bytes:
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{whence} holds over {_MOST_BYTES} bytes; is it another file?")
    secret = content.rstrip(b"\r\n")
    if not secret:
        raise ConfigError(
            f"{whence} is empty; give a secret, as `openssl rand -hex 32` makes, or leave it out"
        )
    return secret
