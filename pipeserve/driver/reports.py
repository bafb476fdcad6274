"""What stages and their keepers tell beside results: when they computed what, and that they live.

It goes into the run's records, to the cost model, and to who watches for stages that hang.
"""

import time

from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.records import Ping, Span
from pipeserve.core.topology import Topology
from pipeserve.driver.events import Received
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.stage_watch import StageWatch
from pipeserve.wire import control
from pipeserve.wire.step_messages import HeadTiming, Timing

_LOOK_EVERY_S = 0.05
"""For hangs, which last longer: looking after every message would cost the driver CPU time."""


class Reports:
    """Of one run."""

    def __init__(
        self, topology: Topology, fleet: Fleet, engine: Engine, watch: StageWatch, journal: Journal
    ) -> None:
        self.num_spans_due = 0
        """Of microbatches that were planned since the stages were started last."""
        self._next_look_s = 0.0
        self._topology, self._fleet = topology, fleet
        self._engine, self._watch, self._journal = engine, watch, journal

    def take(self, received: Received) -> None:
        """One of them; others are ignored."""
        message = received.message
        match message:
            case Timing(span):
                self.num_spans_due -= 1
                self._watch.computed(span, received.at_s)
                self._journal.computed(span)
                ready_s = max(span.plan_s, span.input_s)
                self._engine.observe(span.index, span.stage, ready_s, span.start_s, span.end_s)
            case HeadTiming(headed):
                self.num_spans_due -= 1
                self._watch.answered(headed.stage)
                self._journal.computed(headed)
                self._engine.observe_head(headed.index, headed.start_s, headed.end_s)
            case control.Heartbeat():
                self._watch.answered(self._stage_of(received))
            case control.HeartbeatAnswer(sent_s, remote_s) if self._speaks(received):
                stage = self._stage_of(received)
                self._watch.signs(stage, message, received.at_s)
                if self._fleet.is_remote(received.rank):
                    self._journal.pinged(Ping(stage, sent_s, remote_s, received.at_s))
            case control.LastSpans(spans) if self._speaks(received):
                for span in spans:
                    self._outlived(span)

    def _outlived(self, span: Span) -> None:
        """One of a stage that has ended, which may not have come to tell it."""
        if span.index > self._watch.done[span.stage]:
            self._watch.done[span.stage] = span.index
            self._journal.computed(span)

    def _stage_of(self, received: Received) -> int:
        return self._topology.stage_of(received.rank)

    def _speaks(self, received: Received) -> bool:
        return self._topology.speaks(received.rank)

    def look_for_hangs(self, looked_s: float) -> None:
        """A stage that does not do what it owes is lost, as the fleet tells next. `looked_s`: all
        that had come by then was taken."""
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + _LOOK_EVERY_S
        if self._watch.wants_to_ask(now):
            self._fleet.broadcast(control.Heartbeat(now))
        overdue = self._watch.overdue(looked_s)
        if overdue is not None:
            rank = self._topology.speaker(overdue.stage)
            name, host = self._topology.name(rank), self._fleet.keepers[rank].host
            self._fleet.give_up(rank, f"{name} (on {host}) {overdue}")
