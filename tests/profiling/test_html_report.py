"""The page of a report, looked at in a headless Chromium."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from made_up_recording import made_up_recording

from pipeserve.core.records import Fault
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import Ledger, explain
from pipeserve.profiling.pages import html_data
from pipeserve.profiling.pages.html_report import page, write_report
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.request_times import request_records

needs_chromium = pytest.mark.skipif(
    chromium.PATH is None, reason="no chromium here (Debian has it as `chromium`)"
)


@pytest.fixture(scope="module")
def recording() -> Recording:
    """With what a page has to cope with: names that look like markup, a prediction, a fault."""
    made = made_up_recording(num_stages=3, num_requests=30, slow={1: 1.3})
    made.meta["config"]["model"] = "models/a <b>bold<i> &lt; model"
    made.planned = [plan._replace(predicted_s=(0.004, 0.005, 0.006)) for plan in made.planned]
    made.spans = [
        [span._replace(sent_s=span.end_s + 1e-3, cpu_s=span.end_s - span.start_s) for span in spans]
        for spans in made.spans
    ]
    made.notes = ["a <i>note</i> & </script> more"]
    made.faults = [Fault(1, made.arrived[0].at_s + 0.4, "killed by signal 9")]
    return made


@pytest.fixture(scope="module")
def ledger(recording) -> Ledger:
    return explain(recording)


@pytest.fixture(scope="module")
def path(tmp_path_factory, recording, ledger) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, recording, ledger)
    return path


@pytest.fixture(scope="module")
def browser(path):
    with chromium.Page() as browser:
        browser.open(path)
        yield browser


@pytest.fixture
def opened(browser):
    """The page as it is at first."""
    browser.run("pipeserveReport.select(null), pipeserveReport.axis.showAll()")
    browser.run("document.querySelector('[data-scope=run]').click()")
    browser.mouse("mouseMoved", 5, 5)
    browser.settle(0.15)
    return browser


def text_of(opened: chromium.Page, selector: str) -> str:
    return opened.run(f"document.querySelector({json.dumps(selector)}).innerText")


def where(opened: chromium.Page, stage: int, index: int, *, gap: bool = False) -> tuple[float, ...]:
    """The middle of a microbatch (or of the idle time before it) on the screen."""
    return tuple(
        opened.run(f"""(() => {{
          const {{ timeline, axis, report }} = pipeserveReport;
          timeline.canvas.scrollIntoView({{ block: "center" }});
          const line = timeline.rows[{stage + 1}], box = timeline.canvas.getBoundingClientRect();
          const i = line.row.find(report.microbatches.index.indexOf({index}));
          const [from, to] = {"true" if gap else "false"}
            ? [line.row.gapStart(i), line.row.starts[i]] : [line.row.starts[i], line.row.ends[i]];
          return [box.left + axis.x((from + to) / 2), box.top + line.top + line.height / 2];
        }})()""")
    )


def zoom_to(opened: chromium.Page, recording: Recording, ledger: Ledger, index: int) -> None:
    """So that the microbatch is some 100 pixels wide."""
    at = recording.spans[0][index].start_s - ledger.start_s
    opened.run(f"pipeserveReport.axis.show({(at - 0.02) * 1e6}, {(at + 0.06) * 1e6})")
    opened.settle(0.15)


# ---- without a browser --------------------------------------------------------------------------


def embedded(text: str, name: str) -> str:
    return re.search(f'<script type="[^"]+" id="{name}">(.*?)</script>', text, re.S)[1]


def column(text: str, name: str) -> np.ndarray:
    import base64
    import zlib

    offset, length, width = json.loads(embedded(text, "head"))["layout"][name]
    data = zlib.decompress(base64.b64decode(embedded(text, "columns")))[offset : offset + length]
    if width == 1:
        return np.frombuffer(data, np.uint8)
    return np.frombuffer(data, np.uint8).reshape(4, -1).T.copy().view("<u4").ravel().astype(int)


def test_the_page_names_nothing_outside_of_itself(path):
    text = path.read_text(encoding="utf-8")
    markup = re.sub(r'<script type="[^"]+" id.*?</script>', "", text, flags=re.S)
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\bfetch\(|XMLHttpRequest", markup)
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,"]


def test_blocks_are_the_spans_to_the_tick(path, recording, ledger):
    text = path.read_text(encoding="utf-8")
    for stage, spans in enumerate(recording.spans):
        gaps, lengths = column(text, f"stage{stage}.gap"), column(text, f"stage{stage}.length")
        assert gaps.sum() + lengths.sum() == round(ledger.seconds * 1e6)
        ends = np.cumsum(gaps[:-1] + lengths)
        expected = [(span.end_s - ledger.start_s) * 1e6 for span in spans]
        assert np.abs(ends - expected).max() <= 1
        expected = [(span.end_s - span.start_s) * 1e6 for span in spans]
        assert np.abs(lengths - expected).max() <= 1


def test_shares_of_each_gap_are_those_of_the_ledger(path, ledger, recording):
    text = path.read_text(encoding="utf-8")
    for stage, spans in enumerate(recording.spans):
        counts = column(text, f"stage{stage}.causes")
        causes = np.split(column(text, f"stage{stage}.cause"), np.cumsum(counts)[:-1])
        shares = np.split(column(text, f"stage{stage}.share").astype(int), np.cumsum(counts)[:-1])
        seconds = {idle.index: np.array(idle.seconds) for idle in ledger.idle[stage]}
        for index, cause, share in zip(
            [*(s.index for s in spans), -1], causes, shares, strict=True
        ):
            if index not in seconds:
                assert not len(cause)
                continue
            found = np.zeros(len(CAUSES))
            found[cause] = share / 255
            assert share.sum() == 255
            assert np.abs(found - seconds[index] / seconds[index].sum()).max() < 1 / 255


def test_runs_over_an_hour_have_longer_ticks():
    ledger = Ledger(5.0, 5.0 + 3 * 3600, ([],), (0.0,))
    clock = html_data.PageClock.of(ledger)
    assert clock.tick_s == pytest.approx(1e-5)
    assert clock.ticks([5.0, 4.0, 6.0, 1e9]).tolist() == [0, 0, 100_000, clock.stop]


def test_blocks_that_overlap_are_put_behind_each_other(recording, ledger):
    first, second = recording.spans[0][:2]
    overlapping = [first, second._replace(start_s=first.end_s - 1e-3), *recording.spans[0][2:]]
    odd = dataclasses.replace(recording, spans=[overlapping, *recording.spans[1:]])
    assert column(page(recording, ledger), "stage0.gap")[1] > 0
    assert column(page(odd, ledger), "stage0.gap")[1] == 0


def test_a_stage_without_spans_is_an_empty_row(recording):
    bare = dataclasses.replace(recording, spans=[recording.spans[0], [], recording.spans[2]])
    text = page(bare, explain(bare))
    assert column(text, "stage1.length").size == 0
    assert column(text, "stage1.gap").size == 1


# ---- in the browser -----------------------------------------------------------------------------


@needs_chromium
def test_no_request_and_no_complaint(opened, path):
    assert opened.requested() == [path.resolve().as_uri()]
    assert opened.complaints() == []


@needs_chromium
def test_the_head_says_what_was_run(opened, ledger, recording):
    title = "a <b>bold<i> &lt; model on 3 stages"
    assert text_of(opened, "#title") == title
    assert opened.run("document.title") == f"{title} · pipeserve report"
    assert "policy sarathi_serve" in text_of(opened, "#facts")
    assert f"{len(recording.planned)} microbatches" in text_of(opened, "#facts")
    busy = sum(ledger.busy_s) / 3 / ledger.seconds
    assert f"{100 * busy:.1f} %" in text_of(opened, "#tiles")
    assert opened.run("document.querySelectorAll('#title b, #notes i').length") == 0


@needs_chromium
def test_notes_and_faults_are_listed(opened):
    notes = text_of(opened, "#notes")
    assert "a <i>note</i> & </script> more" in notes
    assert "stage 1 was lost after 0.400 s: killed by signal 9" in notes


@needs_chromium
def test_the_timeline_is_painted(opened):
    colours = opened.run("""(() => {
      const { canvas } = pipeserveReport.timeline, pixels = canvas.getContext("2d")
        .getImageData(0, 0, canvas.width, canvas.height).data;
      return new Set(new Uint32Array(pixels.buffer)).size;
    })()""")
    assert colours > 10


@needs_chromium
def test_time_up_to_any_moment_is_the_sum_of_blocks_and_gaps(opened, ledger):
    rows = opened.run("""(() => {
      const { stages } = pipeserveReport.report, { stop } = pipeserveReport.axis;
      return stages.map((row) => [0.137, 0.5, 1].map((share) => {
        const exact = new Float64Array(row.size), rough = new Float64Array(row.size);
        row.until(stop * share, exact);
        row.until(stop * share, rough, true);
        return [stop * share, Array.from(exact), Array.from(rough)];
      }));
    })()""")
    for stage, moments in enumerate(rows):
        for at, exact, rough in moments:
            assert sum(exact) == pytest.approx(at, abs=2)
            assert sum(rough) == pytest.approx(at, abs=2)
            assert np.abs(np.subtract(exact, rough)).max() < 0.05 * 1e6
        whole = np.array(moments[-1][1]) * 1e-6
        assert whole[:4].sum() == pytest.approx(ledger.busy_s[stage], abs=1e-3)
        idle = list(ledger.idle_s(stage).values())
        assert whole[4:] == pytest.approx(idle, abs=0.004 * sum(idle))


@needs_chromium
def test_bars_and_table_are_the_ledgers(opened, ledger):
    bars = opened.run("""Array.from(document.querySelectorAll("#bars .segments"),
      (bar) => bar.getAttribute("aria-label"))""")
    assert len(bars) == 4
    for stage, label in enumerate(bars[1:]):
        for cause, share in ledger.idle_shares(stage).items():
            if share > 0.0006:
                assert f"{cause.replace('_', ' ')} {100 * share:.1f} %" in label
    rows = opened.run("""Array.from(document.querySelectorAll("#causes tbody tr"),
      (row) => [row.dataset.cause, row.cells[1].innerText])""")
    shares = {
        cause: sum(ledger.idle_s(stage)[cause] for stage in range(3)) / 3 / ledger.seconds
        for cause in CAUSES
    }
    assert rows[0][0] == max(shares, key=shares.get)
    for cause, text in rows:
        assert float(text.removesuffix(" %")) == pytest.approx(100 * shares[cause], abs=0.051)


@needs_chromium
@pytest.mark.parametrize("width", [1400, 900, 500])
def test_what_a_bar_says_has_room_in_it(tmp_path, recording, ledger, width):
    write_report(tmp_path / "report.html", recording, ledger)
    with chromium.Page(width) as page:
        page.open(tmp_path / "report.html")
        page.settle(0.1)
        labels = page.run("""[...document.querySelectorAll("#bars .segment > span")].map((label) =>
          [label.textContent, label.offsetWidth, label.parentElement.clientWidth])""")
        assert len(labels) > 8
        assert all(said == "" or needs + 8 <= room for said, needs, room in labels)
        said = {re.sub("[0-9]", "", text) for text, *_ in labels}
        assert {"", " %"} < said and any(re.match("[a-z]", text) for text in said)
        place = page.run("""(() => {
          document.getElementById("bars").scrollIntoView();
          const segments = [...document.querySelectorAll("#bars .segment")];
          const silent = segments.find((each) => !each.innerText && each.clientWidth > 2);
          const box = silent.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        })()""")
        page.mouse("mouseMoved", *place)
        page.settle(0.1)
        assert re.search(r"[a-z]+\s+[\d.]+ %", text_of(page, "#tip"))


@needs_chromium
def test_hovering_tells_of_the_microbatch(opened, recording, ledger):
    index = next(p.index for p in recording.planned[20:] if len(p.chunks) > 1)
    zoom_to(opened, recording, ledger, index)
    opened.mouse("mouseMoved", *where(opened, 0, index))
    opened.settle(0.3)
    told = text_of(opened, "#tip")
    assert f"Microbatch {index} on stage 0" in told
    plan, span = recording.planned[index], recording.spans[0][index]
    assert f"{(span.end_s - span.start_s) * 1e3:.3g} ms" in told
    off = (span.end_s - span.start_s) / plan.predicted_s[0] - 1
    assert f"4 ms ({'+' if off >= 0 else '-'}{100 * abs(off):.0f} %)" in told
    for chunk in plan.chunks:
        what = (
            f"decode at {chunk.start}"
            if chunk.stop - chunk.start == 1
            else f"prefill {chunk.start} to {chunk.stop}"
        )
        assert f"request {chunk.request_id}: {what}" in told


@needs_chromium
def test_hovering_tells_what_a_gap_is_put_down_to(opened, recording, ledger):
    idle = max(ledger.idle[0][5:], key=lambda idle: idle.end_s - idle.start_s)
    zoom_to(opened, recording, ledger, idle.index)
    opened.mouse("mouseMoved", *where(opened, 0, idle.index, gap=True))
    opened.settle(0.3)
    told = text_of(opened, "#tip")
    assert f"before microbatch {idle.index}" in told
    cause = max(zip(idle.seconds, CAUSES, strict=True))[1]
    assert cause.replace("_", " ") in told and CAUSES[cause][1:] in told


@needs_chromium
@pytest.mark.parametrize("row", [0, 1])
def test_far_out_hovering_tells_the_shares_of_a_moment(tmp_path, row):
    made = made_up_recording(num_requests=60)
    write_report(tmp_path / "report.html", made, explain(made))
    with chromium.Page(width=700) as page:
        page.open(tmp_path / "report.html")
        top, left = page.run(f"""(() => {{
          const {{ timeline }} = pipeserveReport, box = timeline.canvas.getBoundingClientRect();
          return [box.top + timeline.rows[{row}].top + 9, box.left + 400];
        }})()""")
        page.mouse("mouseMoved", left, top)
        page.settle(0.2)
        told = page.run("document.getElementById('tip').innerText")
    assert ("Driver", "Stage 0")[row] in told
    assert sum(map(float, re.findall(r"([\d.]+) %", told))) == pytest.approx(100, abs=0.4)


@needs_chromium
def test_browsers_that_cannot_read_base64_themselves_draw_it_too(path):
    with chromium.Page() as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source="delete Uint8Array.fromBase64")
        page.open(path)
        assert page.run("Uint8Array.fromBase64 === undefined")
        assert page.complaints() == []
        assert page.run("document.querySelectorAll('#bars .bar').length") == 4


@needs_chromium
def test_a_click_follows_the_microbatch_and_keys_go_on(opened, recording, ledger):
    zoom_to(opened, recording, ledger, 40)
    opened.click(*where(opened, 1, 40))
    opened.settle(0.3)
    assert opened.run("pipeserveReport.timeline.selected") == 40
    assert "Microbatch 40" in text_of(opened, "#selected")
    span = recording.spans[1][40]
    computed = f"{(span.end_s - span.start_s) * 1e3:.3g} ms"
    cells = opened.run("""Array.from(document.querySelectorAll("#selected tbody tr")[1].cells,
      (cell) => cell.innerText)""")
    assert cells[0] == "1"
    assert cells[5:9] == [computed, computed, "5 ms", "1 ms"]
    assert (
        len(
            opened.run(
                "[...document.querySelectorAll('#selected tbody tr')].map((r) => r.innerText)"
            )
        )
        == 3
    )
    opened.key("n")
    opened.settle(0.4)
    assert "Microbatch 41" in text_of(opened, "#selected")
    opened.key("p")
    opened.key("p")
    opened.settle(0.4)
    assert "Microbatch 39" in text_of(opened, "#selected")
    opened.key("Escape")
    assert opened.run("document.getElementById('selected').hidden") is True


def window_of(opened: chromium.Page) -> tuple[float, float]:
    return tuple(opened.run("[pipeserveReport.axis.from, pipeserveReport.axis.to]"))


def tick_at(opened: chromium.Page, x: float) -> float:
    return opened.run(f"""pipeserveReport.axis.tick(
      {x} - pipeserveReport.timeline.canvas.getBoundingClientRect().left)""")


@needs_chromium
def test_wheel_drag_and_keys_move_the_window(opened, recording, ledger):
    x, y = where(opened, 0, 40)
    whole = window_of(opened)
    at = tick_at(opened, x)
    opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=-600)
    opened.settle()
    from_, to = window_of(opened)
    assert to - from_ < 0.5 * (whole[1] - whole[0])
    still = tick_at(opened, x)
    assert still == pytest.approx(at, rel=0.01)
    opened.mouse("mousePressed", x, y, button="left", clickCount=1)
    opened.mouse("mouseMoved", x - 120, y, button="left", buttons=1)
    opened.mouse("mouseReleased", x - 120, y, button="left", clickCount=1)
    dragged = window_of(opened)
    assert dragged[0] > from_ and dragged[1] - dragged[0] == pytest.approx(to - from_)
    assert opened.run("pipeserveReport.timeline.selected") is None
    opened.run("pipeserveReport.timeline.canvas.focus()")
    opened.key("ArrowRight")
    opened.settle()
    assert window_of(opened)[0] > dragged[0]
    opened.key("-")
    opened.settle()
    wider = window_of(opened)
    assert wider[1] - wider[0] == pytest.approx(2 * (to - from_), rel=0.01)
    opened.key("0")
    opened.settle()
    assert window_of(opened) == pytest.approx(whole, abs=0.05 * whole[1])


@needs_chromium
def test_the_bars_can_follow_the_timeline(opened, recording, ledger):
    whole = text_of(opened, "#bars")
    opened.run("document.querySelector('[data-scope=view]').click()")
    zoom_to(opened, recording, ledger, 40)
    assert "80 ms" in text_of(opened, "#causes-window")
    assert text_of(opened, "#bars") != whole


@needs_chromium
def test_requests_are_sorted_by_any_column(opened, recording, ledger):
    def first() -> list[str]:
        return opened.run("""Array.from(document.querySelector("#requests tbody tr").cells,
          (cell) => cell.innerText)""")

    waited = {request: sum(s) for request, s in ledger.by_request(recording).items()}
    assert int(first()[0]) == max(waited, key=waited.get)
    records = request_records(recording)
    ttft = {request: r.token_times_s[0] - r.arrival_s for request, r in records.items()}
    opened.run("document.querySelectorAll('#requests th button')[5].click()")
    assert int(first()[0]) == max(ttft, key=ttft.get)
    opened.run("document.querySelectorAll('#requests th button')[5].click()")
    assert int(first()[0]) == min(ttft, key=ttft.get)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_pages_of_one_stage_and_of_eight_draw_in_either_light(tmp_path, dark):
    made = made_up_recording(num_stages=8 if dark else 1, num_requests=4)
    write_report(tmp_path / "report.html", made, explain(made))
    with chromium.Page(dark=dark) as page:
        page.open(tmp_path / "report.html")
        page.settle(0.2)
        assert page.complaints() == []
        assert page.run("document.querySelectorAll('#bars .bar').length") == (9 if dark else 2)
        paper = page.run("getComputedStyle(document.querySelector('section')).backgroundColor")
        brightness = [int(part) for part in re.findall(r"\d+", paper)]
        assert (max(brightness) < 80) is dark


@needs_chromium
def test_a_killed_run_without_any_token_still_draws(tmp_path):
    made = made_up_recording(num_requests=4)
    first = made.completed[0].done_s
    cut: dict[str, Any] = {
        "ended": [],
        "completed": [],
        "planned": [p for p in made.planned if p.sent_s < first],
        "spans": [[s for s in spans if s.sent_s <= first] for spans in made.spans],
    }
    killed = dataclasses.replace(made, **cut)
    write_report(tmp_path / "report.html", killed, explain(killed))
    with chromium.Page() as page:
        page.open(tmp_path / "report.html")
        page.settle(0.2)
        assert page.complaints() == []
        assert "had not ended" in page.run("document.getElementById('notes').innerText")


@needs_chromium
def test_names_that_look_like_markup_are_text(tmp_path):
    """Also those that would keep the browser from seeing the end of a script."""
    evil = "</script><script>window.was_run = true</script><b>x<!--<script>"
    made = made_up_recording(num_requests=4)
    meta = {**made.meta, "policy": evil, "config": {"model": evil}}
    faults = [Fault(0, made.completed[-1].done_s, evil)]
    named = dataclasses.replace(made, meta=meta, notes=[evil], faults=faults)
    write_report(tmp_path / "report.html", named, explain(named))
    with chromium.Page() as page:
        page.open(tmp_path / "report.html")
        assert page.complaints() == []
        assert page.run("window.was_run ?? false") is False
        assert evil in page.run("document.getElementById('notes').innerText")
