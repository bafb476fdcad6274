"""What a driver waits for before it can go on. Every wait has an end, at which it names who did not
come; and none goes on when somebody is lost.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeserve.core.work import Work
from pipeserve.driver import starting
from pipeserve.driver.events import Lost, Ready, Received, Sized
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.joining import check_addresses, nobody_came
from pipeserve.wire import control

_LOOK_S = 0.5
_SLOWEST = 5
"""Load timeouts that timing may take: one large layer on a slow core takes a minute. A stage that
dies meanwhile is told at once."""
_Awaited = TypeVar("_Awaited", Sized, Ready)


def wait_for_keepers(fleet: Fleet, on_progress: Callable[[str], None]) -> None:
    """Until every rank's keeper has joined. Raises StageError when one does not."""
    join_s, num_ranks = fleet.config.join_timeout, fleet.topology.num_ranks
    deadline = time.monotonic() + join_s
    while len(fleet.keepers) < num_ranks:
        on_progress(f"waiting for keepers: {len(fleet.keepers)} of {num_ranks} joined")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            missing = sorted(set(range(num_ranks)) - set(fleet.keepers))
            raise nobody_came(
                missing,
                fleet.topology,
                fleet.keepers,
                fleet.config,
                fleet.address,
                fleet.turned_away,
            )
        _check(fleet, fleet.receive(min(left_s, _LOOK_S)))
    check_addresses(fleet.keepers, fleet.address)


def wait_until_sized(
    fleet: Fleet, on_progress: Callable[[str], None]
) -> tuple[control.StageSized, ...]:
    """What each rank says that it will take, once all that were started have. Raises StageError, or
    ConfigError, when one is lost."""
    on_progress("starting stages")
    return _wait_for(Sized, fleet, on_progress).stages


def wait_until_ready(
    fleet: Fleet, on_progress: Callable[[str], None]
) -> tuple[control.StageReady, ...]:
    """Of each rank, once all stages can take a step. Raises StageError, or ConfigError, when one is
    lost."""
    return _wait_for(Ready, fleet, on_progress).stages


def _wait_for(kind: type[_Awaited], fleet: Fleet, on_progress: Callable[[str], None]) -> _Awaited:
    """The event of that kind."""
    others: list[Received] = []
    event = None
    while event is None:
        for received in _check(fleet, fleet.receive(_LOOK_S)):
            if isinstance(received.message, kind):
                event = received.message
            else:
                others.append(received)
        on_progress(fleet.how_far())
    fleet.keep(others)
    return event


def gather_memory(fleet: Fleet) -> list[control.Memory]:
    """Ask every rank's stage for its peak memory. Only while no microbatch is outstanding. Raises
    StageError when one does not answer."""
    question, what = control.ReportMemory(), "said what memory it has used"
    return _gather(control.Memory, fleet, question, what, starting.ANSWER_S)


def gather_examined(fleet: Fleet, works: Sequence[Work], seconds: float) -> list[control.Examined]:
    """Have every rank's stage time these microbatches, for about so long, all at once. Only while
    no microbatch is outstanding. Raises StageError when one does not answer."""
    question, what = control.Examine(tuple(works), seconds), "timed its layers"
    limit_s = seconds + _SLOWEST * fleet.config.load_timeout
    return _gather(control.Examined, fleet, question, what, limit_s)


_Answer = TypeVar("_Answer", control.Memory, control.Examined)


def _gather(
    kind: type[_Answer], fleet: Fleet, question: control.ToStage, what: str, limit_s: float
) -> list[_Answer]:
    """Of every rank, its answer of that kind, within so long."""
    fleet.broadcast(question)
    deadline = time.monotonic() + limit_s
    ranks = range(fleet.topology.num_ranks)
    answers: dict[int, _Answer] = {}
    others: list[Received] = []
    while missing := [rank for rank in ranks if rank not in answers]:
        fleet.begin_loading()  # not before they have answered
        if time.monotonic() > deadline:
            raise starting.no_answer(missing, what, fleet.topology, fleet.keepers, limit_s).error()
        for received in _check(fleet, fleet.receive(_LOOK_S)):
            if isinstance(received.message, kind):
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
