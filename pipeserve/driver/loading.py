"""How far the stages are with loading, and which of them has stopped."""

from collections.abc import Iterable

from pipeserve.wire import control


class LoadWatch:
    """Of all ranks of one pipeline, from when their stages are started. Reads no clock.

    A stage goes on loading as long as bytes move: those of its weights that it says it has read,
    and those that the kernel has seen its process read or write, which a slow disk lets through one
    page at a time. Importing libraries over a network counts, too. How long it takes in all is
    nobody's business (vllm#35547: a start that was ended by the clock though it went on).
    """

    def __init__(self, num_ranks: int, now: float) -> None:
        self._num_ranks = num_ranks
        self.weights: dict[int, control.Loading] = {}
        """What each rank said of them last."""
        self._num_moved = [0] * num_ranks
        self._progress_s = [now] * num_ranks

    def begin(self, now: float) -> None:
        """All of them did nothing until now, and go on."""
        self._progress_s = [now] * self._num_ranks

    def begin_one(self, rank: int, now: float) -> None:
        """It begins later than the others, with another process."""
        self._num_moved[rank] = 0
        self._progress_s[rank] = now

    def take(self, rank: int, loading: control.Loading, now: float) -> None:
        """What a rank says of its weights."""
        before = self.weights.get(rank)
        if before is None or loading.num_read > before.num_read:
            self._progress_s[rank] = now
        self.weights[rank] = loading

    def moved(self, rank: int, num_bytes: int, now: float) -> None:
        """What the kernel says of its stage's process: how many so far."""
        if num_bytes > self._num_moved[rank]:
            self._num_moved[rank] = num_bytes
            self._progress_s[rank] = now

    def stopped(self, ranks: Iterable[int], timeout_s: float, now: float) -> int | None:
        """One of `ranks` in which no byte has moved for so long."""
        late = [rank for rank in ranks if now - self._progress_s[rank] > timeout_s]
        return min(late, key=self._progress_s.__getitem__, default=None)

    def how_far(self, rank: int) -> str:
        """One rank, in words."""
        if rank not in self.weights:
            return "before its first weight"
        read = self.weights[rank]
        return f"with {read.num_read / 1e9:.2f} of {read.num_bytes / 1e9:.2f} GB of weights read"

    def __str__(self) -> str:
        """What the stages together have read of their weights."""
        if len(self.weights) < self._num_ranks:  # what there is to read is not known yet
            return f"starting stages: {len(self.weights)} of {self._num_ranks} load weights"
        done = sum(read.num_read for read in self.weights.values())
        total = sum(read.num_bytes for read in self.weights.values())
        share = done / total if total else 1.0  # stages without layers have nothing to read
        return f"loading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {share:.0%}"
