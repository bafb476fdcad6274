"""`pipeserve report`: numbers, terminal, two runs compared, recordings that lack parts, trace."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from made_up_recording import made_up_recording, write
from rich.console import Console

from pipeserve.core.nouns import Chunk
from pipeserve.core.records import Arrived, Completed, Ended, Fault, Ping, Planned
from pipeserve.errors import ConfigError
from pipeserve.launch.cli import main
from pipeserve.launch.show.report_numbers import compare, report_of
from pipeserve.launch.show.report_tables import print_run
from pipeserve.launch.verbs.report import read_run, report
from pipeserve.profiling.ledger.causes import CAUSES
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.pages.perfetto import events, write_perfetto
from pipeserve.profiling.recording.recording import Recording
from pipeserve.profiling.recording.request_times import records_of, request_records
from pipeserve.profiling.recording.summary import gaps_s, summarize

CLOCKED = ("plan_s", "input_s", "start_s", "head_s", "end_s", "sent_s")


@pytest.fixture(scope="module")
def recording() -> Recording:
    return made_up_recording()


@pytest.fixture
def folder(tmp_path, recording) -> Path:
    write(tmp_path / "run", recording)
    return tmp_path / "run"


def planned(index: int, *chunks: Chunk) -> Planned:
    return Planned(index, "", -1, 0.0, 0.0, 0.0, chunks, 0, 0, 0, ())


# ---- times of requests --------------------------------------------------------------------------


def test_a_token_is_known_when_its_microbatch_is_completed():
    prompt = [Chunk(7, 0, 4, ()), Chunk(7, 4, 6, (), num_logits=1)]
    decode = Chunk(7, 6, 7, (), num_logits=1)
    found = records_of(
        Recording(
            {},
            arrived=[Arrived(7, 1.0, 6, 9), Arrived(8, 1.5, 3, 9)],
            planned=[planned(0, prompt[0]), planned(1, prompt[1]), planned(2, decode)],
            completed=[
                Completed(0, 0, 2.0, 2.1, (0,)),
                Completed(1, 0, 3, 3.5, (1,)),
                Completed(2, 0, 4, 4.5, (1,)),
            ],
        )
    )
    assert [(r.num_prompt_tokens, r.arrival_s, r.token_times_s) for r in found] == [
        (6, 1.0, (3.5, 4.5))
    ]
    assert gaps_s(found) == [1.0]


def test_positions_that_are_only_scored_give_no_token():
    scored = Chunk(1, 0, 4, (), num_logits=4, num_scored=4)
    last = Chunk(1, 4, 6, (), num_logits=2, num_scored=1)
    recording = Recording(
        {},
        arrived=[Arrived(1, 0.0, 6, 9)],
        planned=[planned(0, scored), planned(1, last)],
        completed=[Completed(0, 0, 1, 1, (0,)), Completed(1, 0, 2, 2, (1,))],
    )
    assert request_records(recording)[1].token_times_s == (2,)


def test_tokens_behind_the_end_of_a_request_and_of_lost_microbatches_do_not_count():
    chunks = [Chunk(1, n, n + 1, (), num_logits=1) for n in range(4)]
    recording = Recording(
        {},
        arrived=[Arrived(1, 0.0, 1, 9)],
        planned=[planned(n, chunk) for n, chunk in enumerate(chunks)],
        completed=[Completed(n, 0, n + 1, n + 1, (1,)) for n in (0, 2, 3)],
        ended=[Ended(1, 3.0, "stop", 2)],
    )
    assert request_records(recording)[1].token_times_s == (1, 3)


def test_every_output_token_of_a_simulated_run_is_found(recording):
    records = request_records(recording)
    ended = {each.request_id: each.num_output_tokens for each in recording.ended}
    assert {request: len(r.token_times_s) for request, r in records.items()} == ended
    assert all(r.arrival_s < r.token_times_s[0] for r in records.values())


# ---- one run ------------------------------------------------------------------------------------


def test_shares_of_every_stage_sum_to_the_whole(recording):
    found = report_of("run", recording, explain(recording))
    assert len(found["stages"]) == 2
    for stage in found["stages"]:
        assert stage["busy"] + sum(stage["idle_by_cause"].values()) == pytest.approx(1)
        assert stage["layers"] == 1
    means = {entry["cause"]: entry["share"] for entry in found["causes"]}
    for cause in CAUSES:
        shares = [stage["idle_by_cause"].get(cause, 0) for stage in found["stages"]]
        assert means.get(cause, 0) == pytest.approx(sum(shares) / 2)
    assert list(means.values()) == sorted(means.values(), reverse=True)


def test_figures_are_those_of_the_summary_and_of_the_ledger(recording):
    ledger = explain(recording)
    found = report_of("run", recording, ledger)
    summary = summarize(records_of(recording))
    assert found["requests"] == 20
    assert found["total_tokens_per_s"] == summary.total_tokens_per_s
    assert found["ttft_s"]["p99"] == summary.ttft_s.p99
    assert found["tbt_s"]["p50"] == summary.tbt_s.p50
    assert found["seconds"] == pytest.approx(ledger.seconds)
    assert found["policy"] == "sarathi_serve"
    assert found["microbatches"] == len(recording.planned)


def test_what_a_cause_could_give_back_is_bounded_by_the_stage_that_has_most_of_it(recording):
    ledger = explain(recording)
    found = report_of("run", recording, ledger)
    for entry in found["causes"]:
        most = max(ledger.idle_s(stage)[entry["cause"]] for stage in range(2))
        gain = ledger.seconds / (ledger.seconds - most) - 1
        assert entry["gain_at_most"] == pytest.approx(gain)
        tokens = found["total_tokens_per_s"] * (1 + gain)
        assert entry["tokens_per_s_at_most"] == pytest.approx(tokens)


def test_worst_microbatches_are_those_that_were_waited_for_longest(recording):
    ledger = explain(recording)
    worst = report_of("run", recording, ledger)["worst_microbatches"]
    by_index = {index: sum(seconds) for index, seconds in ledger.by_microbatch().items()}
    assert [each["idle_s"] for each in worst] == sorted(by_index.values(), reverse=True)[:5]
    assert all(by_index[each["index"]] == each["idle_s"] >= each["cause_s"] for each in worst)


def test_the_verb_prints_and_writes_page_trace_and_numbers(folder, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    assert report([folder], json_file=numbers) == 0
    printed = capsys.readouterr().out
    for text in ("made-up on 2 stages", "sarathi_serve", "busy", "TTFT p50", "without it, at most"):
        assert text in printed
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    keys = {"requests", "seconds", "total_tokens_per_s", "output_tokens_per_s", "ttft_s", "tbt_s"}
    found = json.loads(numbers.read_text())
    assert keys | {"stages", "policy", "causes", "notes", "kind"} <= set(found)


def test_page_and_trace_go_where_they_are_told(folder, tmp_path):
    html, trace = tmp_path / "a.html", tmp_path / "b.json"
    report([folder], html_file=html, perfetto_file=trace)
    assert html.exists() and trace.exists()
    assert not (folder / "report.html").exists() and not (folder / "trace.json").exists()


def test_a_trace_that_would_be_huge_is_written_only_when_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setattr("pipeserve.launch.verbs.report.MOST_TRACED", 3)
    report([folder])
    assert "--perfetto FILE writes it" in capsys.readouterr().out
    assert (folder / "report.html").exists() and not (folder / "trace.json").exists()
    report([folder], perfetto_file=folder / "asked.json")
    assert (folder / "asked.json").exists()


def test_clocks_of_other_machines_are_aligned(tmp_path, recording, capsys):
    ahead = 250.0
    spans = recording.spans[1]
    moved = [s._replace(**{name: getattr(s, name) + ahead for name in CLOCKED}) for s in spans]
    at = recording.arrived[0].at_s
    pings = [Ping(1, at + n / 5, at + n / 5 + ahead + 1e-5, at + n / 5 + 2e-5) for n in range(9)]
    kept = [recording.spans[0], moved]
    write(tmp_path / "run", dataclasses.replace(recording, spans=kept, pings=pings))
    run = read_run(tmp_path / "run")
    found = [span.start_s for span in run.recording.spans[1]]
    assert found == pytest.approx([span.start_s for span in spans], abs=1e-3)
    assert run.ledger.seconds == pytest.approx(explain(recording).seconds, abs=1e-3)
    report([tmp_path / "run"])
    assert "clock" in capsys.readouterr().out


def test_a_report_file_that_cannot_be_written_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        report([folder], html_file=tmp_path / "nowhere" / "a.html")


def test_the_command_line_takes_it(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--html", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").exists() and (folder / "trace.json").exists()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["report"]) == 2


# ---- two runs -----------------------------------------------------------------------------------


def test_two_runs_are_compared_cause_by_cause(recording):
    slower = made_up_recording(slow={1: 1.5})
    both = [report_of(name, run, explain(run)) for name, run in (("a", recording), ("b", slower))]
    found = compare(*both)
    changes = {change["name"]: change for change in found["changes"]}
    assert sum(change["share_points"] for change in changes.values()) == pytest.approx(0, abs=1e-9)
    assert changes["stage_imbalance"]["share_points"] > 5
    busy = changes["busy"]
    share = sum(stage["busy"] for stage in both[1]["stages"]) / 2
    assert busy["b"]["share"] == pytest.approx(share)
    per_token = 1000 * share * both[1]["seconds"] / both[1]["output_tokens"]
    assert busy["b"]["ms_per_token"] == pytest.approx(per_token)
    assert busy["ms_per_token"] == pytest.approx(per_token - busy["a"]["ms_per_token"])
    per_microbatch = 1000 * share * both[1]["seconds"] / both[1]["microbatches"]
    assert busy["b"]["ms_per_microbatch"] == pytest.approx(per_microbatch)


def test_a_run_compared_with_itself_has_moved_nowhere(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    numbers = tmp_path / "numbers.json"
    report([folder, folder], json_file=numbers)
    changes = json.loads(numbers.read_text())["changes"]
    assert changes and all(change["share_points"] == 0 for change in changes)
    assert all(change["ms_per_token"] == 0 for change in changes)
    assert "ms/microbatch" in capsys.readouterr().out
    assert not (folder / "report.html").exists()


def test_runs_of_different_numbers_of_stages_compare(recording):
    three = made_up_recording(num_stages=3)
    found = compare(*(report_of("run", run, explain(run)) for run in (recording, three)))
    assert sum(change["share_points"] for change in found["changes"]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [0, 3])
def test_one_folder_or_two(folder, count):
    with pytest.raises(ConfigError, match="folder"):
        report([folder] * count)


def test_two_runs_give_no_page(folder, tmp_path):
    with pytest.raises(ConfigError, match="--html"):
        report([folder, folder], html_file=tmp_path / "a.html")


# ---- what is missing ----------------------------------------------------------------------------


def read_out(folder: Path, capsys) -> str:
    assert report([folder]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_missing_stage_is_said_and_the_rest_is_shown(folder, capsys):
    (folder / "stage-0.jsonl").unlink()
    printed = read_out(folder, capsys)
    assert "stage-0" in printed or "stage 0" in printed.partition("note:")[2]
    assert "stage 1" in printed and "20" in printed
    assert (folder / "report.html").exists()


def test_a_truncated_stage_is_said_and_the_rest_is_shown(folder, capsys):
    file = folder / "stage-1.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * 0.6)])
    printed = read_out(folder, capsys)
    assert "stage-1.jsonl breaks off" in printed
    assert (folder / "trace.json").exists()


def test_a_damaged_time_is_said_and_no_moment_counts_twice(recording):
    """A span that seems to last into the ones behind it, and one that ends before it starts."""
    first = list(recording.spans[0])
    first[3] = first[3]._replace(end_s=first[6].end_s)
    second = list(recording.spans[1])
    second[5] = second[5]._replace(end_s=second[5].start_s - 1.0)
    damaged = dataclasses.replace(recording, spans=[first, second])
    found = report_of("run", damaged, explain(damaged))
    for stage in found["stages"]:
        assert stage["busy"] + sum(stage["idle_by_cause"].values()) == pytest.approx(1, abs=1e-9)
    said = [note for note in found["notes"] if "damaged" in note]
    assert [note.partition(" microbatches ")[0] for note in said] == ["stage 0: 1", "stage 1: 1"]
    assert not any("damaged" in note for note in report_of("run", recording, None)["notes"])


def test_files_of_another_run_are_left_out_and_said(folder, tmp_path, capsys, recording):
    write(tmp_path / "other", recording)
    (folder / "stage-1.jsonl").write_bytes((tmp_path / "other" / "stage-1.jsonl").read_bytes())
    assert "stage-1.jsonl is of another run" in read_out(folder, capsys)


def test_a_killed_run_counts_what_had_ended(tmp_path, capsys, recording):
    middle = recording.completed[len(recording.completed) // 2].done_s
    killed = Recording(
        recording.meta,
        arrived=[a for a in recording.arrived if a.at_s < middle],
        ended=[e for e in recording.ended if e.at_s < middle],
        planned=[p for p in recording.planned if p.sent_s < middle],
        completed=[c for c in recording.completed if c.done_s < middle],
        spans=[[s for s in spans if s.sent_s < middle] for spans in recording.spans],
        faults=[Fault(1, middle, "killed by signal 9")],
    )
    write(tmp_path / "killed", killed)
    printed = read_out(tmp_path / "killed", capsys)
    left = len(killed.arrived) - len(killed.ended)
    assert left > 0
    assert f"{left} of {len(killed.arrived)} requests had not ended" in printed
    assert "killed by signal 9" in (tmp_path / "killed" / "report.html").read_text()


def test_an_empty_run_says_so_and_makes_no_page(tmp_path, capsys, recording):
    empty = Recording(recording.meta, spans=[[], []])
    write(tmp_path / "empty", empty)
    printed = read_out(tmp_path / "empty", capsys)
    assert "no microbatch was completed" in printed
    assert not (tmp_path / "empty" / "report.html").exists()


def test_a_run_without_a_driver_file_still_shows_its_stages(folder, capsys):
    (folder / "driver.jsonl").unlink()
    printed = read_out(folder, capsys)
    assert "driver.jsonl" in printed and "busy" in printed
    assert (folder / "report.html").exists()


def test_an_empty_run_compares(tmp_path, folder, recording, capsys):
    write(tmp_path / "empty", Recording(recording.meta, spans=[[], []]))
    assert report([tmp_path / "empty", folder]) == 0
    assert "note on A: no microbatch was completed" in " ".join(capsys.readouterr().out.split())


def test_no_recording_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no recording"):
        report([tmp_path])


def test_faults_are_in_the_notes(recording):
    lost = Recording(**{name: getattr(recording, name) for name in recording.__slots__})
    lost.faults = [Fault(1, recording.arrived[0].at_s + 0.5, "killed by signal 9")]
    found = report_of("run", lost, explain(recording))
    assert "stage 1 was lost after 0.500 s: killed by signal 9" in found["notes"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_run(found, console)
    assert "killed by signal 9" in console.export_text()


# ---- the trace ----------------------------------------------------------------------------------

# Of the Trace Event Format: phase -> what such an event must have.
SCHEMA = {
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "X": {"name": str, "cat": str, "ts": float, "dur": float, "pid": int, "tid": int, "args": dict},
    "C": {"name": str, "ts": float, "pid": int, "args": dict},
    "s": {"name": str, "cat": str, "ts": float, "pid": int, "tid": int, "id": int},
    "t": {"name": str, "cat": str, "ts": float, "pid": int, "tid": int, "id": int},
    "f": {"name": str, "cat": str, "ts": float, "pid": int, "tid": int, "id": int, "bp": str},
    "i": {"name": str, "ts": float, "pid": int, "tid": int, "s": str},
}


@pytest.fixture(scope="module")
def trace(recording) -> list[dict]:
    return list(events(recording, explain(recording)))


def test_every_event_is_as_the_format_has_it(trace, recording, tmp_path):
    write_perfetto(tmp_path / "trace.json", recording, explain(recording))
    read = json.loads((tmp_path / "trace.json").read_text())
    assert read["traceEvents"] == trace
    assert {event["ph"] for event in trace} == {"M", "X", "C", "s", "t", "f"}
    for event in trace:
        for key, kind in SCHEMA[event["ph"]].items():
            assert isinstance(event[key], kind), (key, event)
        assert math.isfinite(event.get("ts", 0.0)) and event.get("dur", 0.0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def test_each_thread_has_its_name_and_its_slices_do_not_overlap(trace):
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert names == {1: "driver", 2: "stage 0", 3: "stage 1"}
    for thread in (2, 3):
        slices = sorted((e["ts"], e["dur"]) for e in trace if e["ph"] == "X" and e["tid"] == thread)
        ends = [start + length for start, length in slices]
        assert all(start >= end - 0.002 for (start, _), end in zip(slices[1:], ends, strict=False))


def test_slices_cover_each_stage_from_first_arrival_to_last_token(trace, recording):
    ledger = explain(recording)
    for thread in (2, 3):
        lengths = [e["dur"] for e in trace if e["ph"] == "X" and e["tid"] == thread]
        assert sum(lengths) == pytest.approx(ledger.seconds * 1e6, abs=1)


def test_idle_slices_are_named_by_a_cause_and_carry_the_others(trace):
    idle = [event for event in trace if event.get("cat") == "idle"]
    assert idle
    for event in idle:
        assert event["name"] in CAUSES
        milliseconds = event["args"]
        assert milliseconds[f"{event['name']} ms"] == max(milliseconds.values())
        assert 1000 * sum(milliseconds.values()) == pytest.approx(event["dur"], abs=1)


def test_arrows_lead_from_the_plan_through_every_stage_to_the_result(trace, recording):
    for index in (0, len(recording.planned) // 2):
        steps = [e for e in trace if e["ph"] in "stf" and e["id"] == index]
        assert [(e["ph"], e["tid"]) for e in steps] == [("s", 1), ("t", 2), ("t", 3), ("f", 1)]
        assert [e["ts"] for e in steps] == sorted(e["ts"] for e in steps)
        for step in steps:
            assert any(
                e["ph"] == "X"
                and e["tid"] == step["tid"]
                and e["ts"] <= step["ts"] <= e["ts"] + e["dur"]
                and e["args"].get("microbatch") == index
                for e in trace
            )


def test_counters_are_those_of_the_plans(trace, recording):
    blocks = [e["args"]["blocks"] for e in trace if e["name"] == "free KV blocks"]
    assert blocks == [plan.num_free_blocks for plan in recording.planned]


def test_a_fault_is_an_instant_of_its_stage(recording):
    lost = Recording({}, spans=recording.spans, faults=[Fault(1, 2.0, "killed")])
    [event] = [e for e in events(lost, explain(recording)) if e["ph"] == "i"]
    assert (event["name"], event["tid"]) == ("fault: killed", 3)
    assert all(isinstance(event[key], kind) for key, kind in SCHEMA["i"].items())
