"""The stage program of `chaos.py --poison`: the second stage is killed by a microbatch with a
certain token, as by one that a kernel cannot take."""

import os
import signal

from pipeserve.stage import worker
from pipeserve.stage.compute import Done, FeedBack, Turn

POISON = int(os.environ["POISON"])


class Mortal(worker.ModelCompute):
    def end(self, turn: Turn, feed_back: FeedBack) -> Done:
        is_second = not (self._job.is_first or self._job.is_last)
        if is_second and any(POISON in each.token_ids for each in turn.sequences):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().end(turn, feed_back)


if __name__ == "__main__":
    worker.ModelCompute = Mortal
    worker.main()
