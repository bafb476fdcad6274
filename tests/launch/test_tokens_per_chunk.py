"""A chunk that sampled three tokens counts as three wherever a recording is shown."""

import base64
import io
import json
import re
import zlib

import pytest
from made_up_recording import write
from rich.console import Console

from pipeserve.core.nouns import Chunk
from pipeserve.core.records import Arrived, Completed, Ended, Planned, Span
from pipeserve.launch import cli
from pipeserve.launch.show.live_frame import LiveFrame
from pipeserve.profiling.recording.recording import recording_of

META = {
    "plan": {"stages": [{"stage": 0, "first_layer": 0, "stop_layer": 1}], "window": 1},
    "policy": "orca",
    "limits": {"num_blocks": 100},
}
# Stop of its positions, logits, when its tokens were known, how many: 5 tokens, 4 gaps.
STEPS = ((4, 1, 1.0, 1), (7, 3, 1.5, 3), (8, 1, 1.7, 1))


def records():
    yield Arrived(7, 0.0, 4, 5)
    start = 0
    for index, (stop, num_logits, at_s, count) in enumerate(STEPS):
        chunk = Chunk(7, start, stop, (), None, num_logits)
        start, times = stop, [at_s - 0.1] * 3
        yield Planned(index, "", -1, *times, (chunk,), 0, 1, 90, ())
        yield Span(0, index, chunk.num_tokens, *times, at_s, at_s, at_s, 0.1, 0.0, 0)
        yield Completed(index, at_s, at_s, at_s, (count,))
    yield Ended(7, 1.7, "length", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As `--record` writes it, with the files that `report` makes of it."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, recording_of(records(), 1, META))
    assert cli.main(["report", str(folder), "--json", str(folder / "report.json")]) == 0
    return folder


def test_in_the_report(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["notes"] == []
    assert report["output_tokens_per_s"] == pytest.approx(5 / 1.7)
    assert report["ttft_s"]["p50"] == 1.0
    assert report["tbt_s"]["p50"] == pytest.approx(0.1)  # of 0, 0, 0.2 and 0.5 s
    assert report["tbt_s"]["p99"] == pytest.approx(0.491)


def test_on_the_page(folder):
    page = (folder / "report.html").read_text()

    def embedded(name):
        return re.search(f'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.S)[1].strip()

    head = json.loads(embedded("head"))
    assert head["summary"]["output_tokens"] == 5
    assert head["ttft_s"] == [1.0]
    assert head["tbt_s"] == pytest.approx([0.0, 0.0, 0.2, 0.5])
    [row] = head["requests"]
    assert row[3] == 5 and row[6] == pytest.approx(0.7 / 4)
    details = json.loads(zlib.decompress(base64.b64decode(embedded("details"))))
    assert details["chunks"]["sampled"] == [1, 3, 1]


def test_in_the_live_frame():
    view = LiveFrame(META)
    view.take(records())
    text = io.StringIO()
    Console(file=text, width=100).print(view.frame(2.0))
    assert f"{5 / 2.0:.1f} tokens/s" in text.getvalue()
    assert "TBT p50 100 ms, p99 491 ms" in text.getvalue()
