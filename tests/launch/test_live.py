"""`--live`: what a frame says, and that the run waits for none."""

import io
import pickle
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Chunk
from pipeserve.core.policies import get_policy
from pipeserve.core.records import Arrived, Completed, Ended, Fault, Planned, Span
from pipeserve.launch import cli
from pipeserve.launch.show.live import Feed, draw, live_view
from pipeserve.launch.show.live_frame import _COLOURS, WINDOW_S, LiveFrame
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.simulation.simulator import Arrival, SimulatedPipeline, Simulation
from pipeserve.profiling.simulation.stage_times import StageTimes

META = {
    "plan": {"stages": [{}, {}], "window": 2},
    "policy": "uniform",
    "limits": {"num_blocks": 100},
    "config": {"model": "smollm2-135m"},
}


class Slow(StageTimes):
    """Stage 1 takes three times as long as stage 0."""

    control_s = feedback_s = 0.0

    def compute_s(self, microbatch):
        return [0.01, 0.03]

    def hop_s(self, microbatch):
        return [0.0]


def told(seconds=8.0):
    """What a run of two stages tells in its first seconds: 16 requests, ever decoding."""
    records = []
    limits = Limits(
        num_blocks=4000,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        max_model_len=2048,
        enable_prefix_caching=False,
    )
    engine = Engine(split_layers(2, 2), get_policy("uniform"), limits)
    pipeline = SimulatedPipeline(engine, Slow(), records.append)
    Simulation(pipeline, [Arrival(0.0, 16, 1000)] * 16).run_until(seconds)
    return records


def text_of(view, now, width=110):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view.frame(now, width))
    return console.export_text()


def test_a_frame_shows_stages_causes_microbatches_and_rates():
    view = LiveFrame(META)
    view.take(told())
    text = text_of(view, 8.0)
    assert "smollm2-135m · policy uniform · 2 stages" in text
    first, second = (line for line in text.splitlines() if "stage " in line[:10])
    assert " 33%" in first and "100%" in second
    below = text.splitlines()[text.splitlines().index(first) + 1]
    assert "stage imbalance 67%" in below
    # 16 requests, 8 in each microbatch, one of 0.03 s: 267 tokens/s, each request's every 60 ms.
    rate = float(text.split(" tokens/s")[0].split()[-1])
    assert rate == pytest.approx(8 / 0.03, rel=0.03)
    assert "TBT p50 60 ms, p99 60 ms" in text
    assert "16 running, 0 waiting" in text


def test_a_bar_is_as_long_as_its_shares():
    view = LiveFrame(META)
    view.take(told())
    console = Console(width=110, file=io.StringIO(), force_terminal=True)
    segments = [
        segment
        for segment in console.render(view.frame(8.0, 110))
        if "█" in segment.text and segment.style and segment.style.color
    ]
    lengths = {}
    for segment in segments[:2]:  # of stage 0
        lengths[segment.style.color.name] = len(segment.text)
    total = sum(lengths.values())
    assert lengths["#5b86bd"] / total == pytest.approx(1 / 3, abs=0.02)
    assert lengths[_COLOURS["stage_imbalance"]] / total == pytest.approx(2 / 3, abs=0.02)


def test_every_cause_has_a_colour():
    assert set(_COLOURS) == set(CAUSES)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_frame_is_as_wide_as_the_terminal(width):
    view = LiveFrame(META)
    view.take(told())
    assert {len(line) for line in text_of(view, 8.0, width).splitlines()} == {width}


def planned(index, at_s, request_ids=(0,), free=40):
    chunks = tuple(Chunk(request_id, 8, 9, (), None, 1) for request_id in request_ids)
    return Planned(index, "", -1, at_s, at_s, at_s, chunks, 2, 5, free, ())


def span(stage, index, start_s, end_s):
    nan = float("nan")
    return Span(stage, index, 1, start_s, start_s, start_s, end_s, end_s, end_s, nan, nan, 0)


def test_a_microbatch_stands_at_the_stage_that_runs_it():
    view = LiveFrame(META)
    view.take([Arrived(0, 0.0, 8, 99), planned(7, 0.1), planned(8, 0.2), span(0, 7, 0.1, 0.3)])
    lines = text_of(view, 0.4).splitlines()
    assert "#8 1 tok" in lines[2] and "#7 1 tok" in lines[4]
    assert "#7" not in lines[2] and "#8" not in lines[4]
    view.take([span(1, 7, 0.3, 0.4), Completed(7, 0.2, 0.45, 0.45, (1,))])
    assert "#7" not in text_of(view, 0.5)
    assert "5 running, 2 waiting · KV 60%" in text_of(view, 0.5)
    view.take([Fault(1, 0.6, "lost")])
    assert "#8" not in text_of(view, 0.7)


def test_more_microbatches_than_there_is_room_for_are_counted():
    view = LiveFrame(META)
    view.take([planned(index, 0.1) for index in range(9)])
    assert "#3 1 tok · +5" in text_of(view, 0.2)


def test_tokens_after_a_request_ended_do_not_count():
    view = LiveFrame(META)
    view.take([Arrived(0, 0.0, 8, 99), Arrived(1, 0.0, 8, 99)])
    for index, at_s in enumerate([1.0, 1.1, 1.2]):
        view.take([planned(index, at_s, (0, 1)), Completed(index, at_s, at_s, at_s, (1, 1))])
        if index == 1:
            view.take([Ended(1, at_s, "stop", 2)])
    assert f"{5 / 2.0:.1f} tokens/s" in text_of(view, 2.0)
    assert "TBT p50 100 ms" in text_of(view, 2.0)
    assert "1 done" in text_of(view, 2.0)


def test_only_the_last_seconds_count():
    view = LiveFrame(META)
    view.take(told())
    assert "0.0 tokens/s" in text_of(view, 8.0 + WINDOW_S + 1)
    assert "TBT" not in text_of(view, 8.0 + WINDOW_S + 1)
    first = next(line for line in text_of(view, 30.0).splitlines() if "stage 0" in line)
    assert "%" not in first and "█" not in first


def test_a_run_that_has_not_begun_has_a_frame():
    assert "0 done" in text_of(LiveFrame(META), 1.0)


# ---- the process that draws ---------------------------------------------------------------------


def pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_records_come_in_batches_when_a_plan_was_sent():
    ours, theirs = pair()
    theirs.setblocking(False)
    with ours, theirs:
        feed = Feed(ours)
        feed.record(Arrived(0, 0.0, 8, 99))
        with pytest.raises(BlockingIOError):
            theirs.recv(1 << 20)
        feed.record(planned(0, 1.0))
        feed.record(planned(1, 1.1))  # before the next frame is due
        feed.record(planned(2, 1.3))
        assert [type(r) for r in pickle.loads(theirs.recv(1 << 20))] == [Arrived, Planned]
        assert [r.index for r in pickle.loads(theirs.recv(1 << 20))] == [1, 2]


def test_a_drawer_that_takes_nothing_holds_nobody_up():
    ours, theirs = pair()
    with ours, theirs:
        feed = Feed(ours)
        big = planned(0, 0.0, range(256))
        for index in range(3000):
            feed.record(big._replace(index=index))  # returns, or the test hangs
        assert feed.num_dropped > 0
        theirs.setblocking(False)
        num_taken = 0
        with suppress(BlockingIOError):
            while True:
                num_taken += len(pickle.loads(theirs.recv(1 << 20)))
        assert num_taken + feed.num_dropped > 2990  # few are held
        theirs.close()
        feed.record(big)
        feed.flush()


def test_what_is_drawn_is_what_was_told_and_ends_with_the_run():
    ours, theirs = pair()
    console = Console(file=io.StringIO(), force_terminal=True, width=110)
    drawer = threading.Thread(target=draw, args=(theirs, console))
    with ours, theirs:
        ours.send(pickle.dumps(META))
        drawer.start()
        feed = Feed(ours)
        for record in told(1.0):
            feed.record(record)
        feed.flush()
        ours.close()
        drawer.join(20)
        assert not drawer.is_alive()
    assert "stage 1" in console.file.getvalue()


def test_without_a_terminal_one_line_says_so():
    console = Console(file=io.StringIO(), width=200)
    with live_view(META, console) as record:
        record(planned(0, 0.0))
    assert console.file.getvalue() == "--live shows nothing: stderr is no terminal\n"


def test_the_view_is_a_process_that_ends_with_the_run():
    console = Console(file=io.StringIO(), force_terminal=True)
    before = _children()
    with live_view(META, console) as record:
        for entry in told(1.0):
            record(entry)
        assert len(_children() - before) == 1
    assert _children() == before


def _children():
    task = Path("/proc/self/task")
    return {pid for thread in task.iterdir() for pid in (thread / "children").read_text().split()}


def test_results_and_the_view_do_not_share_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["generate", "no-such-model", "--prompt", "hi", "--live"]) == 2
    assert "--live takes the terminal, and so do the results" in capsys.readouterr().err
