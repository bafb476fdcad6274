"""What a driver waits for before it can go on. Every wait has an end, at which it names who did not
come; and none goes on when somebody is lost.
"""

import time
from collections.abc import Callable

from pipeserve.driver import starting
from pipeserve.driver.events import Lost, Ready, Received
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.joining import check_addresses, nobody_came
from pipeserve.wire import control

_LOOK_S = 0.5


def wait_for_keepers(fleet: Fleet, on_progress: Callable[[str], None]) -> None:
    """Until every rank's keeper has joined. Raises StageError when one does not."""
    join_s, num_ranks = fleet.config.join_timeout, fleet.topology.num_ranks
    deadline = time.monotonic() + join_s
    while len(fleet.keepers) < num_ranks:
        on_progress(f"waiting for keepers: {len(fleet.keepers)} of {num_ranks} joined")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            missing = sorted(set(range(num_ranks)) - set(fleet.keepers))
            raise nobody_came(missing, fleet.address, join_s, fleet.turned_away)
        _check(fleet, fleet.receive(min(left_s, _LOOK_S)))
    check_addresses(fleet.keepers, fleet.address)


def wait_until_ready(
    fleet: Fleet, on_progress: Callable[[str], None]
) -> tuple[control.StageReady, ...]:
    """Of each rank, once all stages that were started can take a step. Raises StageError, or
    ConfigError, when one is lost."""
    on_progress("starting stages")
    others: list[Received] = []
    ready = None
    while ready is None:
        for received in _check(fleet, fleet.receive(_LOOK_S)):
            if isinstance(received.message, Ready):
                ready = received.message
            else:
                others.append(received)
        on_progress(fleet.how_far())
    fleet.keep(others)
    return ready.stages


def gather_memory(fleet: Fleet) -> list[control.Memory]:
    """Ask every rank's stage for its peak memory. Only while no microbatch is outstanding. Raises
    StageError when one does not answer."""
    fleet.broadcast(control.ReportMemory())
    deadline = time.monotonic() + starting.ANSWER_S
    ranks = range(fleet.topology.num_ranks)
    answers: dict[int, control.Memory] = {}
    others: list[Received] = []
    while missing := [rank for rank in ranks if rank not in answers]:
        if time.monotonic() > deadline:
            what = "said what memory it has used"
            raise starting.no_answer(missing, what, fleet.topology, fleet.keepers).error()
        for received in _check(fleet, fleet.receive(_LOOK_S)):
            if isinstance(received.message, control.Memory):
                answers[received.rank] = received.message
            else:
                others.append(received)
    fleet.keep(others)
    return [answers[rank] for rank in ranks]


def _check(fleet: Fleet, came: list[Received]) -> list[Received]:
    """The same. Raises StageError, or ConfigError, when it tells of a loss, which goes for whoever
    receives after that, too."""
    for received in came:
        if isinstance(received.message, Lost):
            fleet.keep(came)
            raise received.message.error()
    return came
