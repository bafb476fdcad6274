"""The stage process that computes nothing: inside the stage's loop, it waits as long as a device
profile says. Started by its keeper, as `pipeserve.stage.worker` is.

Control messages, link headers, token feedback and processes are the runtime's own; only the time
of computing and of moving activations is waited for instead of spent. How long that is, is the
simulator's truth for the same seed: emulated and simulated runs differ in the runtime alone.

The ranks of a stage all wait for the same microbatches, each in a process of its own, and none is
done with one sooner than the profile says after the last of them was given it
(`shared_starts.py`).
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
from pipeserve.launch.emulated.shared_starts import SharedStarts
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.stage.compute import Done, FeedBack, Tell, Turn
from pipeserve.stage.facts import facts_of
from pipeserve.stage.serve import serve
from pipeserve.wire import control
from pipeserve.wire.links import ActivationLinks
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import Sampled

MODULE = "pipeserve.launch.emulated.stage"
_HEADER = struct.Struct("<qd")
"""A real link's header, the microbatch's index, and when its activations are there."""
_SEED = struct.Struct("<qq")
_PR_SET_TIMERSLACK = 29
_SPIN_S = 80e-6
"""Before the end of a wait: a sleeping thread wakes late by 25 us, and by 60 us once in 20 times
(on the virtual machine that this was written on). It was a third of an emulated stage's CPU time
when it was twice as long."""
_AHEAD_S = 500e-6
"""Before the end of a microbatch this thread looks at what came while the device was busy. What it
could begin earlier would not be computed earlier, and to wake up for it costs CPU time."""
_LOOK_S = 100e-6
"""Between two looks whether a slower rank of the stage has been given a microbatch."""


class EmulatedWork(msgspec.Struct, frozen=True):
    """What `profiling.simulation.stage_times.ProfiledTimes` is made of."""

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
        message, seen_s = self._inbox.popleft()
        sent_index, there_s = _HEADER.unpack(message)
        if sent_index != index:
            raise RuntimeError(f"link out of step: expected microbatch {index}, got {sent_index}")
        return None, max(there_s, seen_s)


class Computing(NamedTuple):
    """A microbatch that the device was given."""

    index: int
    given_s: float
    """When this rank had all that it needs for it."""
    between_cpu_s: float
    """Thread CPU time from the end of the one before to then, if that had ended."""
    seconds: float
    """From when all ranks have what they need; the next two are part of it."""
    all_reduce_s: float
    head_s: float
    hop_s: float
    """Of its activations to the next stage."""
    sampled: Sampled | None
    """What will come of it, on the last stage."""


class EmulatedCompute:
    """The `Compute` that waits: the model of a device that computes one microbatch after the other,
    in the order in which they were begun, each as long as the profile says."""

    weight_bytes = kv_bytes = 0
    num_threads = 1
    most_begun = 2

    def __init__(
        self, times: ProfiledTimes, job: StartStage, vocab_size: int, num_layers: int = 0
    ) -> None:
        """`num_layers`: of the whole model."""
        self._times = times
        self._num_layers = num_layers
        self._stage, self._is_last = job.stage, job.is_last
        self._vocab_size = vocab_size
        self._free_s = 0.0
        """When the device was done with the microbatch that ended last."""
        self._starts = SharedStarts(job) if job.num_shards > 1 else None
        meets_at = "a page of memory" if job.num_shards > 1 and job.speaks else ""
        self.size = control.StageSized(0, 0, memory=(), meets_at=meets_at)
        self._last_cpu_s = time.thread_time()
        """Of this thread at the end of the microbatch before."""
        self.links = HeaderLinks(0.0 if job.is_last else times.latency_s[job.stage])

    @classmethod
    def load(cls, job: StartStage, tell: Tell) -> "EmulatedCompute":
        work = msgspec.msgpack.decode(job.work, type=EmulatedWork)
        return cls(work.times(), job, work.shape.vocab_size, work.shape.num_layers)

    def examine(self, works: tuple[Work, ...], seconds: float) -> control.Examined:
        """By the profile: nothing is timed."""
        found = [self._times.parts(work, self._stage) for work in works]
        parts = tuple(each._replace(layers=each.layers * self._num_layers) for each in found)
        return control.Examined(facts_of("", "an emulated device", 1), parts, 1.0)

    def take_memory(self, num_blocks: int) -> None:
        """It holds nothing."""

    def meet(self, address: str) -> bool:
        """Each found the page that they share when it was made."""
        if self._starts is not None:
            self._starts.begin_epoch()
        return True

    def part(self) -> None:
        """As `Compute`: who waits for this one, waits no more."""
        if self._starts is not None:
            self._starts.end_epoch()

    def prepare(self) -> bool:
        return False

    def begin(self, turn: Turn) -> Computing:
        """The device begins it when it is there, on all ranks, and the one before is done."""
        given_s, between_cpu_s = time.monotonic(), time.thread_time() - self._last_cpu_s
        given_s = max(given_s, turn.input_s)
        step, stage, times = turn.step, self._stage, self._times
        all_reduce_s, head_s, hop_s, sampled = 0.0, 0.0, 0.0, None
        if self._starts is not None:
            self._starts.give(step.index, given_s)
            all_reduce_s = times.all_reduce_s(step)[stage]
        seconds = times.compute_s(step)[stage]
        if self._is_last:
            head_s = times.head_s(step)
            sampled = Sampled(step.index, self._sample(turn), one_each(step.chunks), [], [])
        else:
            hop_s = times.hop_s(step)[stage]
        return Computing(
            step.index, given_s, between_cpu_s, seconds, all_reduce_s, head_s, hop_s, sampled
        )

    def left_s(self, computing: Computing) -> float:
        """As if no other rank were slower, while that is not known."""
        given_s = computing.given_s
        if self._starts is not None:
            given_s = self._starts.latest_s(computing.index) or given_s
        end_s = max(given_s, self._free_s) + computing.seconds
        return max(end_s - time.monotonic() - _AHEAD_S, 0.0)

    def end(self, computing: Computing, feed_back: FeedBack) -> Done | None:
        """As `Compute`. The device's own time counts as CPU time."""
        index, sampled, before_s = computing.index, computing.sampled, self._free_s
        latest_s: float | None = computing.given_s
        if self._starts is not None:
            latest_s = self._wait_for_ranks(computing, self._starts)
            if latest_s is None:
                return None
        start_s, together_s = max(computing.given_s, before_s), max(latest_s, before_s)
        self._free_s = end_s = together_s + computing.seconds
        wait_until(end_s)
        sent_s, num_bytes = time.monotonic(), 0
        if sampled is None:
            num_bytes = self.links.send(index, sent_s, computing.hop_s)
        else:
            feed_back(index, sampled.tokens, sampled.counts)
        self._last_cpu_s = time.thread_time()
        return Done(
            start_s=start_s,
            head_s=end_s - computing.head_s,
            end_s=end_s,
            sent_s=sent_s,
            cpu_s=computing.seconds,
            between_cpu_s=computing.between_cpu_s if start_s > before_s else 0.0,
            num_bytes=num_bytes,
            all_reduce_s=computing.all_reduce_s,
            rank_wait_s=together_s - start_s,
            sampled=sampled,
        )

    def _wait_for_ranks(self, computing: Computing, starts: SharedStarts) -> float | None:
        """Until the last rank of the stage was given it: when that was. None: it never will be."""
        soonest_s = max(computing.given_s, self._free_s) + computing.seconds - _SPIN_S
        while (latest_s := starts.latest_s(computing.index)) is None:
            if starts.is_over:
                return None
            time.sleep(max(soonest_s - time.monotonic(), _LOOK_S))
        return latest_s

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
