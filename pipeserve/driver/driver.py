"""The driver: runs the engine on stages. It alone decides; stages replay.

A microbatch's way: `engine.plan` -> one `Step` message to every stage -> stage 0 .. P-1 -> sampled
ids to stage 0 and here -> `engine.complete` -> the caller.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeserve.core.engine import Engine
from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Microbatch, Output, Request, RequestId, Wait
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Completed, Ping, Recorder, ignore
from pipeserve.driver.fleet import Fleet, Received
from pipeserve.driver.setup import Setup
from pipeserve.errors import CapacityError, ConfigError, StageError
from pipeserve.sampling_params import token_ids_of
from pipeserve.wire import control


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInfo:
    """Where one stage runs and what it holds. Memory in bytes."""

    stage: int
    rank: int
    host: str
    pid: int
    cpus: tuple[int, ...]
    num_layers: int
    weight_bytes: int
    kv_bytes: int
    baseline_bytes: int
    """The interpreter with torch, before the model."""
    peak_bytes: int | None = None
    """The most that was resident at once; None until `Driver.refresh_memory`."""


class Driver:
    """One pipeline, ready to take requests. Single-threaded: nothing happens but in its methods.

    Raises ConfigError (--control is busy, a launcher of another size, a stage refused its input)
    and StageError (a process could not start or died); after either, `close` has been called.
    """

    def __init__(
        self,
        setup: Setup,
        on_progress: Callable[[str], None] = lambda text: None,
        record: Recorder = ignore,
    ) -> None:
        """Returns when all stages are ready. `on_progress` is told in words how far they are.
        `record` is handed what the run tells of itself, from within `add`, `finish`, `poll` and
        `settle`, and must not raise."""
        self._take(setup, record)
        self._may_plan = False
        """Something came since the engine last had no plan; nothing else can give it one."""
        self._num_spans_due = 0
        self._ended: str | None = None
        self._requests: dict[RequestId, Request] = {}
        self.fleet = Fleet(len(self.plan.stages), self.config)
        try:
            self.fleet.wait_for_keepers(on_progress)
            self._suit_ranks(record)
            ready = self.fleet.start_stages(self._jobs(), on_progress)
        except BaseException:
            self.fleet.close()
            raise
        self.stages = tuple(
            StageInfo(
                stage=stage.stage,
                rank=stage.rank,
                host=self.fleet.keepers[stage.rank].host,
                pid=stage.pid,
                cpus=tuple(stage.cpus),
                num_layers=plan.num_layers,
                weight_bytes=stage.weight_bytes,
                kv_bytes=stage.kv_bytes,
                baseline_bytes=stage.baseline_bytes,
            )
            for stage, plan in zip(ready, self.plan.stages, strict=True)
        )

    def _take(self, setup: Setup, record: Recorder) -> None:
        self.setup = setup
        self.config, self.dtype = setup.config, setup.dtype
        self.shape, self.plan = setup.shape, setup.plan
        self.model_folder, self.model_config = setup.model_folder, setup.model_config
        self.max_model_len = setup.limits.max_model_len
        policy = get_policy(self.config.policy)
        self.engine = Engine(self.plan, policy, setup.limits, setup.cost)
        self.journal = Journal(self.engine, record)

    def _suit_ranks(self, record: Recorder) -> None:
        """Where ranks on other machines multiply other types than was thought."""
        keepers = [self.fleet.keepers[rank] for rank in range(self.fleet.num_ranks)]
        native = tuple(keeper.native_dtypes for keeper in keepers)
        if self.setup.for_ranks is not None and native != self.setup.native_dtypes:
            self._take(self.setup.for_ranks(keepers), record)

    def _jobs(self) -> list[control.StartStage]:
        return [
            control.StartStage(
                stage=stage.stage,
                num_stages=len(self.plan.stages),
                module=self.setup.module,
                work=work,
                control=f"/{self.fleet.local_name}",
                host=self.fleet.keepers[stage.ranks[0]].address,
                traceback=os.environ.get("PIPESERVE_TRACEBACK", "") not in ("", "0"),
            )
            for stage, work in zip(self.plan.stages, self.setup.works, strict=True)
        ]

    # ---- requests -------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; `request.params.seed` must be set.

        Raises CapacityError, ConfigError for token ids that the model does not have, and StageError
        when the pipeline has ended.
        """
        self._check_open()
        _check_token_ids(request, self.shape.vocab_size)
        if request.num_imported:
            raise CapacityError(
                f"request {request.id} imports the KV of {request.num_imported} positions; stages "
                "cannot take KV from another pipeline yet"
            )
        now = time.monotonic()
        self.engine.add(request, now)
        self._may_plan = True
        self._requests[request.id] = request
        self.journal.arrived(request, now)

    def finish(self, request_id: RequestId, reason: str) -> None:
        """End a request now (abort, stop string). Unknown and finished ids are ignored."""
        now = time.monotonic()
        output = self.engine.finish(request_id, reason, now)
        self._may_plan = True
        self._requests.pop(request_id, None)
        if output is not None:
            self.journal.finished(output, now)

    @property
    def num_unfinished(self) -> int:
        return self.engine.num_unfinished

    # ---- the loop -------------------------------------------------------------------------------

    def poll(self, timeout_s: float) -> list[Output]:
        """Plan what can be planned, then take what the stages said; waits at most `timeout_s`.

        Returns what became known, in order; may be empty. Raises StageError when a stage died, and
        again at every later call.
        """
        self._check_open()
        try:
            return self._poll(timeout_s)
        except BaseException as error:
            # Ctrl-C too may come between a plan and its message: what the stages hold and what the
            # engine thinks they hold is no longer sure to be the same.
            reason = str(error) or f"interrupted by {type(error).__name__}"
            if self.fleet.lost_stage is not None:
                self.journal.lost(self.fleet.lost_stage, time.monotonic(), reason)
            self._end(reason)
            raise

    def _poll(self, timeout_s: float) -> list[Output]:
        self._plan_all()
        outputs: list[Output] = []
        for received in self.fleet.receive(timeout_s):
            match received.message:
                case control.Sampled():
                    outputs += self._complete(received)
                    self._plan_all()  # at once: of two results, the plan for the first is not late
                case control.Timing(span):
                    self._num_spans_due -= 1
                    self.journal.computed(span)
                    self.engine.observe(span.index, span.stage, span.end_s - span.start_s)
                case control.Pong(rank, sent_s, remote_s):  # of another machine
                    self.journal.pinged(Ping(rank, sent_s, remote_s, received.at_s))
        for output in outputs:
            if output.finish_reason is not None:
                self._requests.pop(output.request_id, None)
        return outputs

    def _plan_all(self) -> None:
        """Fill the window."""
        while self._may_plan:
            now = time.monotonic()
            planned = self.engine.plan(now)
            if isinstance(planned, Wait):
                self.journal.waits(planned.reason)
                self._may_plan = False
            else:
                self._dispatch(planned, now)

    def _dispatch(self, microbatch: Microbatch, start_s: float) -> None:
        message = control.step_message(microbatch, self._requests)
        sent_s = time.monotonic()
        self.fleet.broadcast(message)
        self._num_spans_due += len(self.plan.stages)
        self.journal.planned(microbatch, start_s, sent_s)

    def _complete(self, received: Received) -> list[Output]:
        result = control.step_result(received.message)
        outputs = self.engine.complete(result, time.monotonic())
        self._may_plan = True
        waiting_s, received_s = self.fleet.waiting_s, received.at_s
        self.journal.completed(
            Completed(result.index, waiting_s, received_s, time.monotonic()), outputs
        )
        return outputs

    def settle(self, timeout_s: float = 2.0) -> None:
        """Let what is outstanding run out and take what the stages tell of it, when no request is
        unfinished. A run has been told whole then. Raises StageError."""
        deadline = time.monotonic() + timeout_s
        while self._num_spans_due and time.monotonic() < deadline:
            self.poll(0.05)

    # ---- the rest -------------------------------------------------------------------------------

    def refresh_memory(self) -> None:
        """Bring `stages[i].peak_bytes` up to date. Only while no request is unfinished."""
        self.stages = tuple(
            replace(stage, peak_bytes=memory.peak_bytes)
            for stage, memory in zip(self.stages, self.fleet.gather_memory(), strict=True)
        )

    def close(self) -> None:
        """End every process. Safe to call twice; nothing can be run after it."""
        self._end("it was closed")

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self.fleet.close()

    def _check_open(self) -> None:
        if self._ended is not None:
            raise StageError(f"the pipeline has ended ({self._ended}); start a new one")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_token_ids(request: Request, vocab_size: int) -> None:
    """A stage would end at one that is not in its tables, and the run with it."""
    for ids in (request.prompt, *token_ids_of(request.params), *request.bad_word_ids):
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"request {request.id}: {token} is no token id; this model's are 0 to "
                    f"{vocab_size - 1}"
                )
