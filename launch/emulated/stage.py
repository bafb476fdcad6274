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
from zlib import crc32

import msgspec

from pipeserve.core.cost.device import DeviceProfile
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.nouns import PipelinePlan, one_each
from pipeserve.profiling.simulation.stage_times import ProfiledTimes, StageTimes
from pipeserve.stage.loop import Done, StageLoop, Tell, Turn, serve
from pipeserve.stage.sequences import Sequence
from pipeserve.wire import control
from pipeserve.wire.control import StartStage, Step
from pipeserve.wire.links import ActivationLinks

MODULE = "pipeserve.launch.emulated.stage"
_HEADER = struct.Struct("<qd")
"""A real link's header, the microbatch's index, and when it was sent: the hop begins then."""
_SEED = struct.Struct("<qq")
_PR_SET_TIMERSLACK = 29
_SPIN_S = 150e-6
"""Before the end of a wait: a sleeping thread wakes late by 100 us, 130 us at the 90th percentile
(on the virtual machine that this was written on)."""
_AHEAD_S = 600e-6
"""Before the end of a microbatch: enough to wake up late and to take in what has arrived."""


class EmulatedWork(msgspec.Struct, frozen=True):
    """What `profiling.stage_times.ProfiledTimes` is made of."""

    profile: DeviceProfile
    shape: ModelShape
    plan: PipelinePlan
    tensor_parallel_size: int
    seed: int

    def times(self) -> ProfiledTimes:
        return ProfiledTimes(
            self.profile, self.shape, self.plan, self.tensor_parallel_size, self.seed
        )


class HeaderLinks(ActivationLinks):
    """Those of stages that have no activations: a message is 16 bytes."""

    def send(self, index: int, sent_s: float) -> int:
        """Returns the number of bytes."""
        self._next_stage.send(_HEADER.pack(index, sent_s))
        return _HEADER.size


class EmulatedCompute:
    """The `stage_loop.Compute` that waits."""

    size = control.StageSized(weight_bytes=0, block_bytes=0, memory=())
    weight_bytes = kv_bytes = 0
    num_threads = 1
    is_elsewhere = True

    def __init__(self, times: StageTimes, stage: int, vocab_size: int) -> None:
        self._times = times
        self._stage = stage
        self._vocab_size = vocab_size
        self._link_free_s = 0.0
        self.links = HeaderLinks()

    @classmethod
    def load(cls, job: StartStage, tell: Tell) -> "EmulatedCompute":
        work = msgspec.msgpack.decode(job.work, type=EmulatedWork)
        return cls(work.times(), job.stage, work.shape.vocab_size)

    def take_memory(self, num_blocks: int) -> None:
        """It holds nothing."""

    def take_in(self, step: Step, activations: bytes | bytearray, seen_s: float) -> float:
        """The link carries one microbatch at a time, each as long as the profile says."""
        index, sent_s = _HEADER.unpack(activations)
        if index != step.index:
            raise RuntimeError(f"link out of step: expected microbatch {step.index}, got {index}")
        hop_s = self._times.hop_s(step)[self._stage - 1]
        self._link_free_s = max(sent_s, self._link_free_s) + hop_s
        wait_until(self._link_free_s)
        return max(self._link_free_s, seen_s)

    def run(self, turn: Turn, stage: StageLoop) -> Done:
        """As `stage_loop.Compute`. The device's own time counts as CPU time: what the stage took
        longer is how late it woke up, and that is nobody's work."""
        step = turn.step
        seconds = self._times.compute_s(step)[self._stage]
        due_s = turn.start_s + seconds
        tokens, head_s = [], due_s
        if stage.is_last:
            tokens = self._sample(step, turn.sequences)
            head_s -= self._times.head_s(step)
        num_tokens = sum([chunk.stop - chunk.start for chunk in step.chunks])
        self._wait_until(due_s, stage)
        end_s = time.monotonic()
        if stage.is_last:
            counts = one_each(step.chunks)
            end_cpu_s = stage.feed_back(step, tokens, counts, end_s)
            stage.report(control.Sampled(step.index, tokens, counts, [], []))
            return Done(num_tokens, head_s, end_s, end_s, seconds, end_cpu_s, 0)
        num_bytes = self.links.send(step.index, end_s)
        end_cpu_s = time.thread_time()
        return Done(num_tokens, end_s, end_s, end_s, seconds, end_cpu_s, num_bytes)

    def _wait_until(self, due_s: float, stage: StageLoop) -> None:
        """Shortly before the end the stage looks what there is to do next, as it could while a
        device computes: two microbatches do not wait for that between them."""
        time.sleep(max(due_s - time.monotonic() - _AHEAD_S, 0.0))
        stage.meanwhile()
        if stage.plans:
            self._times.hop_s(stage.plans[0][0])  # reckoned once, and needed as soon as it is begun
        wait_until(due_s)

    def _sample(self, step: Step, sequences: list[Sequence]) -> list[int]:
        """Token ids that follow from the request's seed and the place in its output."""
        tokens = []
        for chunk, sequence in zip(step.chunks, sequences, strict=True):
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
