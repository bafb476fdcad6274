"""The stage process that computes nothing: inside the stage's loop, it waits as long as a device
profile says. Started by its keeper, as `pipeserve.stage.worker` is.

Control messages, link headers, token feedback and processes are the runtime's own; only the time
of computing and of moving activations is waited for instead of spent. How long that is, is the
simulator's truth for the same seed: emulated and simulated runs differ in the runtime alone.
"""

import ctypes
import os
import struct
import time
from typing import NamedTuple
from zlib import crc32

import msgspec

from pipeserve.core.cost.device import DeviceProfile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan, one_each
from pipeserve.core.work import Work
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.stage.compute import Done, FeedBack, Tell, Turn
from pipeserve.stage.facts import facts_of
from pipeserve.stage.serve import serve
from pipeserve.wire import control
from pipeserve.wire.control import StartStage
from pipeserve.wire.links import ActivationLinks

MODULE = "pipeserve.launch.emulated.stage"
_HEADER = struct.Struct("<qd")
"""A real link's header, the microbatch's index, and when its activations are there."""
_SEED = struct.Struct("<qq")
_PR_SET_TIMERSLACK = 29
_SPIN_S = 150e-6
"""Before the end of a wait: a sleeping thread wakes late by 100 us, 130 us at the 90th percentile
(on the virtual machine that this was written on)."""
_AHEAD_S = 500e-6
"""Before the end of a microbatch this thread looks at what came while the device was busy. What it
could begin earlier would not be computed earlier, and to wake up for it costs CPU time."""


class EmulatedWork(msgspec.Struct, frozen=True):
    """What `profiling.stage_times.ProfiledTimes` is made of."""

    profile: DeviceProfile
    shape: ModelShape
    plan: PipelinePlan
    tensor_parallel_size: int
    seed: int
    slowdown: tuple[float, ...] | None = None

    def times(self) -> ProfiledTimes:
        return ProfiledTimes(
            self.profile,
            self.shape,
            self.plan,
            self.tensor_parallel_size,
            self.seed,
            self.slowdown,
        )


class HeaderLinks(ActivationLinks):
    """Those of stages that have no activations: a message is 16 bytes. The link with the next stage
    carries one microbatch at a time, each as long as the profile says; but the latency, in which it
    takes the next."""

    def __init__(self, latency_s: float = 0.0) -> None:
        super().__init__()
        self._latency_s = latency_s
        self._free_s = 0.0

    def send(self, index: int, sent_s: float, hop_s: float) -> int:
        """Returns the number of bytes."""
        there_s = max(sent_s, self._free_s) + hop_s
        self._free_s = there_s - self._latency_s
        self._next_stage.send(_HEADER.pack(index, there_s))
        return _HEADER.size

    def take(self, index: int) -> tuple[None, float]:
        """The device waits for the rest of the hop, as for what it computes before."""
        message, seen_s = super().take(index)
        sent_index, there_s = _HEADER.unpack(message)
        if sent_index != index:
            raise RuntimeError(f"link out of step: expected microbatch {index}, got {sent_index}")
        return None, max(there_s, seen_s)


class Computing(NamedTuple):
    """A microbatch that the device was given."""

    index: int
    hop_s: float
    """Of its activations to the next stage."""
    done: Done
    """What will come of it; when it is sent alone is not known yet."""


class EmulatedCompute:
    """The `Compute` that waits: the model of a device that computes one microbatch after the other,
    in the order in which they were begun, each as long as the profile says."""

    size = control.StageSized(weight_bytes=0, block_bytes=0, memory=())
    weight_bytes = kv_bytes = 0
    num_threads = 1
    most_begun = 2

    def __init__(
        self, times: ProfiledTimes, job: StartStage, vocab_size: int, num_layers: int = 0
    ) -> None:
        """`num_layers`: of the whole model."""
        self._times = times
        self._num_layers = num_layers
        self._job = job
        self._vocab_size = vocab_size
        self._free_s = 0.0
        """When the device is done with all that was begun."""
        self._last_cpu_s = time.thread_time()
        """Of this thread at the end of the microbatch before."""
        self.links = HeaderLinks(0.0 if job.is_last else times.latency_s[job.stage])

    @classmethod
    def load(cls, job: StartStage, tell: Tell) -> "EmulatedCompute":
        work = msgspec.msgpack.decode(job.work, type=EmulatedWork)
        return cls(work.times(), job, work.shape.vocab_size, work.shape.num_layers)

    def examine(self, works: tuple[Work, ...], seconds: float) -> control.Examined:
        """By the profile: nothing is timed."""
        found = [self._times.parts(work, self._job.stage) for work in works]
        parts = tuple(each._replace(layers=each.layers * self._num_layers) for each in found)
        return control.Examined(facts_of("", "an emulated device", 1), parts, 1.0)

    def take_memory(self, num_blocks: int) -> None:
        """It holds nothing."""

    def meet(self, address: str) -> bool:
        """Nobody: it exchanges nothing with who shares its stage."""
        return True

    def part(self) -> None: ...

    def begin(self, turn: Turn) -> Computing:
        """The device begins it when it is there and the one before is done."""
        start_s = max(time.monotonic(), turn.input_s, self._free_s)
        has_rested = start_s > self._free_s
        between_cpu_s = time.thread_time() - self._last_cpu_s if has_rested else 0.0
        step, stage = turn.step, self._job.stage
        seconds = self._times.compute_s(step)[stage]
        self._free_s = due_s = start_s + seconds
        hop_s, head_s, sampled = 0.0, due_s, None
        if self._job.is_last:
            head_s -= self._times.head_s(step)
            sampled = control.Sampled(step.index, self._sample(turn), one_each(step.chunks), [], [])
        else:
            hop_s = self._times.hop_s(step)[stage]
        done = Done(start_s, head_s, due_s, due_s, seconds, between_cpu_s, 0, sampled)
        return Computing(step.index, hop_s, done)

    def left_s(self, computing: Computing) -> float:
        return max(computing.done.end_s - time.monotonic() - _AHEAD_S, 0.0)

    def end(self, computing: Computing, feed_back: FeedBack) -> Done:
        """As `Compute`. The device's own time counts as CPU time."""
        index, hop_s, done = computing
        wait_until(done.end_s)
        sent_s, num_bytes = time.monotonic(), 0
        if done.sampled is None:
            num_bytes = self.links.send(index, sent_s, hop_s)
        else:
            feed_back(index, done.sampled.tokens, done.sampled.counts)
        self._last_cpu_s = time.thread_time()
        return done._replace(sent_s=sent_s, num_bytes=num_bytes)

    def _sample(self, turn: Turn) -> list[int]:
        """Token ids that follow from the request's seed and the place in its output."""
        tokens = []
        for chunk, sequence in zip(turn.step.chunks, turn.sequences, strict=True):
            if chunk.samples:
                place = chunk.stop - sequence.registration.num_prompt_tokens
                tokens.append(crc32(_SEED.pack(sequence.params.seed, place)) % self._vocab_size)
        return tokens


def wait_until(time_s: float) -> None:
    """Of the monotonic clock; not before it, and not much after: sleeps, and then looks."""
    left_s = time_s - time.monotonic()
    if left_s > _SPIN_S:
        time.sleep(left_s - _SPIN_S)
    while time.monotonic() < time_s:
        os.sched_yield()  # stages share cores


def main() -> None:
    """Run the stage whose job comes on standard input."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # 1 ns in place of 50 us
    serve(EmulatedCompute.load)


if __name__ == "__main__":
    main()
