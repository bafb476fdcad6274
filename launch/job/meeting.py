"""Where the ranks of a job meet: the address that the driver listens at and keepers join, and the
secret by which they know each other.
"""

import secrets
import socket
from typing import NamedTuple

from pipeserve.addresses import join_address, split_address
from pipeserve.configs import RunConfig
from pipeserve.errors import ConfigError
from pipeserve.launch.job import mpi
from pipeserve.launch.job.addresses import address_of, leaders_address, names_this_machine_alone
from pipeserve.launch.job.place import VARIABLES_ALONE, Place
from pipeserve.wire.secret import VARIABLE, control_secret

MAKE_SECRET = "python3 -c 'import secrets; print(secrets.token_hex())'"
_HERE = "127.0.0.1"


class Meeting(NamedTuple):
    """Of one job, as one of its processes sees it."""

    control: str
    """HOST:PORT: of the leader, where it listens; of the others, where they find it."""
    secret: bytes
    """Empty: nobody beyond this machine can come."""


def find_meeting(place: Place, config: RunConfig, interface: str | None) -> Meeting:
    """`interface`: of this machine, by which the others reach it, where that was given.

    Raises ConfigError: no secret, no address.
    """
    secret = control_secret(config.control_secret)
    if config.control is None and place.launcher == "MPI":
        return _told_by_mpi(place, secret, interface)
    host, port = place.leader, place.port
    if config.control is not None:
        host, port = split_address(config.control)
    is_here = place.size == place.local_size or names_this_machine_alone(host)
    if is_here and not _is_known_elsewhere(place, secret):
        return Meeting(config.control or join_address(_HERE, port), secret or b"")
    if secret is None:
        raise ConfigError(
            f"{place.launcher} has started ranks on several machines, which takes a secret that "
            f"they share: {VARIABLE}, or --control-secret FILE, the same on each; this makes one: "
            f"{MAKE_SECRET}"
        )
    if place.index == 0 and config.control is None:
        host = address_of(interface) if interface else leaders_address(host)
    return Meeting(join_address(host, port), secret)


def _is_known_elsewhere(place: Place, secret: bytes | None) -> bool:
    """Kubeflow tells the leader of a PyTorchJob that it is localhost, and the others its name
    (kubeflow/trainer#2331). Who runs all on one machine so has no secret."""
    is_one_of_several = place.launcher == VARIABLES_ALONE and place.local_size < place.size
    return is_one_of_several and place.index == 0 and secret is not None


def _told_by_mpi(place: Place, secret: bytes | None, interface: str | None) -> Meeting:
    """By the leader, over MPI, so that port and secret can be any."""
    told: tuple[str, bytes] | str | None = None
    if place.index == 0:
        try:
            host = _HERE
            if place.size > place.local_size:
                host = address_of(interface) if interface else leaders_address(socket.gethostname())
            told = join_address(host, _free_port(host)), secret or secrets.token_hex(32).encode()
        except ConfigError as error:
            told = str(error)  # who waits for it at the broadcast has to hear that, too
    told = mpi.broadcast(told)
    if isinstance(told, str):
        raise ConfigError(told)
    return Meeting(*told)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return int(probe.getsockname()[1])
