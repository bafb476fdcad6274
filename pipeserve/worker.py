"""One stage process: a single loop that waits for what the next microbatch needs, then computes it.

    python -m pipeserve.worker < job        (started by the keeper; the job is a StartStage message)

The next microbatch, strictly by index, needs its plan (control), its activations (from the previous
stage) and, on the first stage, the tokens that are still on their way (from the last stage). All of
them are polled together, so nothing can block the stage but its own computing. No thread of ours
runs beside it.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import zmq

from pipeserve import control, links
from pipeserve.control import Connect, ReportMemory, StartStage, Step, StepChunk
from pipeserve.core.records import Span
from pipeserve.errors import PipeserveError
from pipeserve.memory import peak_bytes, resident_bytes
from pipeserve.sample_row import sample_row
from pipeserve.sequences import Sequence, Sequences
from pipeserve.stages.config import ModelConfig
from pipeserve.stages.inputs import StageInputs, build_inputs
from pipeserve.stages.kv import KVCache
from pipeserve.stages.padding import pad_rows
from pipeserve.stages.sampling import Logprobs, sample, score
from pipeserve.stages.weights import load_stage

_SCORED_ROWS = 64  # whose logits over the whole vocabulary are held at a time
_LOADING_REPORT_S = 0.25


class _Output(NamedTuple):
    """When a microbatch's compute was done, and what it took."""

    head_s: float
    end_s: float
    sent_s: float
    end_cpu_s: float
    num_bytes: int


class StageWorker:
    """Replays the driver's steps on this stage's layers. Decides nothing."""

    def __init__(
        self, job: StartStage, rank: int, context: zmq.Context, driver: zmq.Socket, baseline: int
    ) -> None:
        self.job = job
        self.is_first = job.stage == 0
        self.is_last = job.stage == job.num_stages - 1
        self.context = context
        self.driver = driver
        self.poller = zmq.Poller()
        self.poller.register(driver, zmq.POLLIN)
        # Each with the time when it was seen.
        self.plans: deque[tuple[Step, float]] = deque()
        self.activations: deque[tuple[list[zmq.Frame], float]] = deque()
        self.sequences = Sequences()
        self._next_report_s = 0.0
        self._load_model()
        self.last_cpu_s = time.thread_time()
        """Of this thread at the end of the microbatch before."""
        self._listen()
        self._report_ready(rank, baseline)

    def _load_model(self) -> None:
        job = self.job
        self.config = ModelConfig.from_folder(job.model_folder)
        self.dtype = getattr(torch, job.dtype)
        self.model = load_stage(
            job.model_folder,
            self.config,
            first_layer=job.first_layer,
            stop_layer=job.stop_layer,
            has_embedding=job.has_embedding,
            has_head=job.has_head,
            dtype=self.dtype,
            attention=job.attention,
            progress=self._report_loading,
        )
        self.weight_bytes = self.model.num_parameters * self.dtype.itemsize
        # Taken from the model, so that a prompt that is scored may have it a few rows at a time.
        self.head, self.model.head = self.model.head, None
        self.kv = KVCache(
            self.config,
            num_layers=job.stop_layer - job.first_layer,
            num_blocks=job.num_blocks,
            block_size=job.block_size,
            dtype=self.dtype,
        )

    def _report_loading(self, num_read: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next_report_s or num_read == num_bytes:
            self._next_report_s = now + _LOADING_REPORT_S
            self._tell(control.Loading(self.job.stage, num_read, num_bytes))

    def _listen(self) -> None:
        """Open the receiving ends of this stage's links."""
        self.activation_source = self.token_source = None
        self.activations_at = self.tokens_at = ""
        if not self.is_first:
            self.activation_source, self.activations_at = links.listen(self.context, self.job.host)
            self.poller.register(self.activation_source, zmq.POLLIN)
        elif not self.is_last:
            self.token_source, self.tokens_at = links.listen(self.context, self.job.host)
            self.poller.register(self.token_source, zmq.POLLIN)

    def _report_ready(self, rank: int, baseline: int) -> None:
        self._tell(
            control.StageReady(
                stage=self.job.stage,
                rank=rank,
                pid=os.getpid(),
                host=self.job.host,
                activations_at=self.activations_at,
                tokens_at=self.tokens_at,
                baseline_bytes=baseline,
                weight_bytes=self.weight_bytes,
                kv_bytes=self.kv.num_bytes,
                cpus=sorted(os.sched_getaffinity(0)),
            )
        )

    def run(self) -> None:
        """Microbatch after microbatch, until the keeper ends this process."""
        while True:
            while not self._is_ready():
                self._receive()
            self._run_next()

    def _run_next(self) -> None:
        """The next microbatch, all of which is here. What is told of it comes last."""
        span = self._compute(*self.plans.popleft())
        self._receive(seen_s=span.end_s)
        self._tell(control.Timing(span))

    # ---- waiting --------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        """Whether plan, activations and tokens of the next microbatch are all here."""
        if not self.plans:
            return False
        if not self.is_first:
            return bool(self.activations)
        return self.sequences.has_tokens_for(self.plans[0][0])

    def _receive(self, seen_s: float | None = None) -> None:
        """Take everything that has arrived, as seen at `seen_s`: what came while the stage computed
        was not waited for, however late it is taken. Without it, wait until something has arrived.
        """
        for socket, _ in self.poller.poll(None if seen_s is None else 0):
            while True:
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                now = time.monotonic() if seen_s is None else seen_s
                if socket is self.driver:
                    self._obey(control.decode_for_stage(frames[-1].buffer), now)
                elif socket is self.activation_source:
                    self.activations.append((frames, now))
                else:
                    self.sequences.take_tokens(*links.receive_tokens(frames[0].bytes), now)

    def _obey(self, message: control.ToStage, now: float) -> None:
        match message:
            case Step():
                self.plans.append((message, now))
            case Connect():
                self.next_stage = self.first_stage = None
                if message.next_stage:
                    self.next_stage = links.connect(self.context, message.next_stage)
                if message.first_stage:
                    self.first_stage = links.connect(self.context, message.first_stage)
                self._tell(control.Connected(self.job.stage))
            case ReportMemory():
                self._tell(control.Memory(self.job.stage, peak_bytes()))

    # ---- computing ------------------------------------------------------------------------------

    def _compute(self, step: Step, plan_s: float) -> Span:
        """Compute a microbatch and send what comes of it; returns what is told of it."""
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        sequences = self.sequences.apply(step)
        if self.is_first:
            input_s = max([sequence.token_s for sequence in sequences])
        else:
            frames, input_s = self.activations.popleft()
        if self.is_first or self.is_last:
            self.sequences.await_tokens(step, sequences)
        inputs = self._build_inputs(step, sequences)
        given = inputs.token_ids_T if self.is_first else self._unpack(frames, step, inputs)
        hidden = self.model(given, inputs, self.kv)
        if self.is_last:
            output = self._answer(step, sequences, hidden[inputs.logit_rows_R])
        else:
            output = self._send_on(step, hidden)
        between_cpu_s, self.last_cpu_s = start_cpu_s - self.last_cpu_s, output.end_cpu_s
        return Span(
            stage=self.job.stage,
            index=step.index,
            num_tokens=inputs.num_tokens,
            plan_s=plan_s,
            input_s=input_s,
            start_s=start_s,
            head_s=output.head_s,
            end_s=output.end_s,
            sent_s=output.sent_s,
            cpu_s=output.end_cpu_s - start_cpu_s,
            between_cpu_s=between_cpu_s,
            num_bytes=output.num_bytes,
        )

    def _build_inputs(self, step: Step, sequences: list[Sequence]) -> StageInputs:
        return build_inputs(
            [
                (chunk.start, chunk.stop, sequence.block_table, chunk.num_logits)
                for chunk, sequence in zip(step.chunks, sequences, strict=True)
            ],
            self.job.block_size,
            token_ids=[s.token_ids for s in sequences] if self.is_first else None,
        )

    def _unpack(self, frames: list[zmq.Frame], step: Step, inputs: StageInputs) -> torch.Tensor:
        shape = (inputs.num_tokens, self.config.hidden_size)
        return links.receive_tensor(frames, step.index, shape, self.dtype)

    def _send_on(self, step: Step, hidden: torch.Tensor) -> _Output:
        end_s, end_cpu_s = time.monotonic(), time.thread_time()
        num_bytes = links.send_tensor(self.next_stage, step.index, hidden)
        return _Output(end_s, end_s, end_s, end_cpu_s, num_bytes)

    def _answer(self, step: Step, sequences: list[Sequence], hidden_RD: torch.Tensor) -> _Output:
        """Sample; ids go to the first stage before anything else, for it may be waiting."""
        head_s = time.monotonic()
        places, rows, scored = [], [], []
        stop = 0  # of a chunk's rows
        for chunk, sequence in zip(step.chunks, sequences, strict=True):
            start, stop = stop, stop + chunk.num_logits
            if chunk.num_scored:
                scored.append((start, chunk, sequence))
            if chunk.num_logits > chunk.num_scored:
                places.append(stop - 1)
                rows.append(sample_row(sequence, chunk.stop))
        sampled_RD = hidden_RD[places] if scored else hidden_RD
        sampled = sample(self._logits(sampled_RD), rows) if rows else []
        tokens = [token for token, _ in sampled]
        end_s = sent_s = time.monotonic()
        if rows and not self.is_first:
            links.send_tokens(self.first_stage, step.index, tokens)
        end_cpu_s = time.thread_time()  # a system call: not before the tokens are on their way
        if rows:
            self.sequences.take_tokens(step.index, tokens, end_s)
        wants_logprobs = any(row.num_logprobs is not None for row in rows)
        logprobs = [entry for _, entry in sampled] if wants_logprobs else []
        prompt_logprobs = [entry for span in scored for entry in self._score(hidden_RD, *span)]
        if scored:
            end_s, end_cpu_s = time.monotonic(), time.thread_time()
        self._tell(control.Sampled(step.index, tokens, logprobs, prompt_logprobs))
        return _Output(head_s, end_s, sent_s, end_cpu_s, 0)

    def _score(
        self, hidden_RD: torch.Tensor, first_row: int, chunk: StepChunk, sequence: Sequence
    ) -> Iterator[Logprobs]:
        """Of the prompt tokens that a chunk scores; its rows begin at `first_row`."""
        following = chunk.stop - chunk.num_logits + 1
        for start in range(0, chunk.num_scored, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, chunk.num_scored)
            yield from score(
                self._logits(hidden_RD[first_row + start : first_row + stop]),
                sequence.token_ids[following + start : following + stop],
                sequence.registration.prompt_logprobs,
            )

    def _logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self.head(pad_rows(hidden_RD))[: len(hidden_RD)]

    def _tell(self, message: control.ToDriver) -> None:
        self.driver.send(control.encode(message))


def _connect_to_driver(context: zmq.Context, endpoint: str, rank: int) -> zmq.Socket:
    socket = context.socket(zmq.DEALER)
    socket.identity = control.stage_identity(rank)
    socket.set_hwm(0)
    socket.linger = 2000  # ms; the last word, why the stage ended, has to reach the driver
    socket.connect(endpoint)
    return socket


def _reason(error: Exception) -> str:
    """One line for the user: what happened and, where it is known, the remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PipeserveError):
        return text
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text}); use more stages or a smaller --kv-cache-memory-bytes"
    return f"{type(error).__name__}: {text} (PIPESERVE_TRACEBACK=1 prints where)"


def main() -> None:
    """Run the stage whose job comes on standard input; on failure, tell the driver and exit 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    baseline = resident_bytes()
    job = control.decode_for_keeper(sys.stdin.buffer.read())
    rank = int(os.environ["RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    context = zmq.Context()
    driver = _connect_to_driver(context, job.control, rank)
    try:
        with torch.inference_mode():
            worker = StageWorker(job, rank, context, driver, baseline)
            gc.collect()
            gc.freeze()
            worker.run()
    except Exception as error:
        if job.traceback:
            traceback.print_exc()
        failed = control.StageFailed(job.stage, _reason(error), isinstance(error, PipeserveError))
        driver.send(control.encode(failed))
        context.destroy()
        sys.exit(1)


if __name__ == "__main__":
    main()
