"""How a pipeline's own cost grows: planning, messages and idle stages, by stages and load.

    python bench/growth.py [--plot FILE.svg] [--page docs/schedules.md] [--turns 20]

Simulates Falcon-180B on A100s under `uniform`, P stages of one GPU each, with R requests running at
all times and 300 more waiting, and looks at `--turns` turns of P microbatches, at least 100
microbatches. Prompts of 100..500 tokens, answers of 1,000..3,000; the first R requests are caught
at random places of theirs, their KV imported. The limit between tokens is what P microbatches take
that hold all decodes, and prefill tokens in the workload's proportion and 512 more. Columns:
decodes of a microbatch (median); microseconds of CPU time of `Engine.plan` (median and 99th
percentile, of the tries that gave a microbatch); bytes of the message that goes to each stage
(median); idle share of the slowest stage (80 layers over 64 stages leave most of the others half as
much to do), and the least that there can be: R requests give work to R of P stages at most.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import log10
from pathlib import Path

from commands import script
from plain_svg import picture, text
from report import plain_table, show

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, Request, RequestId, Wait
from pipeserve.core.policies import get_policy
from pipeserve.core.work import Work
from pipeserve.launch.run.collector import no_pauses
from pipeserve.profiling.search.capacity import busy_in
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, request_of
from pipeserve.profiling.simulation.stage_times import ProfiledTimes
from pipeserve.wire.control import encode
from pipeserve.wire.step_messages import step_message

STAGES = (2, 4, 8, 16, 32, 64)
RUNNING = (10, 100, 1_000, 10_000)
WAITING = 300
PROMPTS, OUTPUTS = (100, 500), (1000, 3000)
MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
MIN_MICROBATCHES = 100
PLOT = Path(__file__).parent.parent / "docs" / "schedules" / "growth.svg"


@dataclass(frozen=True, slots=True)
class Cell:
    """What was seen of one load."""

    num_stages: int
    num_running: int
    decodes: float
    plan_us: float
    plan_p99_us: float
    message_bytes: float
    idle: float

    @property
    def least_idle(self) -> float:
        return max(0.0, 1 - self.num_running / self.num_stages)


class Load:
    """A pipeline whose requests are replaced as they end."""

    def __init__(self, num_stages: int, num_running: int, collect: Callable[[], None]) -> None:
        shape, profile = load_shape("falcon-180b"), load_profile("a100-80gb-dgx")
        plan = split_layers(shape.num_layers, num_stages)
        cost = PipelineCost(profile, shape, plan)
        decodes = -(-num_running // num_stages)
        prefill = 512 + decodes * sum(PROMPTS) // sum(OUTPUTS)
        full = Work(decodes + prefill, decodes + 1, ((0, prefill),), decodes, 1500 * decodes)
        limits = Limits(
            num_blocks=num_running * MAX_MODEL_LEN // BLOCK_SIZE + 1000,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=max(2048, decodes + prefill),
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=False,
            max_tbt_s=num_stages * max(cost.seconds(full)),
        )
        self.engine = Engine(plan, get_policy("uniform"), limits, cost)
        self.pipeline = SimulatedPipeline(self.engine, ProfiledTimes(profile, shape, plan))
        self.requests: dict[RequestId, Request] = {}
        self.begun: set[RequestId] = set()
        self.num_decodes: list[int] = []
        self.plan_us: list[float] = []
        self.message_bytes: list[int] = []
        self._plan, self.engine.plan = self.engine.plan, self._timed
        self._collect = collect
        self._arrivals = _requests(num_running)
        for _ in range(num_running + WAITING):
            self._add(0.0)

    def advance(self) -> float:
        """The next event; when it was."""
        now = self.pipeline.next_event_s
        for output in self.pipeline.advance(now):
            self.begun.add(output.request_id)
            if output.finish_reason is not None:
                del self.requests[output.request_id]
                self._add(now)
        return now

    def forget(self) -> None:
        """What was measured until now."""
        for seen in (self.num_decodes, self.plan_us, self.message_bytes):
            seen.clear()

    def _add(self, now: float) -> None:
        request = next(self._arrivals)
        self.requests[request.id] = request
        self.pipeline.add(request, now)

    def _timed(self, now: float) -> Microbatch | Wait:
        start = time.thread_time_ns()
        planned = self._plan(now)
        elapsed_us = (time.thread_time_ns() - start) / 1000
        if isinstance(planned, Microbatch):
            self._collect()
            self.plan_us.append(elapsed_us)
            self.message_bytes.append(len(encode(step_message(planned, self.requests), 0)))
            self.num_decodes.append(self.engine.last.num_decodes)
        return planned


def _requests(num_running: int) -> Iterator[Request]:
    rng = random.Random(0)
    for number in count():
        begun = number < num_running
        length, output = rng.randint(*PROMPTS), rng.randint(*OUTPUTS)
        done = rng.randrange(output) if begun else 0
        request = request_of(number, Arrival(0.0, length + done, output - done))
        tokens = tuple(rng.choices(range(65_000), k=length + done))
        yield replace(request, prompt=tokens, num_imported=begun * (length + done - 1))


def measure(num_stages: int, num_running: int, turns: int) -> Cell:
    with no_pauses() as collect:  # as in a run of a command
        return _measure(Load(num_stages, num_running, collect), num_stages, num_running, turns)


def _measure(load: Load, num_stages: int, num_running: int, turns: int) -> Cell:
    now = 0.0
    while len(load.begun) < num_running:
        now = load.advance()
    wanted = max(turns * num_stages, MIN_MICROBATCHES)
    load.forget()
    while len(load.plan_us) < 5 * num_stages:  # the load becomes steady
        now = load.advance()
    load.forget()
    start_s = now
    while len(load.plan_us) < wanted:
        now = load.advance()
    busy = busy_in(load.pipeline, start_s, now)
    return Cell(
        num_stages=num_stages,
        num_running=num_running,
        decodes=statistics.median(load.num_decodes),
        plan_us=statistics.median(load.plan_us),
        plan_p99_us=sorted(load.plan_us)[int(0.99 * len(load.plan_us))],
        message_bytes=statistics.median(load.message_bytes),
        idle=1 - max(busy),
    )


# ---- what is shown ------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> str:
    header = ["running", "P", "decodes", "plan us", "P99", "bytes", "idle", "least"]
    rows = [
        [
            f"{cell.num_running:,}",
            f"{cell.num_stages}",
            f"{cell.decodes:,.0f}",
            f"{cell.plan_us:,.0f}",
            f"{cell.plan_p99_us:,.0f}",
            f"{cell.message_bytes:,.0f}",
            f"{cell.idle:.1%}",
            f"{cell.least_idle:.1%}",
        ]
        for cell in cells
    ]
    return plain_table(header, rows)


WIDTH, HEIGHT, LEFT, TOP = 260, 220, 60, 40
COLOURS = ("#9ecae1", "#4292c6", "#08519c", "#f16913")


def svg(cells: Sequence[Cell]) -> str:
    """Three panels over the number of stages, a line for each number of requests."""
    panels = [
        ("planning, us", lambda cell: log10(cell.plan_us), (2, 3, 4, 5), lambda y: f"{10**y:,}"),
        (
            "message, bytes",
            lambda c: log10(c.message_bytes),
            (1, 2, 3, 4, 5),
            lambda y: f"{10**y:,}",
        ),
        (
            "idle share, slowest stage",
            lambda cell: cell.idle,
            (0, 0.25, 0.5, 0.75, 1),
            lambda y: f"{y:.0%}",
        ),
    ]
    parts = [_panel(cells, place, *panel) for place, panel in enumerate(panels)]
    for place, (running, colour) in enumerate(zip(RUNNING, COLOURS, strict=True)):
        x, y = LEFT + place * 130, TOP + HEIGHT + 60
        parts.append(f'<path d="M{x} {y} h24" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(text(x + 30, y + 4, f"{running:,} running"))
    width, height = 3 * (WIDTH + 90), TOP + HEIGHT + 80
    return picture(width, height, parts)


def _panel(
    cells: Sequence[Cell],
    place: int,
    title: str,
    value: Callable[[Cell], float],
    ticks: Sequence[float],
    label: Callable[[float], str],
) -> str:
    left, low, high = LEFT + place * (WIDTH + 90), ticks[0], ticks[-1]

    def x_of(num_stages: int) -> float:
        return left + STAGES.index(num_stages) * WIDTH / (len(STAGES) - 1)

    def y_of(y: float) -> float:
        return TOP + HEIGHT * (high - max(low, min(high, y))) / (high - low)

    parts = [text(left, TOP - 16, title)]
    for tick in ticks:
        parts.append(f'<path d="M{left} {y_of(tick):.1f} h{WIDTH}" stroke="#ddd"/>')
        parts.append(text(left - 6, y_of(tick) + 4, label(tick), "end"))
    for num_stages in STAGES:
        parts.append(text(x_of(num_stages), TOP + HEIGHT + 18, f"{num_stages}", "middle"))
    parts.append(text(left + WIDTH / 2, TOP + HEIGHT + 36, "stages", "middle"))
    for running, colour in zip(RUNNING, COLOURS, strict=True):
        line = [cell for cell in cells if cell.num_running == running]
        points = " ".join(f"{x_of(c.num_stages):.1f},{y_of(value(c)):.1f}" for c in line)
        parts.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="2.5"/>')
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--page", type=Path, help="docs/schedules.md: where the table is put")
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    cells = [measure(p, r, args.turns) for r in RUNNING for p in STAGES]
    show(table(cells), "growth", args.page)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    args.plot.write_text(svg(cells))


if __name__ == "__main__":
    script(main)
