"""One stage process: a single loop that receives what has arrived, begins what can be begun, and
takes the end of what is computed. What computing is, a `Compute` says (`compute.py`). All else is
here, the same for every kind of stage, without torch.

The next microbatch, strictly by index, needs its plan (control), its activations (from the previous
stage) and, on the first stage, the tokens that are still on their way (from the last stage). Where
the first stage has the head, too, it applies that in between, to rows that the last one sends back:
before anything else, for the next microbatch may be waiting for them. All of these are polled
together, so nothing can block the stage but its own computing. No thread of ours
runs beside it, but the one that sends on what the kernel does not take of a large activation.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any

import msgspec

from pipeserve.core.records import Headed, Span
from pipeserve.stage.compute import Compute, Done, Tell, Turn
from pipeserve.stage.memory import peak_bytes
from pipeserve.stage.neighbours import Neighbours
from pipeserve.stage.sequences import Sequences
from pipeserve.wire import control
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import Connect, Examine, Heartbeat, Renew, ReportMemory, TakeMemory
from pipeserve.wire.links import send_tokens, unpack_sampled
from pipeserve.wire.sources import Source, Sources
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import HeadTiming, Sampled, Step, Timing

_LULL_S = 0.2
"""Without a microbatch: longer than it mostly takes until the next one comes."""


class StageLoop:
    """Replays the driver's steps, one after the other. Decides nothing."""

    def __init__(
        self,
        job: StartStage,
        epoch: int,
        sources: Sources,
        driver: Connection,
        make: Callable[[StartStage, Tell], Compute],
        baseline: int,
        keep: Callable[[Span], None] = lambda span: None,
    ) -> None:
        """`baseline`: bytes of this process's memory, before all that the stage takes. `keep`:
        called with each span at once, before it is told."""
        self.job = job
        # Asked for several times for each microbatch.
        self._is_first, self._is_last, self._speaks = job.is_first, job.is_last, job.speaks
        self._embeds_or_shares = job.is_first or (job.is_last and job.shares_head)
        self.epoch = epoch
        self.sources = sources
        self.driver = driver
        self.has_memory = False
        self.baseline = baseline
        self._make = make
        self.keep = keep
        self.compute = make(job, self.tell)
        self._start_epoch()

    def _start_epoch(self) -> None:
        """With nothing in hand."""
        self.plans: deque[tuple[Step, float]] = deque()
        """Not begun, each with the time when it was seen."""
        self.begun: deque[tuple[Turn, Any]] = deque()
        """Not ended, each with what the compute keeps of it."""
        self.unheaded: deque[Turn] = deque()
        """On the first stage, those whose rows come back for the head."""
        self.ended_s: float | None = None
        """When the last one ended; None where all that came meanwhile is taken."""
        self.untold: Span | None = None
        """Of what ended last, if it sampled nothing, until the driver is told."""
        self._at_work_s = -inf
        """When it was last given a plan, or had ended one; before the first, long ago."""
        self.stands_still = False
        """It has lost a rank that shares the stage, and computes nothing more in this epoch."""
        self.sequences = Sequences()
        self.neighbours = Neighbours(self.job, self.compute.links, self.sources)
        self.tell(self.compute.size)

    def wait_for_memory(self) -> None:
        """Until the driver has said how much to take, and it is taken."""
        while not self.has_memory:
            self._receive(may_wait=True)

    def run(self) -> None:
        """Until the keeper ends this process."""
        while True:
            self.go_round()

    def go_round(self, may_wait: bool = True) -> None:
        """Once. Where it may wait, it does so while there is nothing else to do."""
        if self.begun:  # the device has its next one
            self._tell_times()
        self._receive(may_wait and self._has_nothing_to_do())
        while self._can_begin():
            self._begin()
        self._tell_times()  # not before the next microbatch has begun, if it can
        if self.unheaded and self.neighbours.rows.ready(self.unheaded[0].step.index):
            self._apply_head()
        elif self.begun and (self._is_full() or self.compute.left_s(self.begun[0][1]) <= 0):
            self._end()

    def close(self) -> None:
        self.sources.close()

    # ---- what is told ---------------------------------------------------------------------------

    def tell(self, message: control.ToDriver) -> None:
        self.driver.send(control.encode(message, self.epoch))

    def _report(self, *messages: Sampled | Timing | HeadTiming) -> None:
        """What the stage did, at once, for each time the driver wakes takes some of the first
        stage's core where it has none of its own. Of the stage's ranks, one tells."""
        if self._speaks:
            self.driver.send(*[control.encode(message, self.epoch) for message in messages])

    def _tell_times(self) -> None:
        self.ended_s = None
        if self.untold is not None:
            self._report(Timing(self.untold))
            self.untold = None

    def _take_memory(self, num_blocks: int, meet_at: str) -> None:
        """Once; and each time with who shares the stage, if somebody does."""
        try:
            have_come = not meet_at or self.compute.meet(meet_at)
        except ConnectionError as error:
            have_come = False
            self._give_up(error)
        if not have_come:
            self._stand_still()
            return
        if not self.has_memory:
            self.compute.take_memory(num_blocks)
            self.has_memory = True
        self.tell(
            control.StageReady(
                pid=os.getpid(),
                host=self.job.host,
                activations_at=self.neighbours.activations_at,
                tokens_at=self.neighbours.tokens_at,
                rows_at=self.neighbours.rows_at,
                baseline_bytes=self.baseline,
                weight_bytes=self.compute.weight_bytes,
                kv_bytes=self.compute.kv_bytes,
                cpus=sorted(os.sched_getaffinity(0)),
                num_threads=self.compute.num_threads,
            )
        )

    # ---- what arrives ---------------------------------------------------------------------------

    def _has_nothing_to_do(self) -> bool:
        """Until something comes. Sleeps first while the device needs nothing."""
        if self.ended_s is not None:
            return False
        if self.begun:
            time.sleep(self.compute.left_s(self.begun[0][1]))
        return not self.begun

    def _receive(self, may_wait: bool) -> None:
        """Take everything that has arrived; where it may wait, something has.

        What came while the stage ended a microbatch, however late it is taken, was not waited for:
        it counts as seen at that end.
        """
        for source in self._wait() if may_wait else self.sources.ready(0):
            messages = source.receive()
            seen_s = time.monotonic() if self.ended_s is None else self.ended_s
            match source.carries:
                case "stage":  # the driver's words to it
                    for message in messages:
                        self._obey(*control.decode_for_stage(message), seen_s)
                case "activations":
                    self.compute.links.came(messages, seen_s)
                case "rows":
                    self.neighbours.rows.came(messages, seen_s)
                case "tokens":
                    for message in messages:
                        self.sequences.take_tokens(*unpack_sampled(message), seen_s)
        if self.neighbours.opening:
            self._look_at_neighbours()
        if self.driver.has_ended:
            sys.exit(1)  # as its keeper would have it

    def _wait(self) -> list[Source]:
        """For something to come. Once no microbatch has for a while, what is to be done some time
        is done meanwhile, a moment's worth at a time. Not between microbatches: the next would
        often come in such a moment (of memory: up to 5 ms), and wait for its end. Who only asks
        for a sign of life, however often, does not put it off."""
        left_s = max(self._at_work_s + _LULL_S - time.monotonic(), 0.0)
        found = self.sources.ready(1000 * left_s)
        while not found and self.compute.prepare():
            found = self.sources.ready(0)
        return found or self.sources.ready(None)

    def _obey(self, epoch: int, message: control.ToStage, seen_s: float) -> None:
        if isinstance(message, Renew):
            self._renew(epoch, message.work)
        if epoch != self.epoch:
            return
        match message:
            case Step():
                self.plans.append((message, seen_s))
                self._at_work_s = seen_s
            case TakeMemory(num_blocks, meet_at):
                self._take_memory(num_blocks, meet_at[self.job.stage] if meet_at else "")
            case Connect():
                self._connect(message)
            case Heartbeat():
                self.tell(message)
            case Examine(works, seconds):
                self.tell(self.compute.examine(works, seconds))
            case ReportMemory():
                self.tell(control.Memory(peak_bytes()))

    def _renew(self, epoch: int, work: bytes) -> None:
        """Forgets all that this epoch was about; weights and the room for KV stay. Before it
        has any, it may be given other work."""
        self.epoch = epoch
        self.neighbours.close()
        self.compute.part()
        if work != self.job.work:
            self.job = msgspec.structs.replace(self.job, work=work)
            self.compute = self._make(self.job, self.tell)
        self._start_epoch()

    def _connect(self, addresses: Connect) -> None:
        links = self.compute.links
        links.sends_part, links.gets_part = addresses.sends_part, addresses.gets_part
        try:
            self.neighbours.connect(addresses)
        except ConnectionError as error:
            self._give_up(error)
        else:
            self._look_at_neighbours()

    def _look_at_neighbours(self) -> None:
        """Tells the driver once all of them have answered, or that one does not."""
        try:
            self.neighbours.look()
        except ConnectionError as error:
            self._give_up(error)
        else:
            if not self.neighbours.opening:
                self.tell(control.Connected())

    def _give_up(self, error: ConnectionError) -> None:
        """Until the driver knows better: it may be the neighbour that is gone."""
        self.neighbours.close()
        self.tell(control.Unreached(str(error)))

    # ---- one microbatch -------------------------------------------------------------------------

    def _is_full(self) -> bool:
        """Nothing that comes could be begun before an end is taken."""
        return len(self.begun) >= self.compute.most_begun

    def _can_begin(self) -> bool:
        """Whether plan, activations and tokens of the next microbatch are all here."""
        if not self.plans or self._is_full() or self.stands_still:
            return False
        step = self.plans[0][0]
        if not (self._is_first or self.compute.links.ready(step.index)):
            return False
        return not self._embeds_or_shares or self.sequences.has_tokens_for(step)

    def _begin(self) -> None:
        """The next microbatch."""
        step, plan_s = self.plans.popleft()
        sequences = self.sequences.apply(step)
        if self._is_first:
            activations, input_s = None, max([sequence.token_s for sequence in sequences])
        else:
            activations, input_s = self.compute.links.take(step.index)
        if self._is_first or self._is_last:
            self.sequences.await_tokens(step, sequences)
        turn = Turn(step, sequences, activations, plan_s, input_s)
        if self._is_first and step.head_at_first:
            self.unheaded.append(turn)
        self.begun.append((turn, self.compute.begin(turn)))

    def _end(self) -> None:
        """The microbatch that was begun first."""
        turn, computing = self.begun.popleft()
        done = self.compute.end(computing, self._feed_back)
        if done is None:
            self._stand_still()
            return
        if done.rows is not None:
            self.neighbours.rows.send(turn.step.index, done.rows)
        span = self._span(turn, done)
        self.keep(span)
        if done.sampled is None:  # told later: what the next stage or microbatch needs comes first
            self.untold = span
        self._ended(Timing(span), span.end_s, done)

    def _apply_head(self) -> None:
        """To the rows that have come back first."""
        turn = self.unheaded.popleft()
        rows, input_s = self.neighbours.rows.take(turn.step.index)
        done = self.compute.apply_head(turn._replace(activations=rows), self._feed_back)
        headed = Headed(
            stage=self.job.stage,
            index=turn.step.index,
            input_s=input_s,
            start_s=done.start_s,
            end_s=done.end_s,
            sent_s=done.sent_s,
            cpu_s=done.cpu_s,
            between_cpu_s=done.between_cpu_s,
        )
        self._ended(HeadTiming(headed), headed.end_s, done)

    def _ended(self, timing: Timing | HeadTiming, end_s: float, done: Done) -> None:
        """What it sampled is told, with its times, and kept for what samples next."""
        self.ended_s, self._at_work_s = end_s, time.monotonic()
        sampled = done.sampled
        if sampled is None:
            return
        self._report(sampled, timing)
        if sampled.tokens:
            self.sequences.take_tokens(sampled.index, sampled.tokens, sampled.counts, done.sent_s)

    def _stand_still(self) -> None:
        """Until the driver says what comes next: it knows by now, or will soon, who is gone."""
        self.compute.part()
        self.begun.clear()
        self.stands_still = True

    def _feed_back(self, index: int, tokens: list[int], counts: bytes) -> None:
        """What this stage sampled, to the other end before anything else, for it may be waiting."""
        if tokens and self.neighbours.other_end is not None:
            send_tokens(self.neighbours.other_end, index, tokens, counts)

    def _span(self, turn: Turn, done: Done) -> Span:
        return Span(
            stage=self.job.stage,
            index=turn.step.index,
            num_tokens=sum([chunk.stop - chunk.start for chunk in turn.step.chunks]),
            plan_s=turn.plan_s,
            input_s=turn.input_s,
            start_s=done.start_s,
            head_s=done.head_s,
            end_s=done.end_s,
            sent_s=done.sent_s,
            cpu_s=done.cpu_s,
            between_cpu_s=done.between_cpu_s,
            num_bytes=done.num_bytes,
            all_reduce_s=done.all_reduce_s,
            rank_wait_s=done.rank_wait_s,
        )
