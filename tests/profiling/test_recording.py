"""Recordings in memory and in files: what goes round, and what is said of damaged ones."""

import gc
import json
from math import inf, isnan, nan
from types import SimpleNamespace

import pytest
from fake_client import FakeDriver, byte_tokenizer

from pipeserve.core.journal import Journal
from pipeserve.core.nouns import Chunk, Microbatch, Output, Request, StageCost
from pipeserve.core.records import (
    Arrived,
    Completed,
    Ended,
    Fault,
    Headed,
    Ping,
    Planned,
    Record,
    Span,
)
from pipeserve.errors import ConfigError
from pipeserve.launch import cli
from pipeserve.launch.run import starting
from pipeserve.launch.verbs import simulate
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.ledger.notes import notes_of
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.recording.recording import Ring, recording_of
from pipeserve.profiling.recording.writer import RecordingWriter, check_recordable
from pipeserve.sampling_params import SamplingParams

META = {"kind": "real", "plan": {"stages": [{"stage": 0}, {"stage": 1}], "window": 2}}
NUM = 20


def span(stage, index, cpu_s=0.5):
    at = index + 0.1 * stage
    inputs = at if stage else (-inf if index % 2 else at)
    ends = (at + 0.3, at + 0.5, at + 0.5 + 1e-9)
    return Span(stage, index, 3, at, inputs, at + 1 / 3, *ends, cpu_s, nan, 1 - stage)


def planned(index):
    chunks = (Chunk(7, 0, 2, (), None, 0, 0), Chunk(8, 5, 6, (), index - 1, 1, 0))
    return Planned(index, "window", index - 2, 1.5, 2.5, 3.5, chunks, 1, 2, 30, (0.25, 1e-7))


def records():
    """Of a run of two stages, one of each kind, and NUM microbatches."""
    yield Arrived(7, 0.1, 2, 5)
    yield Arrived(8, 0.2, 4, 6)
    for index in range(NUM):
        yield planned(index)
        yield from (span(0, index), span(1, index))
        if index % 2:
            yield Headed(0, index, *[index + at for at in (0.6, 0.7, 0.8, 0.8)], nan, 1e-9)
        yield Completed(index, 0.1, 0.2, 0.3 + index, (0, 3))
    yield Ping(1, 0.5, 99.5, 0.75)
    yield Ended(7, 20.5, "length", 5)
    yield Ended(8, 21.5, "abort", 3)
    yield Fault(1, 30.0, "stage 1 died: \u20ac \n \x00")


def written(folder, told=None, **options):
    with RecordingWriter(folder, META, **options) as writer:
        for record in records() if told is None else told:
            writer.record(record)
    return folder


def same(ours, theirs):
    """Equal, where NaN is NaN."""
    return repr(ours) == repr(theirs) and type(ours) is type(theirs)


def lists_of(recording):
    return [
        recording.arrived, recording.ended, recording.planned, recording.completed,
        recording.headed, recording.pings, recording.faults, *recording.spans,
    ]  # fmt: skip


# ---- what goes round ----------------------------------------------------------------------------


def test_every_record_comes_back_as_it_was(tmp_path):
    recording = read_recording(written(tmp_path / "run"))
    expected = recording_of(records(), 2, recording.meta)
    for ours, theirs in zip(lists_of(recording), lists_of(expected), strict=True):
        assert theirs and all(map(same, ours, theirs)) and len(ours) == len(theirs)
    assert isnan(recording.spans[0][0].between_cpu_s)
    assert recording.spans[0][1].input_s == -inf
    assert type(recording.planned[0].chunks[0]) is Chunk
    assert recording.notes == []
    meta = recording.meta
    assert meta.pop("schema") == 3 and len(meta.pop("run")) == 16
    assert meta == META


def test_blocks_are_left_out(tmp_path):
    plan = planned(3)
    with_blocks = plan._replace(chunks=(plan.chunks[0]._replace(new_blocks=(5, 6)), plan.chunks[1]))
    recording = read_recording(written(tmp_path / "run", [with_blocks, span(0, 3), span(1, 3)]))
    assert recording.planned == [plan]


def test_jq_can_read_it(tmp_path):
    folder = written(tmp_path / "run")
    head, first, *_ = map(json.loads, (folder / "driver.jsonl").read_text().splitlines())
    assert first[0] == "arrived"
    assert dict(zip(head["fields"]["arrived"], first[1], strict=True))["num_prompt_tokens"] == 2
    head, first, *_ = map(json.loads, (folder / "stage-1.jsonl").read_text().splitlines())
    assert dict(zip(head["fields"]["span"], first, strict=True))["cpu_s"] == 0.5


def test_it_is_written_while_the_run_goes_on_and_in_batches(tmp_path):
    with RecordingWriter(tmp_path, META) as writer:
        flushes = []
        flush = writer.flush
        writer.flush = lambda: (flushes.append(1), flush())
        for number in range(98):
            plan = planned(number)
            writer.record(plan._replace(sent_s=number * 0.06))
            writer.record(span(0, number))
        assert 10 <= len(flushes) <= 13  # of 6 seconds
        recording = read_recording(tmp_path)
        assert 90 <= len(recording.planned) < 98 and 88 <= len(recording.spans[0]) < 98
    assert len(read_recording(tmp_path).planned) == 98


def test_what_is_not_written_yet_is_nothing_to_the_collector(tmp_path):
    with RecordingWriter(tmp_path, META) as writer:
        gc.collect()
        before = len(gc.get_objects())
        for number in range(300):
            writer.record(planned(number)._replace(sent_s=0.0))
            writer.record(span(0, number))
        gc.collect()
        assert len(gc.get_objects()) < before + 20
    assert len(read_recording(tmp_path).planned) == 300


# ---- folders ------------------------------------------------------------------------------------


def test_a_folder_with_a_recording_is_refused_or_replaced(tmp_path):
    first = read_recording(written(tmp_path)).meta["run"]
    (tmp_path / "stage-7.jsonl").touch()
    (tmp_path / "report.html").touch()
    for check in (check_recordable, lambda folder: RecordingWriter(folder, META)):
        with pytest.raises(ConfigError, match="holds a recording already"):
            check(tmp_path)
    assert read_recording(tmp_path).meta["run"] == first
    recording = read_recording(written(tmp_path, [], overwrite=True))
    assert recording.meta["run"] != first
    assert not any(lists_of(recording)) and recording.num_stages == 2
    assert not (tmp_path / "stage-7.jsonl").exists() and (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: .*; give a folder that can be written to"):
        check_recordable(tmp_path / "file")
    with pytest.raises(ConfigError, match="give a folder"):
        check_recordable(tmp_path / "file" / "below")


def test_a_full_disk_ends_the_recording_with_one_line_and_not_the_run(tmp_path, capsys):
    with RecordingWriter(tmp_path, META) as writer:
        writer._files[1].close()
        writer._files[1] = open("/dev/full", "wb")  # noqa: SIM115
        for record in [*records(), *records()]:
            writer.record(record)
            writer.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: recording to {tmp_path} ended: No space left on device")
    recording = read_recording(tmp_path)  # what was written before is still there
    assert recording.arrived and not recording.spans[0]


# ---- damaged ones -------------------------------------------------------------------------------


def assert_notes(folder, *beginnings):
    """Reads a recording of which all that is wrong is said."""
    recording = read_recording(folder)
    assert len(recording.notes) == len(beginnings), recording.notes
    for note, beginning in zip(recording.notes, beginnings, strict=True):
        assert note.startswith(beginning) and "\n" not in note, note
    return recording


def test_a_missing_stage_file(tmp_path):
    folder = written(tmp_path)
    (folder / "stage-1.jsonl").unlink()
    recording = assert_notes(folder, "stage-1.jsonl is missing")
    assert len(recording.spans[0]) == NUM and recording.spans[1] == []


def test_a_missing_driver_file(tmp_path):
    folder = written(tmp_path)
    (folder / "driver.jsonl").unlink()
    recording = assert_notes(folder, "driver.jsonl is missing")
    assert [len(spans) for spans in recording.spans] == [NUM, NUM] and recording.planned == []


def test_a_missing_run_json(tmp_path):
    folder = written(tmp_path)
    (folder / "run.json").unlink()
    recording = assert_notes(folder, "run.json is missing")
    assert recording.meta == {} and recording.num_stages == 2
    (folder / "run.json").write_text('{"schema": 2, "run"')
    assert assert_notes(folder, "run.json is damaged").meta == {}
    (folder / "run.json").write_text("[]")
    assert assert_notes(folder, "run.json is damaged").meta == {}


def test_a_truncated_last_line(tmp_path):
    folder = written(tmp_path)
    path = folder / "stage-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    recording = assert_notes(folder, "stage-0.jsonl breaks off", f"stage-0.jsonl lacks 1 of {NUM}")
    assert [entry.index for entry in recording.spans[0]] == list(range(NUM - 1))


@pytest.mark.parametrize("damage", [b"[0,4,3", b"\xff\xfe\x00", b"{}", b"", b'["span",[]]', b"[9]"])
def test_a_damaged_line_in_the_middle(tmp_path, damage):
    folder = written(tmp_path)
    for name in ("stage-0.jsonl", "driver.jsonl"):
        lines = (folder / name).read_bytes().split(b"\n")
        lines[10] = damage
        (folder / name).write_bytes(b"\n".join(lines))
    recording = read_recording(folder)
    assert recording.notes[:2] == [
        "driver.jsonl: 1 damaged lines are left out",
        "stage-0.jsonl: 1 damaged lines are left out",
    ]
    assert len(recording.spans[0]) == NUM - 1
    assert sum(map(len, lists_of(recording)[:7])) == len(list(records())) - 2 * NUM - 1


def test_files_of_two_runs(tmp_path):
    folder = written(tmp_path / "ours")
    other = written(tmp_path / "other", [span(1, 3)])
    (other / "stage-1.jsonl").replace(folder / "stage-1.jsonl")
    recording = assert_notes(
        folder, "stage-1.jsonl is of another run", f"stage-1.jsonl lacks {NUM} of {NUM}"
    )
    assert len(recording.spans[0]) == NUM and recording.spans[1] == []
    folder = written(tmp_path / "again")
    (other / "run.json").replace(folder / "run.json")
    recording = assert_notes(folder, "run.json is of another run")
    assert recording.meta == {} and len(recording.spans[1]) == NUM


def test_a_killed_run(tmp_path):
    folder = written(tmp_path, list(records())[:-5])
    recording = assert_notes(folder)
    assert len(recording.completed) == NUM - 1
    [note] = notes_of(recording, None)
    assert note.startswith("2 of 2 requests had not ended")


def test_an_empty_run(tmp_path):
    assert_notes(written(tmp_path, []), "no stage computed anything")


def test_a_file_without_head_and_one_of_no_stage(tmp_path):
    folder = written(tmp_path)
    (folder / "driver.jsonl").write_bytes(b"")
    (folder / "stage-2.jsonl").write_bytes((folder / "stage-1.jsonl").read_bytes())
    recording = assert_notes(
        folder,
        "driver.jsonl has no head",
        "stage-2.jsonl is of no stage",
        "driver.jsonl is missing",
    )
    assert len(recording.spans[1]) == NUM


def test_a_field_that_came_later_has_its_default(tmp_path):
    path = written(tmp_path) / "driver.jsonl"
    head, *lines = map(json.loads, path.read_text().splitlines())
    head["fields"]["arrived"].remove("priority")
    for name, fields in lines:
        if name == "arrived":
            fields.pop()
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    assert assert_notes(path.parent).arrived == recording_of(records(), 2, {}).arrived


def test_a_newer_schema_is_read_by_the_names_of_its_fields(tmp_path):
    folder = written(tmp_path)
    for name, kind in (("driver.jsonl", "completed"), ("stage-0.jsonl", "span")):
        head, *lines = map(json.loads, (folder / name).read_text().splitlines())
        head["schema"] = 4
        head["fields"][kind] = [*reversed(head["fields"][kind]), "new"]
        for line in lines:
            fields = line[1] if line[0] == kind else line
            if kind == "span" or line[0] == kind:
                fields.reverse()
                fields.append("?")
        lines.append(["unheard", [1]] if kind == "completed" else lines.pop())
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    recording = assert_notes(
        folder, "driver.jsonl is of a newer pipeserve", "stage-0.jsonl is of a newer pipeserve"
    )
    expected = recording_of(records(), 2, {})
    for ours, theirs in zip(lists_of(recording), lists_of(expected), strict=True):
        assert list(map(repr, ours)) == list(map(repr, theirs))


def test_spans_of_before_tensor_parallelism_are_read(tmp_path):
    """They say nothing of ranks: those of stages of one rank have nothing to say."""
    folder = written(tmp_path)
    path = folder / "stage-0.jsonl"
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head["fields"]["span"][-2:] == ["all_reduce_s", "rank_wait_s"]
    del head["fields"]["span"][-2:]
    lines = [head, *(line[:-2] for line in lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recording = read_recording(folder)
    assert recording.notes == []
    assert repr(recording.spans[0]) == repr([span(0, index) for index in range(NUM)])


def test_of_an_older_schema_what_lacks_a_field_is_left_out(tmp_path):
    folder = written(tmp_path)
    head, *lines = map(json.loads, (folder / "driver.jsonl").read_text().splitlines())
    head["schema"] = 1
    head["fields"]["completed"].remove("counts")
    for kind, fields in lines:
        if kind == "completed":
            del fields[-1]
    text = "".join(json.dumps(line) + "\n" for line in [head, *lines])
    (folder / "driver.jsonl").write_text(text)
    recording = assert_notes(
        folder,
        "driver.jsonl is of an older pipeserve",
        f"driver.jsonl: {NUM} damaged lines",
    )
    assert len(recording.planned) == NUM and not recording.completed


def test_a_line_that_is_too_short_for_its_names_is_damaged(tmp_path):
    folder = written(tmp_path)
    file = folder / "stage-0.jsonl"
    head, *lines = map(json.loads, file.read_text().splitlines())
    head["fields"]["span"].reverse()
    lines = [list(reversed(line)) for line in lines]
    del lines[1][3:]
    file.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    beginnings = "stage-0.jsonl: 1 damaged", f"stage-0.jsonl lacks 1 of {NUM} microbatches"
    assert len(assert_notes(folder, *beginnings).spans[0]) == NUM - 1


def test_nothing_that_can_be_read_is_an_error_of_one_line(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="holds no recording; give a folder"):
            read_recording(folder)
    (tmp_path / "run.json").write_text("?")
    (tmp_path / "stage-0.jsonl").write_text("?")
    with pytest.raises(ConfigError, match=r"nothing of .* run.json is damaged.*stage-0.*no head"):
        read_recording(tmp_path)
    with pytest.raises(ConfigError, match=r"notes.txt: .*; give a folder that can be read"):
        read_recording(tmp_path / "notes.txt")


# ---- in memory ----------------------------------------------------------------------------------


def test_a_ring_gives_back_what_it_was_told():
    ring, told = Ring(), list(records())
    for record in told:
        ring.record(record)
    kept = list(ring)
    assert len(ring) == len(kept) == len(told) and all(map(same, kept, told))
    assert {type(record) for record in kept} == set(Record.__args__)
    with_blocks = Chunk(7, 0, 600, tuple(range(70_000, 70_038)), None, 3, 2)
    plan = planned(99)._replace(chunks=(with_blocks,), predicted_s=(0.1, 2.0))
    ring.record(plan)
    assert list(ring)[-1] == plan and type(list(ring)[-1].chunks[0]) is Chunk


def test_a_ring_keeps_the_latest_within_its_bytes():
    ring = Ring(max_bytes=10_000)
    for index in range(1000):
        ring.record(span(0, index))
        assert ring.num_bytes <= 10_000 + 100
    kept = [entry.index for entry in ring]
    assert kept == list(range(1000 - len(kept), 1000)) and 90 <= len(kept) <= 120
    assert ring.whole_from_s == span(0, 999 - len(kept)).end_s
    plan = planned(0)
    for index in range(100):
        ring.record(plan._replace(index=index, chunks=plan.chunks * 20))
        assert ring.num_bytes <= 10_000 + 1000
    assert [entry.index for entry in ring][-3:] == [97, 98, 99] and len(ring) < 25
    assert ring.whole_from_s == span(0, 999).end_s
    assert ring.spans() == []
    ring.clear()
    assert len(ring) == 0 and ring.whole_from_s == -inf and ring.num_bytes == 0
    ring.record(span(1, 0))
    assert [entry.stage for entry in ring.spans()] == [1]


def test_what_is_taken_from_a_ring_is_no_longer_in_it():
    ring = Ring(max_bytes=2000)
    for index in range(100):
        ring.record(span(0, index))
    whole_from_s, kept = ring.whole_from_s, list(ring)
    taken = ring.take()
    assert len(ring) == 0 and ring.whole_from_s == -inf
    ring.record(span(1, 100))
    assert all(map(same, taken, kept)) and len(taken) == len(kept) < 100
    assert taken.whole_from_s == whole_from_s > 0


def test_a_ring_may_be_read_while_it_is_told_more():
    ring = Ring()
    ring.record(span(0, 0))
    reading = iter(ring)
    assert next(reading).index == 0
    for index in range(1, 2000):
        ring.record(span(0, index))
    assert len(ring) == 2000


def test_the_collector_walks_nothing_of_a_ring():
    """Its pauses would grow with what was recorded: 0.2 s and more for a million records."""
    ring = Ring()
    told = [planned(0)._replace(chunks=(Chunk(9, 5, 6, (), 4, 1),) * 64), *records()]
    for record in told:
        ring.record(record)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        for record in told:
            ring.record(record)
    gc.collect()
    assert len(ring) == 1001 * len(told)
    assert len(gc.get_objects()) - before < 10
    # What a collection visits of it: the pages, which it does not follow.
    assert len(gc.get_referents(*gc.get_referents(ring))) < 1000


# ---- what a plan waited for ---------------------------------------------------------------------


@pytest.fixture
def told():
    """A journal of an engine of which nothing but counts is asked, and its records."""
    last = SimpleNamespace(cost=StageCost((0.5, 0.25)))
    engine = SimpleNamespace(last=last, num_waiting=1, num_running=2, num_free_blocks=3, window=2)
    kept = []
    journal = Journal(engine, kept.append)
    journal.arrived(Request(id=0, prompt=(1,), params=SamplingParams(max_tokens=9)), 1.0)
    return journal, kept


def plan_now(journal, kept, index, at_s=50.0):
    journal.planned(Microbatch(index, ()), at_s, at_s + 0.5)
    entry = kept[-1]
    assert (entry.index, entry.start_s, entry.sent_s) == (index, at_s, at_s + 0.5)
    return entry.waited_for, entry.after, entry.woken_s


def arrive(journal, number, at_s):
    journal.arrived(Request(id=number, prompt=(1, 2), params=SamplingParams()), at_s)


def complete(journal, index, at_s, *outputs):
    journal.completed(Completed(index, at_s - 1, at_s, at_s + 1, (1,) * len(outputs)), outputs)


def test_the_first_plan_waited_for_the_first_request(told):
    journal, kept = told
    arrive(journal, 1, 2.0)
    assert plan_now(journal, kept, 0) == ("no_requests", -1, 1.0)
    assert kept[-1][7:] == (1, 2, 3, (0.5, 0.25), 2)


def test_a_plan_behind_another_waited_for_nothing(told):
    journal, kept = told
    plan_now(journal, kept, 0, at_s=5.0)
    complete(journal, 0, 6.0)
    arrive(journal, 1, 7.0)
    assert plan_now(journal, kept, 1) == ("", -1, 5.5)


def test_the_window_is_opened_by_the_first_completion_alone(told):
    journal, kept = told
    plan_now(journal, kept, 0)
    journal.waits("window")
    arrive(journal, 1, 10.0)
    complete(journal, 4, 11.0)
    complete(journal, 5, 12.0)
    assert plan_now(journal, kept, 1) == ("window", 4, 11.0)


@pytest.mark.parametrize("reason", ["kv", "token"])
def test_kv_and_tokens_are_waited_for_up_to_the_last(told, reason):
    journal, kept = told
    journal.waits(reason)
    arrive(journal, 1, 10.0)
    complete(journal, 4, 11.0)
    complete(journal, 5, 12.0)
    assert plan_now(journal, kept, 1) == (reason, 5, 12.0)
    journal.waits(reason)
    complete(journal, 6, 13.0)
    journal.finished(Output(1, None, "abort"), 14.0)
    assert plan_now(journal, kept, 2) == (reason, -1, 14.0)


def test_only_a_request_ends_the_wait_for_requests(told):
    journal, kept = told
    journal.waits("no_requests")
    complete(journal, 4, 11.0)
    arrive(journal, 1, 12.0)
    arrive(journal, 2, 13.0)
    assert plan_now(journal, kept, 1) == ("no_requests", -1, 12.0)


def test_the_last_try_says_why(told):
    journal, kept = told
    journal.waits("window")
    complete(journal, 4, 11.0)
    journal.waits("token")
    complete(journal, 5, 12.0)
    assert plan_now(journal, kept, 1) == ("token", 5, 12.0)


def test_requests_end_with_as_many_tokens_as_were_told(told):
    journal, kept = told
    arrive(journal, 1, 2.0)
    complete(journal, 0, 3.0, Output(0, 17), Output(1, 18))
    complete(journal, 1, 4.0, Output(0, 19, "length"))
    journal.finished(Output(1, None, "abort"), 5.5)
    assert [entry for entry in kept if type(entry) is Ended] == [
        Ended(0, 5.0, "length", 2),
        Ended(1, 5.5, "abort", 1),
    ]


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path_factory, monkeypatch):
    fake = FakeDriver(byte_tokenizer(tmp_path_factory.mktemp("model")))

    def open_driver(run_config, record, check=None):
        fake.config, fake.record = run_config, record
        return fake

    monkeypatch.setattr(starting, "open_driver", open_driver)
    return fake


def workload(tmp_path):
    path = tmp_path / "mix.jsonl"
    path.write_text('{"prompt": "ab", "max_tokens": 3}\n' * 2)
    return str(path)


def test_bench_records_its_runs_without_the_warm_up(driver, tmp_path):
    folder = tmp_path / "run"
    command = ["bench", "m", "--workload", workload(tmp_path), "--record", str(folder)]
    assert cli.main([*command, "--repeat", "2"]) == 0
    recording = read_recording(folder)
    assert recording.notes == []
    assert [entry.max_tokens for entry in recording.arrived] == [3, 3, 3, 3]
    meta = recording.meta
    assert (meta["kind"], meta["policy"], meta["config"]["model"]) == ("real", "uniform", "m")
    assert meta["limits"]["num_blocks"] == 100 and meta["hosts"] == ["here", "here"]
    assert meta["machines"] == [0, 0]
    assert [stage["has_head"] for stage in meta["plan"]["stages"]] == [False, True]
    assert {"started", "command", "device_profile", "dtype", "shape", "run"} <= meta.keys()


def test_generate_records_and_does_not_overwrite_unasked(driver, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["generate", "m", "--prompt", "ab", "--max-tokens", "2", "--record", str(folder)]
    assert cli.main(command) == 0
    first = read_recording(folder)
    assert len(first.ended) == 1 and first.spans[1] and not first.notes
    capsys.readouterr()
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --record {folder} holds a recording already")
    assert cli.main([*command, "--overwrite"]) == 0
    assert read_recording(folder).meta["run"] != first.meta["run"]


SIMULATE = ["simulate", "llama2-7b", "--device-profile", "a100-80gb-dgx", "-pp", "2",
            "--max-model-len", "2048"]  # fmt: skip


def test_a_simulation_records_the_same(tmp_path):
    folder, json_file = tmp_path / "run", tmp_path / "run.json"
    command = [*SIMULATE, "--workload", "azure-conv", "--num-prompts", "5", "--scale", "4"]
    assert cli.main([*command, "--record", str(folder), "--json", str(json_file)]) == 0
    recording, report = read_recording(folder), json.loads(json_file.read_text())
    assert recording.notes == [] and recording.meta["kind"] == "simulated"
    assert len(recording.ended) == 5 and len(recording.planned) == report["microbatches"]
    ledger = explain(recording)
    for stage, told in enumerate(report["stages"]):
        assert told["busy"] == pytest.approx(ledger.busy_s[stage] / ledger.seconds)
        assert told["idle_by_cause"] == pytest.approx(ledger.idle_shares(stage))
    assert cli.main([*command, "--record", str(folder)]) == 2
    searches = (["--find-capacity", "--slo-tbt", "0.2"], ["--prefill-pool", "1x1"])
    searches[1].extend(["--decode-pool", "1x1", "--slo-ttft", "1", "--slo-tpot", "1"])
    for search in searches:
        assert cli.main([*command, *search, "--record", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_run_too_long_to_be_kept_is_reported_from_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "Ring", lambda: Ring(max_bytes=12_000))
    json_file = tmp_path / "run.json"
    command = [*SIMULATE, "--workload", "azure-conv", "--num-prompts", "9", "--scale", "4"]
    assert cli.main([*command, "--json", str(json_file)]) == 0
    report = json.loads(json_file.read_text())
    assert any("the run's end alone" in note for note in report["notes"])
    for stage in report["stages"]:
        assert stage["busy"] + sum(stage["idle_by_cause"].values()) == pytest.approx(1)


def test_a_folder_that_cannot_be_written_is_found_before_stages_start(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        starting, "open_driver", lambda *_, **__: pytest.fail("stages were started")
    )
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file")
    for command in (
        ["generate", "m", "--prompt", "ab"],
        ["bench", "m", "--workload", workload(tmp_path)],
    ):
        assert cli.main([*command, "--record", folder]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --record {folder}: ")
