"""What stages stand idle for while there is always something to do: the ends of the run cut off.

    python bench/saturation.py [FLAGS OF pipeserve bench ...]          runs them; by default the
                                                                       reference mix on two stages
    python bench/saturation.py --recorded FOLDER [FOLDER ...]          looks at recordings

Two tables. "As it was" is the recorded run from the moment when the last stage begins its first
microbatch to that when the first stage ends its last one. "Left alone" is the same run, microbatch
by microbatch, as it would have gone if nobody else had used the cores: a microbatch takes the CPU
time that it took, messages and plans take what they took in the median, and what waits for what is
as it was. So it says what the pipeline itself stands idle for, on a machine that others use, too.
What others slow the cores down by (caches, memory) is still in it, and so are receivers that are
woken late, as `token_feedback`, `control` and `link`.

Shares of the window's time, by cause (docs/timeline.md), and of those of its parts: while prompts
are computed, and while there are decodes alone.
"""

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from math import inf, isnan
from pathlib import Path

from commands import pipeserve, script
from report import plain_table

from pipeserve.core.records import Completed, Headed, Planned, Span
from pipeserve.launch.verbs.report import read_run
from pipeserve.profiling.advice.recorded_delays import Delays, delays_of, sources_of
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.ledger.step_parts import has_prefill
from pipeserve.profiling.recording.recording import Recording

REFERENCE = ["smollm2-135m", "-pp", "2", "--workload", "sharegpt", "--scale", "8"]
PARTS = ("all", "with prompts", "decodes alone")
LEAST = 0.0005
"""Of the window: causes below are not shown."""


# ---- the run, left alone ------------------------------------------------------------------------


class LeftAlone:
    """A recorded run once more, each microbatch taking the CPU time that it took."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.delays: Delays = delays_of(recording)
        self.sources = sources_of(recording.planned)
        self.planned: dict[int, Planned] = {}
        self.completed: dict[int, Completed] = {}
        self.spans: list[dict[int, Span]] = [{} for _ in recording.spans]
        self.to_head = deque(sorted(recording.headed, key=lambda headed: headed.start_s))
        self.headed: dict[int, Headed] = {}
        self.free_s = [-inf] * recording.num_stages
        """When each stage is done with the microbatch before."""

    def run(self) -> Recording:
        recording = self.recording
        recorded = [{span.index: span for span in spans} for spans in recording.spans]
        results = {completed.index: completed for completed in recording.completed}
        sent_s = recording.planned[0].start_s
        for planned in recording.planned:
            k = planned.index
            if not all(k in spans for spans in recorded) or k not in results:
                continue
            self._apply_heads(recorded[0][k].start_s)
            sent_s = max(sent_s, self._woken_s(planned)) + self.delays.planning_s
            self.planned[k] = planned._replace(
                woken_s=sent_s - self.delays.planning_s,
                start_s=sent_s - self.delays.planning_s,
                sent_s=sent_s,
            )
            there_s = sent_s + self.delays.control_s
            input_s = self._tokens_s(k)
            for stage, spans in enumerate(recorded):
                span = self._span(spans[k], there_s, input_s)
                self.spans[stage][k] = span
                if stage < len(self.delays.hops):
                    first_s, each_s = self.delays.hops[stage]
                    input_s = span.end_s + first_s + each_s * span.num_tokens
            self.completed[k] = self._completed(results[k], self.spans[-1][k])
        self._apply_heads(inf)
        found = Recording(recording.meta, notes=recording.notes)
        found.arrived, found.ended = recording.arrived, recording.ended
        found.planned = list(self.planned.values())
        found.completed = list(self.completed.values())
        found.spans = [list(spans.values()) for spans in self.spans]
        found.headed = list(self.headed.values())
        return found

    def _apply_heads(self, until_s: float) -> None:
        """Those that the first stage began by then as it was: between the same microbatches."""
        while self.to_head and self.to_head[0].start_s < until_s:
            headed = self.to_head.popleft()
            rows_of = self.spans[-1].get(headed.index)
            if rows_of is None:
                continue
            input_s = rows_of.sent_s + self.delays.feedback_s
            start_s = max(self.free_s[0], input_s) + _known(headed.between_cpu_s)
            wall_s = headed.end_s - headed.start_s
            end_s = self.free_s[0] = start_s + min(_known(headed.cpu_s, wall_s), wall_s)
            self.headed[headed.index] = headed._replace(
                input_s=input_s, start_s=start_s, end_s=end_s, sent_s=end_s
            )
            self.completed[headed.index] = self._completed(
                self.completed[headed.index], self.headed[headed.index]
            )

    def _completed(self, as_it_was: Completed, by: Span | Headed) -> Completed:
        """The result, of the stage that has sampled."""
        known_s = by.sent_s + self.delays.control_s
        return as_it_was._replace(waiting_s=by.start_s, received_s=known_s, done_s=known_s)

    def _woken_s(self, planned: Planned) -> float:
        """By a completion; by an arrival, as it was; or right behind the plan before."""
        if planned.after in self.completed:
            return self.completed[planned.after].received_s
        return planned.woken_s if planned.waited_for else -inf

    def _tokens_s(self, index: int) -> float:
        """When stage 0 has the tokens that it embeds."""
        number = self.sources.get(index, -1)
        if number in self.headed:
            return self.headed[number].sent_s
        source = self.spans[-1].get(number)
        return -inf if source is None else source.sent_s + self.delays.feedback_s

    def _span(self, span: Span, plan_s: float, input_s: float) -> Span:
        start_s = max(self.free_s[span.stage], plan_s, input_s) + _known(span.between_cpu_s)
        wall_s = span.end_s - span.start_s
        own_s = min(_known(span.cpu_s, wall_s), wall_s)
        share = own_s / wall_s if wall_s else 1.0
        end_s = self.free_s[span.stage] = start_s + own_s
        return span._replace(
            plan_s=plan_s,
            input_s=input_s,
            start_s=start_s,
            head_s=start_s + (span.head_s - span.start_s) * share,
            end_s=end_s,
            sent_s=end_s,
        )


def _known(seconds: float, otherwise: float = 0.0) -> float:
    return otherwise if isnan(seconds) else seconds


# ---- what is idle -------------------------------------------------------------------------------


def idle_of(recording: Recording, ledger: Ledger) -> tuple[dict[str, float], list[list[dict]]]:
    """Seconds of each of PARTS, and of each stage in each part its idle seconds by cause."""
    begin_s, end_s = recording.spans[-1][0].start_s, recording.spans[0][-1].end_s
    prompts = {planned.index for planned in recording.planned if has_prefill(planned)}
    turn_s = _last_prompt_s(recording, prompts, begin_s)
    borders = {PARTS[0]: (begin_s, end_s), PARTS[1]: (begin_s, turn_s), PARTS[2]: (turn_s, end_s)}
    found = []
    for intervals in ledger.idle:
        of_stage = []
        for first_s, last_s in borders.values():
            totals = dict.fromkeys(CAUSES, 0.0)
            for interval in intervals:
                inside_s = min(interval.end_s, last_s) - max(interval.start_s, first_s)
                if inside_s > 0:
                    share = inside_s / (interval.end_s - interval.start_s)
                    for cause, seconds in zip(CAUSES, interval.seconds, strict=True):
                        totals[cause] += share * seconds
            of_stage.append(totals)
        found.append(of_stage)
    seconds = {part: max(last_s - first_s, 0.0) for part, (first_s, last_s) in borders.items()}
    return seconds, found


def _last_prompt_s(recording: Recording, prompts: set[int], otherwise_s: float) -> float:
    """When the last stage is done with the last microbatch that has a prompt."""
    return max(
        [span.end_s for span in recording.spans[-1] if span.index in prompts], default=otherwise_s
    )


def table(recording: Recording, ledger: Ledger) -> str:
    seconds, found = idle_of(recording, ledger)
    parts = [place for place, part in enumerate(PARTS) if seconds[part] > 0]
    header = ["idle", *(f"{PARTS[p]}: stage {s}" for p in parts for s in range(len(found)))]

    def shares(cause: str | None) -> list[float]:
        return [
            (sum(stage[p].values()) if cause is None else stage[p][cause]) / seconds[PARTS[p]]
            for p in parts
            for stage in found
        ]

    rows = [["seconds", *(f"{seconds[PARTS[p]]:.2f}" for p in parts for _ in found)]]
    rows.append(["**all causes**", *(f"**{share:.1%}**" for share in shares(None))])
    by_cause = [(cause, shares(cause)) for cause in CAUSES]
    for cause, of_cause in sorted(by_cause, key=lambda each: -sum(each[1][: len(found)])):
        if max(of_cause) >= LEAST:
            rows.append([cause, *(f"{share:.1%}" if share >= LEAST else "" for share in of_cause)])
    return plain_table(header, rows)


def show(folder: Path) -> None:
    run = read_run(folder)
    if run.ledger is None:
        sys.exit(f"{folder}: nothing was computed there")
    kinds = {"As it was": (run.recording, run.ledger)}
    alone = LeftAlone(run.recording).run()
    kinds["Left alone"] = alone, explain(alone)
    for title, (recording, ledger) in kinds.items():
        print(f"\n{folder.name}: {title}, {ledger.seconds:.2f} s with its ends\n")
        print(table(recording, ledger), flush=True)


def main(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "--recorded":
        for folder in arguments[1:]:
            show(Path(folder))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, flags = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pipeserve("bench", *(flags or REFERENCE), "--record", folder)
        show(Path(folder))


if __name__ == "__main__":
    script(lambda: main(sys.argv[1:]))
