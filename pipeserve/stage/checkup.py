"""The stage process of `pipeserve doctor`: all of a stage but its weights. It sizes itself, meets
its neighbours and passes microbatches on as the real one would, with zeros for what they hold, so
that what lies between stages can be measured before anything is loaded.

Started by its keeper, as `pipeserve.stage.worker` is.
"""

import os
import time

import torch

from pipeserve.core.nouns import one_each
from pipeserve.stage.compute import Done, FeedBack, Turn
from pipeserve.stage.serve import serve
from pipeserve.stage.worker import ModelCompute
from pipeserve.wire.step_messages import Sampled

MODULE = "pipeserve.stage.checkup"


class CheckupCompute(ModelCompute):
    """Computes nothing; else a `ModelCompute`."""

    def take_memory(self, num_blocks: int) -> None:
        """Says what it would take."""
        self.weight_bytes = self.size.weight_bytes
        self.kv_bytes = num_blocks * self.size.block_bytes

    def end(self, turn: Turn, feed_back: FeedBack) -> Done:
        """As `Compute`."""
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        step, sampled, num_bytes = turn.step, None, 0
        num_tokens = sum(chunk.stop - chunk.start for chunk in step.chunks)
        zeros_TD = torch.zeros(num_tokens, self.config.hidden_size, dtype=self.dtype)
        end_s = time.monotonic()
        if self._job.is_last:
            counts = one_each(step.chunks)
            tokens = [0] * sum(counts)
            feed_back(step.index, tokens, counts)
            sampled = Sampled(step.index, tokens, counts, [], [])
        else:
            num_bytes = self.links.send(step.index, zeros_TD)
        cpu_s = time.thread_time() - start_cpu_s
        return Done(start_s, end_s, end_s, end_s, cpu_s, 0.0, num_bytes, sampled=sampled)


def main() -> None:
    """Run the stage whose job comes on standard input."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.inference_mode():
        serve(CheckupCompute)


if __name__ == "__main__":
    main()
