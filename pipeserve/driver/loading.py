"""How far the stages are with loading, and which of them has stopped."""

from collections.abc import Iterable

from pipeserve.wire import control


class LoadWatch:
    """Of all stages of one pipeline, from when they are started. Reads no clock.

    A stage goes on loading as long as bytes move: those of its weights that it says it has read,
    and those that the kernel has seen its process read or write, which a slow disk lets through one
    page at a time. Importing libraries over a network counts, too. How long it takes in all is
    nobody's business (vllm#35547: a start that was ended by the clock though it went on).
    """

    def __init__(self, num_stages: int, now: float) -> None:
        self._num_stages = num_stages
        self.weights: dict[int, control.Loading] = {}
        """What each stage said of them last."""
        self._num_moved = [0] * num_stages
        self._progress_s = [now] * num_stages

    def take(self, loading: control.Loading, now: float) -> None:
        """What a stage says of its weights."""
        before = self.weights.get(loading.stage)
        if before is None or loading.num_read > before.num_read:
            self._progress_s[loading.stage] = now
        self.weights[loading.stage] = loading

    def moved(self, stage: int, num_bytes: int, now: float) -> None:
        """What the kernel says of its process: how many so far."""
        if num_bytes > self._num_moved[stage]:
            self._num_moved[stage] = num_bytes
            self._progress_s[stage] = now

    def stopped(self, stages: Iterable[int], timeout_s: float, now: float) -> int | None:
        """One of `stages` in which no byte has moved for so long."""
        late = [stage for stage in stages if now - self._progress_s[stage] > timeout_s]
        return min(late, key=self._progress_s.__getitem__, default=None)

    def how_far(self, stage: int) -> str:
        """One stage, in words."""
        if stage not in self.weights:
            return "before its first weight"
        read = self.weights[stage]
        return f"with {read.num_read / 1e9:.2f} of {read.num_bytes / 1e9:.2f} GB of weights read"

    def __str__(self) -> str:
        """What the stages together have read of their weights."""
        if len(self.weights) < self._num_stages:  # what there is to read is not known yet
            return f"starting stages: {len(self.weights)} of {self._num_stages} load weights"
        done = sum(stage.num_read for stage in self.weights.values())
        total = sum(stage.num_bytes for stage in self.weights.values())
        share = done / total if total else 1.0  # stages without layers have nothing to read
        return f"loading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {share:.0%}"
