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
from pipeserve.wire.step_messages import Sampled, Step

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
        step, sampled, rows, num_bytes = turn.step, None, None, 0
        num_tokens = sum(chunk.stop - chunk.start for chunk in step.chunks)
        zeros_TD = torch.zeros(num_tokens, self.config.hidden_size)
        end_s = time.monotonic()
        if not self._job.is_last:
            num_bytes = self.links.send(step.index, zeros_TD)
        elif step.head_at_first:
            num_rows = sum(chunk.num_logits for chunk in step.chunks)
            rows = torch.zeros(num_rows, self.config.hidden_size)
        else:
            sampled = _sampled(step, feed_back)
        cpu_s = time.thread_time() - start_cpu_s
        return Done(start_s, end_s, end_s, end_s, cpu_s, 0.0, num_bytes, sampled, rows=rows)

    def apply_head(self, turn: Turn, feed_back: FeedBack) -> Done:
        """As `Compute`."""
        now, cpu_s = time.monotonic(), time.thread_time()
        sampled = _sampled(turn.step, feed_back)
        return Done(now, now, now, now, time.thread_time() - cpu_s, 0.0, sampled=sampled)


def _sampled(step: Step, feed_back: FeedBack) -> Sampled:
    counts = one_each(step.chunks)
    tokens = [0] * sum(counts)
    feed_back(step.index, tokens, counts)
    return Sampled(step.index, tokens, counts, [], [])


def main() -> None:
    """Run the stage whose job comes on standard input."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.inference_mode():
        serve(CheckupCompute)


if __name__ == "__main__":
    main()
