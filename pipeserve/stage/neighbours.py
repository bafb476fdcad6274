"""How a stage and its neighbours find each other: it listens for those that send to it, and
connects to those that it sends to, once the driver has said where they are."""

import time
from collections.abc import Callable
from typing import NamedTuple

from pipeserve.wire import connecting
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import Connect
from pipeserve.wire.links import ActivationLinks, RowLinks
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage

_CONNECT_S = 10.0


class Opening(NamedTuple):
    """A connection to a neighbour that is about to be."""

    connection: Connection
    address: str
    reach: Callable[[str, Sources], Connection]
    until_s: float

    def goes_on(self) -> "Opening | None":
        """None: it is there. Raises ConnectionError when it will not be."""
        if self.connection.is_open:
            return None
        if not self.connection.has_ended:
            return self
        why = self.connection.refusal
        if self.connection.is_refused or time.monotonic() > self.until_s:
            raise ConnectionError(f"{self.address.partition('/')[0]} hung up: {why}")
        return self._replace(connection=self.reach(self.address, self.connection.sources))


class Neighbours:
    """Of one stage: the ends of its links."""

    def __init__(self, job: StartStage, links: ActivationLinks, sources: Sources) -> None:
        """Listens for the stage before, or on the first one for the last one's tokens; where both
        ends have the head, each for the other."""
        self._links = links
        self._sources = sources
        self.opening: list[Opening] = []
        """Those that have not answered yet, as far as `look` has seen."""
        self._tokens: Listener | None = None
        self.other_end: Connection | None = None
        """Where the tokens go that this stage samples; None where nobody else needs them."""
        self.rows = RowLinks()
        self.activations_at = self.tokens_at = self.rows_at = ""
        if not job.is_first:
            self.activations_at = links.listen(job.host, sources)
        is_end = job.is_first != job.is_last
        if is_end and (job.is_first or job.shares_head):
            self._tokens = Listener(job.host, sources, ("tokens",), once=True)
            self.tokens_at = self._tokens.address
        if is_end and job.is_first and job.shares_head:
            self.rows_at = self.rows.listen(job.host, sources)

    def close(self) -> None:
        """All links: one of those at their other ends is gone."""
        self._links.close()
        self.rows.close()
        for opening in self.opening:
            opening.connection.close()
        self.opening = []
        if self._tokens is not None:
            self._tokens.hang_up()
        if self.other_end is not None:
            self.other_end.close()

    def connect(self, addresses: Connect) -> None:
        """To those that this stage sends to, who take a moment to answer."""
        until_s = time.monotonic() + _CONNECT_S
        for address, reach in (
            (addresses.next_stage, self._links.connect),
            (addresses.other_end, self._reach_other_end),
            (addresses.rows, self.rows.connect),
        ):
            if address:
                opening = Opening(reach(address, self._sources), address, reach, until_s)
                self.opening.append(opening)

    def look(self) -> None:
        """Who has answered. One that hung up may have been displaced by strangers: it is called
        again."""
        self.opening = [again for opening in self.opening if (again := opening.goes_on())]

    def _reach_other_end(self, address: str, sources: Sources) -> Connection:
        self.other_end = connecting.connect(address, sources, "tokens")
        return self.other_end
