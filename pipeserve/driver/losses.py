"""What becomes of a run whose stages are lost: it goes on in a fresh epoch, from the last token of
each request, or it ends. The one place that decides it; the driver does what follows."""

import sys
import time

from pipeserve.configs import RunConfig
from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Output
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Lost, Received
from pipeserve.driver.recovery import Restarts, Suspects
from pipeserve.driver.stage_watch import StageWatch


class Losses:
    """Of one run."""

    def __init__(
        self,
        topology: Topology,
        config: RunConfig,
        engine: Engine,
        watch: StageWatch,
        journal: Journal,
    ) -> None:
        self.trouble = ""
        """Who was lost, and why: the stages take no steps now; empty: they do."""
        self.counts = [0] * topology.num_stages
        """Of each stage."""
        self.final: Lost | None = None
        """That ends the run, once what came before it was handed on."""
        self.suspects = Suspects(engine)
        self._topology, self._may_restart = topology, config.restart
        self._restarts = Restarts(topology, config.max_restarts, config.restart_window)
        self._engine, self._watch, self._journal = engine, watch, journal
        self._began_s = 0.0
        """The trouble."""

    def take(self, received: Received) -> Output | None:
        """A stage was lost: all that is outstanding is void, and its requests wait to be computed
        again; or, if `final` is set then, the run ends. Returns the end of a request that is to
        blame."""
        stage, lost = self._topology.stage_of(received.rank), received.message
        now = time.monotonic()
        self._journal.lost(stage, received.at_s, lost.why)
        self.counts[stage] += 1
        if not self.trouble:
            self._began_s = now
        self.trouble = f"{lost.why}; {self._watch.whereabouts(stage)}"
        self.final = lost
        if self._may_restart:
            self.final = self._restarts.end_by(received.rank, lost, now)
        if self.final is not None:
            return None
        _say(f"warning: {self.trouble}; it is started again")
        blamed = None
        for index in self._watch.at_all(stage) if lost.by_work else ():
            blamed = blamed or self.suspects.lost_at(index, lost.why, now)
        if blamed is not None:
            self._journal.finished(blamed, now)
        self._engine.lost(now)
        self.suspects.isolate()
        self._watch.start_again()
        return blamed

    def are_over(self) -> None:
        """All stages are there again."""
        now = time.monotonic()
        self._journal.resumed(now)
        self.trouble = ""
        _say(
            f"all stages are there again after {now - self._began_s:.1f} s; "
            f"{self._engine.num_unfinished} requests go on"
        )

    def check(self) -> None:
        """Raises StageError, or ConfigError, where the run ends by a loss."""
        if self.final is not None:
            raise self.final.error()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
