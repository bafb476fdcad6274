"""The driver: runs the engine on stages. It alone decides; stages replay.

A microbatch's way: `engine.plan` -> one `Step` message to every stage -> stage 0 .. P-1 -> sampled
ids to stage 0 and here -> `engine.complete` -> the client.

A driver is the client (`frontend/client.py`) of whoever is in its process: `submit`, `abort`,
`outputs`. Who waits for outputs there lets it work meanwhile, a `step` at a time.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from pipeserve.configs import RunConfig
from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Microbatch, Output, Request, RequestId, Wait
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Completed, Recorder, ignore
from pipeserve.core.topology import Topology
from pipeserve.core.view import Limits
from pipeserve.core.work import Work
from pipeserve.driver.checks import check_request
from pipeserve.driver.events import Lost, Ready, Received, Sized
from pipeserve.driver.first_start import first_start, start_stages
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.losses import Losses
from pipeserve.driver.reports import Reports
from pipeserve.driver.setup import Setup
from pipeserve.driver.stage_info import stage_infos, with_memory
from pipeserve.driver.stage_watch import StageWatch
from pipeserve.driver.waiting import gather_examined, gather_memory, wait_until_ready
from pipeserve.errors import PipeserveError, StageError
from pipeserve.wire import control
from pipeserve.wire.step_messages import Sampled, step_message, step_result

_LOOK_S = 0.1
"""Between two looks for what does not come."""


class Driver:
    """One pipeline, ready to take requests. Nothing happens but in its methods, which one thread
    may call; `abort` may come from anywhere.

    Raises ConfigError (--control is busy, a launcher of another size, a stage refused its input)
    and StageError (a process could not start or died); after either, `close` has been called.
    """

    def __init__(
        self,
        setup: Setup,
        on_progress: Callable[[str], None] = lambda text: None,
        record: Recorder = ignore,
        fleet: Callable[[Topology, RunConfig], Fleet] = Fleet,
        on_plan: Callable[["Driver"], None] = lambda driver: None,
    ) -> None:
        """Returns when all stages are ready. `on_progress` is called with a text, how far they are,
        and `on_plan` once, when it is known what will run where and nothing is loaded yet.
        `record` is called with every record of the run, from within `submit`, `outputs`, `settle`
        and `close`, and must not raise. `fleet` makes what stages are started and reached by."""
        self._may_plan = False
        """Something came since the engine last had no plan; nothing else can give it one."""
        self._progress_s = 0.0
        """When the stages gave a result last, or were given the first microbatch that they owe."""
        self._ended: str | None = None
        self._requests: dict[RequestId, Request] = {}
        self._aborted: deque[tuple[RequestId, str]] = deque()
        """To be ended with the next step, and why."""
        self._early: dict[int, Received] = {}
        """Results that wait for those of earlier microbatches."""
        self._looked_s = 0.0
        """When the fleet was last asked for what came."""
        self.topology, config = Topology.of(setup.plan), setup.config
        self._watch = StageWatch(
            self.topology.num_stages, config.hang_timeout, config.heartbeat_interval
        )
        self.fleet = fleet(self.topology, config)
        try:
            setup, self.sizes = first_start(setup, self.fleet, on_progress)
            """What each rank said that it would take."""
            self._take(setup)
            self._plan_within(setup.limits_for(self.sizes), record)
            on_plan(self)
            self._fill(self.sizes)
            started = wait_until_ready(self.fleet, on_progress)
        except BaseException as error:
            self.fleet.close(str(error) if isinstance(error, PipeserveError) else "")
            raise
        self.stages = stage_infos(self.plan, self.fleet.keepers, started)

    def _take(self, setup: Setup) -> None:
        self.setup = setup
        self.config, self.dtype = setup.config, setup.dtype
        self.shape, self.plan = setup.shape, setup.plan
        self.model_folder, self.model_config = setup.model_folder, setup.model_config

    def _plan_within(self, limits: Limits, record: Recorder) -> None:
        """They hold as long as this driver does, whatever stages it starts again."""
        policy = get_policy(self.config.policy)
        self.engine = Engine(self.plan, policy, limits, self.setup.cost)
        self.journal = Journal(self.engine, record)
        engine, watch, journal = self.engine, self._watch, self.journal
        self.losses = Losses(self.topology, self.config, engine, watch, journal)
        self._reports = Reports(self.topology, self.fleet, engine, watch, journal)

    def _fill(self, sizes: Sequence[control.StageSized]) -> None:
        """All stages, which have said what memory they need."""
        meet_at = tuple(sizes[rank].meets_at for rank in self.topology.speakers)
        self.fleet.broadcast(control.TakeMemory(self.limits.num_blocks, meet_at))

    # ---- what its client calls ------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return () if self.model_config is None else self.model_config.eos_token_ids

    def wake_on(self, descriptor: int) -> None:
        """`outputs` returns, too, when this can be read from: it is where requests come from."""
        self.fleet.wake_on(descriptor)

    def stalled_s(self, now: float) -> float:
        """How long the stages have owed a result and given none; 0 where they owe none."""
        return now - self._progress_s if self.engine.num_outstanding else 0.0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, in this order; the next step plans for all of them. Each one's
        `params.seed` must be set.

        Raises, and then has queued none: CapacityError, ConfigError for token ids that the model
        does not have, and StageError when the pipeline has ended.
        """
        self._check_open()
        for request in requests:
            check_request(request, self.vocab_size, self.limits)
        now = time.monotonic()
        for request in requests:
            self.engine.add(request, now)
            self._requests[request.id] = request
            self.journal.arrived(request, now)
        self._may_plan = True

    def abort(self, request_id: RequestId, reason: str = "abort") -> None:
        """Let a request end with the next step, whatever it is doing; nothing more is said of it.
        Unknown and finished ids are ignored. May be called at any moment and on any thread."""
        self._aborted.append((request_id, reason))

    def outputs(self, timeout_s: float) -> list[Output]:
        """One step. Raises StageError when the run has ended by a loss, and again at every later
        call."""
        self._check_open()
        try:
            return self.step(timeout_s)
        except BaseException as error:
            # Ctrl-C too may come between a plan and its message: what the stages hold and what the
            # engine thinks they hold is no longer sure to be the same.
            has_failed = isinstance(error, PipeserveError)
            self._end(str(error) or f"interrupted by {type(error).__name__}", has_failed)
            raise

    # ---- the loop -------------------------------------------------------------------------------

    def step(self, timeout_s: float) -> list[Output]:
        """Plan what can be planned, then take what the stages said, waiting at most `timeout_s` for
        the first of it. Returns what became known, in order; may be empty."""
        self.losses.check()
        self._end_aborted()
        self._plan_all()
        outputs: list[Output] = []
        are_computing = self.engine.num_outstanding > 0
        if self.losses.trouble or are_computing:
            timeout_s = min(timeout_s, _LOOK_S)
        self._looked_s = time.monotonic()
        for received in self.fleet.receive(timeout_s, for_result=are_computing):
            if received.epoch != self.fleet.epoch:
                continue  # from before a loss: all of that is void
            match received.message:
                case Sampled():
                    for result in self._in_order(received):
                        outputs += self._complete(result)
                        self._plan_all()  # at once: the plan for the first of two is not late
                case Lost():
                    outputs += self._lose(received)
                case Sized(sizes):
                    self._fill(sizes)
                case Ready(stages):
                    self._go_on(stages)
                case _:
                    self._reports.take(received)
        if not self.losses.trouble:
            self._reports.look_for_hangs(self._looked_s)
        if not outputs:
            self.losses.check()
        return outputs

    def _end_aborted(self) -> None:
        while self._aborted:
            request_id, reason = self._aborted.popleft()
            now = time.monotonic()
            output = self.engine.finish(request_id, reason, now)
            if output is not None:
                del self._requests[request_id]
                self.losses.suspects.forget(request_id)
                self.journal.finished(output, now)
                self._may_plan = True

    def _plan_all(self) -> None:
        """Fill the window."""
        while self._may_plan and not self.losses.trouble:
            now = time.monotonic()
            planned = self.engine.plan(now)
            if isinstance(planned, Wait):
                self.journal.waits(planned.reason)
                self._may_plan = False
            else:
                self._dispatch(planned, now)

    def _dispatch(self, microbatch: Microbatch, start_s: float) -> None:
        message = step_message(microbatch, self._requests)
        sent_s = time.monotonic()
        self.fleet.broadcast(message)
        if self.engine.num_outstanding == 1:
            self._progress_s = sent_s
        self._reports.num_spans_due += len(self.plan.stages) + microbatch.head_at_first
        self._watch.planned(microbatch, sent_s)
        self.journal.planned(microbatch, start_s, sent_s)

    def _in_order(self, received: Received) -> Iterator[Received]:
        """It, and those that have waited for it. Where both ends of the pipeline sample, a result
        of one may be here before an earlier one of the other."""
        self._early[received.message.index] = received
        outstanding = self.engine.outstanding
        if received.message.index not in outstanding[1:]:
            yield self._early.pop(received.message.index)
        for index in outstanding[1:]:
            if index not in self._early or self.engine.outstanding[0] != index:
                return
            yield self._early.pop(index)

    def _complete(self, received: Received) -> list[Output]:
        result = step_result(received.message)
        outputs = self.engine.complete(result, time.monotonic())
        self._watch.completed(result.index, received.at_s)
        for output in outputs:
            if output.finish_reason is not None:
                del self._requests[output.request_id]
        self.losses.suspects.came(outputs)
        self._may_plan = True
        self._progress_s = received.at_s
        completed = Completed(
            result.index,
            min(self.fleet.waiting_s, received.at_s),  # one that was held back came before that
            received.at_s,
            time.monotonic(),
            tuple(result.counts),
        )
        self.journal.completed(completed, outputs)
        return outputs

    def _lose(self, received: Received) -> list[Output]:
        """A stage; returns the end of a request that is to blame."""
        if self.losses.final is not None:
            return []
        blamed = self.losses.take(received)
        if self.losses.final is not None:
            return []
        self._reports.num_spans_due = 0
        self._early.clear()
        start_stages(self.setup, self.fleet)
        if blamed is None:
            return []
        del self._requests[blamed.request_id]
        return [blamed]

    def _go_on(self, started: Sequence[control.StageReady]) -> None:
        """All stages are there again."""
        self.stages = stage_infos(self.plan, self.fleet.keepers, started)
        self.losses.are_over()
        self._may_plan = True

    def settle(self, timeout_s: float = 2.0) -> None:
        """When no request is unfinished: wait until what is outstanding has run, and take what the
        stages report of it, so that the run's records are complete. Raises StageError."""
        deadline = time.monotonic() + timeout_s
        while self._reports.num_spans_due and time.monotonic() < deadline:
            self.outputs(0.05)

    # ---- the rest -------------------------------------------------------------------------------

    def refresh_memory(self) -> None:
        """Bring `stages[i].peak_bytes` up to date. Only while no request is unfinished."""
        self.stages = with_memory(self.stages, self.plan, gather_memory(self.fleet))

    def examine(self, works: Sequence[Work], seconds: float) -> list[control.Examined]:
        """What each rank says of itself, and takes for these microbatches, timed for about so long.
        Only while no request is unfinished."""
        return gather_examined(self.fleet, works, seconds)

    def close(self) -> None:
        """End every process. Safe to call twice; nothing can be run after it."""
        self._end_aborted()  # so that the records have it
        self._end("it was closed")

    def _end(self, reason: str, has_failed: bool = False) -> None:
        self._ended = self._ended or reason
        self.fleet.close(reason if has_failed else "")

    def _check_open(self) -> None:
        if not self.fleet.is_own:
            raise StageError(
                f"the pipeline belongs to the process that started it, and process {os.getpid()} "
                "was forked from that; use it there, or start a pipeline here"
            )
        if self._ended is not None:
            raise StageError(f"the pipeline has ended ({self._ended}); start a new one")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
