"""Traces by path, in the forms in which they are published, and what is wrong with bad ones."""

import gzip
import json
import re
import time
from pathlib import Path

import pytest

from pipeserve.errors import ConfigError
from pipeserve.launch.inputs.trace_formats import FORMATS
from pipeserve.launch.inputs.traces import read_trace
from pipeserve.launch.inputs.workload import read_workload


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv", encoding="utf-8"):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", newline="", encoding=encoding) as file:
            file.write(text)
        return path

    return write


# ---- formats ----------------------------------------------------------------------------------


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 23:59:59.6805900,374,44\r
2023-11-17 00:00:01.1805901,396,109"""

# (source, file name, text as published, lengths, arrivals)
PUBLISHED = [
    ("Azure 2023", "a.csv", AZURE, [(374, 44), (396, 109)], [0, 1.5]),
    (
        "Azure 2024, one week",
        "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.259930+00:00,2399,6\n",
        [(2162, 5), (2399, 6)],
        [0, 0.25],
    ),
    (
        "Azure 2025, multimodal",
        "a.csv",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-09 00:00:00,0,10,5\n2024-10-09 00:00:02,3,20,6\n",
        [(10, 5), (20, 6)],
        [0, 2],
    ),
    (
        "BurstGPT with failures",
        "BurstGPT_1.csv",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n121,ChatGPT,256,0,256,Conversation log\n"
        "122,GPT-4,7,9,16,API log\n",
        [(472, 18), (7, 9)],
        [0, 117],
    ),
    (
        "BurstGPT with sessions",
        "b.csv",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n5.0,a,1.2,GPT-4,4,18,22,API log\n8.5,,3,GPT-4,5,1,6,API log\n",
        [(4, 18), (5, 1)],
        [0, 3.5],
    ),
    (
        "Mooncake",
        "m.jsonl",
        '{"timestamp": 500, "input_length": 9, "output_length": 6, "hash_ids": [0]}\n'
        '{"timestamp": 2500, "input_length": 3, "output_length": 4, "hash_ids": [1]}\n',
        [(9, 6), (3, 4)],
        [0, 2],
    ),
    (
        "Bailian",
        "b.jsonl",
        '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61, "input_length": 521, '
        '"output_length": 132, "type": "text", "turn": 1, "hash_ids": [1089, 1090]}\n'
        '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 93, "input_length": 600, '
        '"output_length": 10, "type": "search", "turn": 2, "hash_ids": [1089]}\n',
        [(521, 132), (600, 10)],
        [0, 32],
    ),
    (
        "Bailian without chats (guidellm#948)",
        "b.jsonl",
        '{"timestamp": 0.0, "input_length": 1, "output_length": 2, "hash_ids": [0]}\n'
        '{"timestamp": 30.5, "input_length": 3, "output_length": 4, "hash_ids": [0]}\n'
        '{"timestamp": 61.25, "input_length": 5, "output_length": 6, "hash_ids": [0]}\n',
        [(1, 2), (3, 4), (5, 6)],
        [0, 30.5, 61.25],
    ),
    (
        "Vidur",
        "v.csv",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n3.5,10.0,2\n3.5,20,3\n4,5,1\n",
        [(10, 2), (20, 3), (5, 1)],
        [0, 0, 0.5],
    ),
    (
        "Sarathi-Serve, lengths",
        "s.csv",
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n",
        [(74, 918)],
        [],
    ),
    (
        "Vidur, request metrics",
        "request_metrics.csv",
        "Request Id,prefill_e2e_time,decode_time_execution_plus_preemption_normalized,"
        "request_inter_arrival_delay,request_num_prefill_tokens,request_num_decode_tokens\n"
        "0,4.31,1.07,,1000,25\n1,5.02,1.21,2.5,2000,30\n2,5.02,1.21,0.5,7,0\n3,5,1,1.0,8,9\n",
        [(1000, 25), (2000, 30), (8, 9)],
        [0, 2.5, 4],
    ),
    (
        "SplitwiseSim",
        "s.csv",
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
        "token_size\n0,2,0,0.5,1,2162,5\n1,2,0,0.75,1,2399,6\n",
        [(2162, 5), (2399, 6)],
        [0, 0.25],
    ),
    (
        "LLMServingSim",
        "l.jsonl",
        '{"input_toks": 128, "output_toks": 512, "arrival_time_ns": 1500000000}\n'
        '{"input_toks": 4, "output_toks": 5, "arrival_time_ns": 3500000000}\n',
        [(128, 512), (4, 5)],
        [0, 2],
    ),
    (
        "LLMServingSim, tabs",
        "l.tsv",
        "input_toks\toutput_toks\tarrival_time_ns\n128\t512\t0\n4\t5\t500000000\n",
        [(128, 512), (4, 5)],
        [0, 0.5],
    ),
    (
        "Baseten",
        "b.csv",
        "timestamp_start_unix_ms,prompt,input_tokens,output_tokens\n"
        '1715299200000,"a, b\nc",5,6\n1715299201500,x,7,8\n',
        [(5, 6), (7, 8)],
        [0, 1.5],
    ),
    (
        "GuideLLM",
        "g.jsonl",
        '{"prompt": "a b", "prompt_tokens_count": 2, "output_tokens_count": 64}\n',
        [(2, 64)],
        [],
    ),
    (
        "OpenAI's usage, an array",
        "u.json",
        '[\n {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29},\n'
        ' {"prompt_tokens": 5, "completion_tokens": 1}\n]',
        [(19, 10), (5, 1)],
        [],
    ),
    (
        "our short form",
        "o.csv",
        "arrival_s,prefill,decode\n1,5,6\n3,7,8\n",
        [(5, 6), (7, 8)],
        [0, 2],
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "lengths", "arrivals"),
    [case[1:] for case in PUBLISHED],
    ids=[case[0] for case in PUBLISHED],
)
@pytest.mark.parametrize("changed", ["", "gz", "BOM", "CRLF", "blank lines", "spelling"])
def test_published_traces(write, name, text, lengths, arrivals, changed):
    if changed == "CRLF":
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    if changed == "blank lines":
        text = "\n\n" + text + "\n\n"
    if changed == "spelling":  # of the names alone: no value in these has an underscore
        text = text.replace("_", " ").replace("input", "Input").replace("Tokens", "tokens")
    path = write(
        text,
        name + ".gz" * (changed == "gz"),
        encoding="utf-8-sig" if changed == "BOM" else "utf-8",
    )
    trace = read_trace(path)
    assert trace.lengths == tuple(lengths)
    assert trace.arrivals_s == pytest.approx(arrivals, abs=2e-6)


def test_every_format_has_a_published_example():
    seen = [set(re.split(r'[",\t\n]', text.replace("\r", ""))) for _, _, text, _, _ in PUBLISHED]
    for each in FORMATS:
        names = {name for name in (each.prompt, each.output, each.arrival, each.mark) if name}
        assert any(names <= words for words in seen), each.source


def test_the_page_lists_every_format():
    page = (Path(__file__).parent.parent.parent / "docs" / "bench.md").read_text()
    for each in FORMATS:
        names = [name for name in (each.prompt, each.output, each.arrival, each.mark) if name]
        assert any(all(f"`{name}`" in row for name in names) for row in page.splitlines())


@pytest.mark.parametrize(
    ("header", "both"),
    [
        ("num_prefill_tokens,prompt_tokens,decode", "num_prefill_tokens, prompt_tokens"),
        ("Request tokens,request_tokens,decode", "Request tokens, request_tokens"),
        ("prefill,decode,timestamp,arrived_at", "timestamp, arrived_at"),
        ("prefill,GeneratedTokens,Generated Tokens", "GeneratedTokens, Generated Tokens"),
    ],
)
def test_two_columns_for_one_thing_are_refused_by_name(write, header, both):
    row = ",".join("1" * len(header.split(",")))
    with pytest.raises(ConfigError, match=f"columns {both} all say"):
        read_trace(write(f"{header}\n{row}\n"))


@pytest.mark.parametrize(
    "header",
    [
        "prefill_e2e_time,decode_time_execution_plus_preemption_normalized",
        "prefill_tokens_per_s,decode_tokens_per_s",
        "max_context_tokens,generated_tokens_total",
        "a,b",
    ],
)
def test_a_part_of_a_name_is_no_name(write, header):
    with pytest.raises(ConfigError, match="no column of prompt tokens by a known name"):
        read_trace(write(f"{header}\n4.31,1.07\n"))


# ---- times ------------------------------------------------------------------------------------


def dated(*times):
    return "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{t},9,9\n" for t in times)


@pytest.mark.parametrize("zone", ["America/New_York", "Europe/Berlin", "Asia/Kolkata", "UTC"])
@pytest.mark.parametrize(
    "times",
    [
        ("2023-11-05 01:59:59.5", "2023-11-05 02:00:00.5"),  # New York's clocks go back
        ("2024-03-10 01:59:59.5", "2024-03-10 02:00:00.5"),  # and forward
        ("2024-03-31T01:59:59.5", "2024-03-31T02:00:00.5"),  # Berlin's
        ("2023-11-05 01:59:59.5-04:00", "2023-11-05 01:00:00.5-05:00"),  # the hour that is twice
        ("2023-11-05 01:59:59.5 UTC", "2023-11-05 02:00:00.5+00:00"),
        ("2023-12-31 23:59:59.5Z", "2024-01-01T00:00:00.500Z"),
        ("2023-12-31T23:59:59", "2024-01-01"),
    ],
)
def test_dates_a_second_apart_are_a_second_apart_in_every_zone(write, monkeypatch, zone, times):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert read_trace(write(dated(*times))).arrivals_s == pytest.approx((0, 1), abs=1e-6)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("times", "second", "said"),
    [
        ((0, 3000), 3.0, "milliseconds"),
        ((0.0, 2.5), 2.5, "seconds, for its numbers have fractions"),
        ((1715299200, 1715299202), 2.0, "seconds since 1970"),
        ((1715299200000, 1715299202000), 2.0, "milliseconds since 1970"),
        ((1715299200000000, 1715299202000000), 2.0, "microseconds since 1970"),
        ((1715299200000000000, 1715299202000000000), 2.0, "nanoseconds since 1970"),
    ],
)
def test_a_unit_that_is_not_known_is_judged_said_and_overruled(write, times, second, said):
    lines = [{"timestamp": t, "input_length": 9, "output_length": 6} for t in times]
    path = write("\n".join(map(json.dumps, lines)), "m.jsonl")
    trace = read_trace(path)
    assert trace.arrivals_s == pytest.approx((0, second))
    assert f"timestamp was taken as {said}" in trace.time_notes[0]
    overruled = read_trace(path, unit_s=0.5)
    assert overruled.arrivals_s == (0, (times[1] - times[0]) / 2) and not overruled.time_notes


def test_a_unit_that_the_format_says_is_not_remarked_on(write):
    for source, name, text, _, _ in PUBLISHED:
        notes = read_trace(write(text, name)).time_notes
        assert bool(notes) == (source.startswith(("Mooncake", "Bailian without"))), source


def test_a_plain_table_of_numbers_is_seconds_and_says_so(write):
    trace = read_trace(write("timestamp,prefill,decode\n0,1,1\n60,1,1\n"))
    assert trace.arrivals_s == (0, 60) and "taken as seconds" in trace.time_notes[0]


def test_rows_out_of_order_are_sorted_and_counted(write):
    trace = read_trace(write("arrived_at,prefill,decode\n5,1,1\n4,2,2\n5,3,3\n-1,4,4\n"))
    assert trace.lengths == ((4, 4), (2, 2), (1, 1), (3, 3))
    assert trace.arrivals_s == (0, 5, 6, 6)
    assert trace.time_notes[0].endswith("before the row above them: 2")


def test_only_as_many_rows_are_read_as_are_wanted(write):
    path = write("arrived_at,prefill,decode\n0,1,1\n1,5,0\n2,2,2\n3,broken,1\n")
    trace = read_trace(path, num_rows=2)
    assert trace.lengths == ((1, 1), (2, 2)) and trace.arrivals_s == (0, 2)
    assert trace.notes[0].endswith("(failed requests): 1 of 3 rows")


# ---- what is wrong ----------------------------------------------------------------------------


HEADER = "arrived_at,prefill,decode\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns here: a, b"),
        ("prefill,decode,prefill\n1,1,1\n", "column 'prefill' is there twice"),
        ("", "no row with prompt and output tokens"),
        ("\n \n", "no row with prompt and output tokens"),
        (HEADER, "no row with prompt and output tokens"),
        (HEADER + "0,5,0\n1,0,7\n", "no row with prompt and output tokens"),
        ("prefill\n5\n", "no column of output tokens by a known name (GeneratedTokens"),
        (HEADER + "0,5,-4\n", ":2: decode is '-4', must be a whole number"),
        (HEADER + "0,5,x\n", ":2: decode is 'x', must be a whole number"),
        (HEADER + "0,5.5,1\n", ":2: prefill is '5.5', must be a whole number"),
        (HEADER + "0,5\n", ":2: decode is None, must be a whole number"),
        (HEADER + "0,,1\n", ":2: prefill is '', must be a whole number"),
        (HEADER + "0,inf,1\n", ":2: prefill is 'inf', must be a whole number"),
        (HEADER + "0,nan,1\n", ":2: prefill is 'nan', must be a whole number"),
        (HEADER + "0,1e300,1\n", ":2: prefill is '1e300', must be a whole number"),
        (HEADER + f"0,{'9' * 5000},1\n", ":2: prefill is '999999999"),
        (HEADER + "0,1,1\nnan,1,1\n", ":3: arrived_at is 'nan', must be a number or a date"),
        (HEADER + "noon,1,1\n", ":2: arrived_at is 'noon', must be a number or a date"),
        (HEADER + ",1,1\n", ":2: arrived_at is '', must be a number or a date"),
        (HEADER + "-inf,1,1\n0,1,1\n", ":2: arrived_at is '-inf', must be a number"),
        (HEADER + "0,1,1\n1e300,1,1\n", "arrived_at spans 1e+300 s, over 1e+12"),
        (HEADER + "\n0,x,1\n", ":3: prefill is 'x'"),
        ("\n\n" + HEADER + "0,x,1\n", ":4: prefill is 'x'"),
        (HEADER + "5,1,1\n2024-01-01,1,1\n", ":3: arrived_at is a date without a zone, above it"),
        (dated("2024-01-01 00:00Z", "2024-01-01 00:01"), ":3: TIMESTAMP is a date without a zone"),
        (dated("2023-11-05 01:59:59", "2023-11-05 01:00"), ":3: TIMESTAMP is before the row above"),
        (HEADER + "0,1,\0\n", "must be a whole number"),
        (HEADER + "0,1,000,5\n", ":2: 4 fields under a header of 3; quote"),
        ("# of May\n" + HEADER + "0,1,5\n", ":2: 3 fields under a header of 1"),
        (HEADER + "0,1,5\n1,0,1,5\n", ":3: 4 fields under a header of 3"),
    ],
)
def test_a_bad_trace_names_the_line_and_the_remedy(write, text, message):
    with pytest.raises(ConfigError) as error:
        read_trace(write(text))
    assert message in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":3: not JSON"),
        ("[]", ":3: not a JSON object"),
        ("7", ":3: not a JSON object"),
        ('{"input_length": ' + "9" * 5000 + "}", ":3: not JSON that can be read"),
        ('{"hash_ids": ' + "[" * 100_000, ":3: not JSON"),
        ('{"output_length": 6}', ":3: input_length is None"),
        ('{"input_length": true, "output_length": 6}', ":3: input_length is True"),
        ('{"input_length": [9], "output_length": 6}', ":3: input_length is [9]"),
        ('{"input_length": NaN, "output_length": 6}', ":3: input_length is nan"),
        ('{"input_length": 9, "output_length": 6}', ":3: timestamp is None"),
        ('{"timestamp": {}, "input_length": 9, "output_length": 6}', ":3: timestamp is {}"),
    ],
)
def test_a_bad_json_row_names_its_line(write, line, message):
    text = '{"timestamp": 0, "input_length": 9, "output_length": 6}\n\n'
    with pytest.raises(ConfigError) as error:
        read_trace(write(text + line, "m.jsonl.gz"))
    assert message in str(error.value) and len(str(error.value)) < 400


def test_gaps_are_seconds_of_zero_or_more(write):
    header = "request_inter_arrival_delay,request_num_prefill_tokens,request_num_decode_tokens\n"
    for bad in ("-1", "", "nan", "x", "inf"):
        with pytest.raises(ConfigError, match=":3: request_inter_arrival_delay is"):
            read_trace(write(f"{header}0,1,1\n{bad},1,1\n"))


def test_a_file_that_cannot_be_read(write, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_trace(tmp_path)
    damaged = tmp_path / "damaged.csv.gz"
    packed = gzip.compress(AZURE.encode())
    for data in (b"no gzip", packed[:-20], packed[:9] + b"x" * 99):
        damaged.write_bytes(data)
        with pytest.raises(ConfigError, match="give a readable file"):
            read_trace(damaged)
    with pytest.raises(ConfigError, match="not UTF-8; save it as UTF-8"):
        read_trace(write(AZURE, encoding="utf-16"))


# ---- workloads --------------------------------------------------------------------------------


def test_a_workload_of_a_trace_is_scaled_and_timed(write):
    path = str(write(AZURE))
    own = read_workload(path, None, 10.0, None, seed=0)
    assert own.token_lengths() == [(37, 4), (39, 10)]
    assert [len(item.prompt) for item in own.with_ids(99)] == [37, 39]
    assert own.with_ids(99)[1].arrival_s == pytest.approx(1.5, abs=1e-6)
    drawn = read_workload(path, None, 1.0, 5.0, seed=0)
    assert drawn.arrival_times_s()[0] == 0 < drawn.arrival_times_s()[1] != pytest.approx(1.5)
    assert read_workload(path, 1, 1.0, None, seed=0).lengths == ((374, 44),)
    at_once = read_workload(path, None, 1.0, float("inf"), seed=0)
    assert list(at_once.arrival_times_s()) == [0, 0]


def test_a_trace_without_arrivals_is_sampled_and_comes_at_once(write):
    rows = "".join(f"{number},{number}\n" for number in range(1, 101))
    path = str(write("prefill,decode\n" + rows))
    some = read_workload(path, 10, 1.0, None, seed=3)
    assert len(set(some.lengths)) == 10 and some.lengths != tuple((n, n) for n in range(1, 11))
    assert list(some.arrival_times_s()) == [0.0] * 10 and not some.notes
    more = read_workload(path, 250, 1.0, None, seed=3)
    assert len(more.lengths) == 250 and len(set(more.lengths)) == 100
    assert more.notes == (f"{path} begins again: it has 100 of 250 requests",)


def test_a_short_trace_begins_again_after_its_end(write):
    path = str(write("arrived_at,prefill,decode\n10,1,1\n12,2,2\n14,3,3\n"))
    work = read_workload(path, 7, 1.0, None, seed=0)
    assert work.lengths == ((1, 1), (2, 2), (3, 3)) * 2 + ((1, 1),)
    assert work.arrival_times_s() == (0, 2, 4, 6, 8, 10, 12)
    assert "begins again: it has 3 of 7 requests" in work.notes[-1]
    one = read_workload(str(write("arrived_at,prefill,decode\n10,1,1\n")), 50, 1.0, None, seed=0)
    assert len(one.lengths) == 50 and set(one.arrival_times_s()) == {0}


def test_a_request_keeps_its_priority(write):
    table = write("prefill,decode,arrival_s,priority\n3,3,9,1\n1,1,0,-5\n2,0,4,7\n4,4,9,0\n")
    trace = read_workload(str(table), 4, 1.0, None, seed=0)
    assert list(zip(trace.lengths, trace.request_priorities(), strict=True)) == [
        *[((1, 1), -5), ((3, 3), 1), ((4, 4), 0)],
        ((1, 1), -5),
    ]
    assert [item.priority for item in trace.with_ids(9)] == [-5, 1, 0, -5]
    rows = "".join(f"{number},{number},{-number}\n" for number in range(1, 101))
    drawn = read_workload(str(write("prefill,decode,priority\n" + rows)), 9, 1.0, None, seed=3)
    pairs = zip(drawn.lengths, drawn.request_priorities(), strict=True)
    assert all(priority == -num_prompt for (num_prompt, _), priority in pairs)
    lines = '{"prompt_token_ids": [1], "max_tokens": 1, "priority": 3}\n'
    lines += '{"prompt_token_ids": [1], "max_tokens": 1}\n'
    work = read_workload(str(write(lines, "w.jsonl")), 3, 1.0, None, seed=0)
    assert [item.priority for item in work.with_ids(9)] == [3, 0, 3]
    assert read_workload(str(write(AZURE)), None, 1.0, None, seed=0).request_priorities() == [0, 0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("prefill,decode,priority\n1,1,high\n", "w.csv"),
        ('{"prompt_token_ids": [1], "max_tokens": 1, "priority": 0.5}\n', "w.jsonl"),
        (f"prefill,decode,priority\n1,1,{2**63}\n", "w.csv"),
        (f'{{"prefill": 1, "decode": 1, "priority": {-(2**64)}}}\n', "w.jsonl"),
        (f'{{"prompt_token_ids": [1], "max_tokens": 1, "priority": {2**63}}}\n', "w.jsonl"),
    ],
)
def test_a_priority_is_a_whole_number(write, text, name):
    """Of 64 bits, for larger ones are no part of a message or recording: vllm#37127."""
    with pytest.raises(ConfigError, match=r"w\.\w+:\d: priority is .*must be a whole number"):
        read_workload(str(write(text, name)), None, 1.0, None, seed=0)


def test_large_priorities_are_not_rounded(write):
    """Such as times since 1970 in nanoseconds, of which a float tells 256 alike."""
    first = 1_787_000_000_000_000_001
    rows = "".join(f"1,1,{number}\n" for number in (first + 1, first, "-2.0"))
    trace = read_workload(str(write("prefill,decode,priority\n" + rows)), 3, 1.0, None, seed=0)
    assert sorted(trace.request_priorities()) == [-2, first, first + 1]


def test_notes_on_times_are_for_who_uses_them(write):
    lines = '{"timestamp": 0, "input_length": 9, "output_length": 6}\n'
    path = str(write(lines + lines.replace("6", "0"), "m.jsonl"))
    left_out, unit = read_workload(path, None, 1.0, None, seed=0).notes
    assert left_out.endswith(": 1 of 2 rows") and unit.startswith("timestamp was taken")
    assert read_workload(path, None, 1.0, 2.0, seed=0).notes == (left_out,)
    assert read_workload(path, None, 1.0, None, seed=0, timed=False).notes == (left_out,)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (dated("2024-01-01"), "a.csv"),
        ("prefill,decode\n1,1\n", "a.csv"),
        ('{"prompt": "a", "max_tokens": 1}', "a.jsonl"),
        ('[{"conversations": []}]', "a.json"),
    ],
)
def test_a_unit_for_what_has_none_is_refused(write, text, name):
    with pytest.raises(ConfigError, match=r"--timed-trace-sec-multiplier is for .*; leave"):
        read_workload(str(write(text, name)), None, 1.0, None, seed=0, unit_s=0.001)


@pytest.mark.parametrize("unit_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_unit_is_a_number_of_seconds(write, unit_s):
    with pytest.raises(ConfigError, match=r"--timed-trace-sec-multiplier is .*, must be over 0"):
        read_workload(str(write(AZURE)), None, 1.0, None, seed=0, unit_s=unit_s)


def test_lengths_of_text_prompts_need_a_tokenizer(write):
    path = str(write('{"prompt": "a", "max_tokens": 1}\n', "w.jsonl"))
    with pytest.raises(ConfigError, match="prompts as text"):
        read_workload(path, None, 1.0, None, seed=0).token_lengths()
    with pytest.raises(ConfigError, match="prompts as text"):
        read_workload(path, None, 1.0, None, seed=0).tokenized(None)


# ---- prompts and conversations ----------------------------------------------------------------


def words(text):
    return [len(word) for word in text.split()]


def test_prompts_come_in_every_form_of_file(write):
    first = '{"prompt": "say input_length", "max_tokens": 1, "arrival_s": 3}'
    second = '{"prompt": "b", "output_tokens": 7}'  # as vLLM's custom data sets call it
    forms = [
        (f"{first}\n{second}\n", "w.jsonl"),
        (f"\ufeff{first}\r\n\r\n{second}", "w.jsonl"),
        (f"{first}\n{second}\n", "w.jsonl.gz"),
        (f"{first}\n{second}\n", "w.txt"),
        (f"[{first},\n {second}]", "w.json"),
    ]
    for text, name in forms:
        work = read_workload(str(write(text, name)), None, 1.0, None, seed=0).tokenized(words)
        assert [(item.prompt, item.max_tokens) for item in work.items] == [((3, 12), 1), ((1,), 7)]
        assert list(work.arrival_times_s()) == [3, 0]


def test_few_prompts_begin_again(write):
    lines = [{"prompt_token_ids": [n], "max_tokens": 1, "arrival_s": n} for n in (1, 2)]
    path = str(write("\n".join(map(json.dumps, lines)), "w.jsonl"))
    work = read_workload(path, 5, 1.0, None, seed=0)
    assert [item.prompt for item in work.items] == [(1,), (2,), (1,), (2,), (1,)]
    assert work.arrival_times_s() == [1, 2, 3, 4, 5]
    assert work.notes == (f"{path} begins again: it has 2 of 5 requests",)
    assert [item.prompt for item in read_workload(path, 1, 1.0, None, seed=0).items] == [(1,)]


def chat(number, num_prompt=8, num_answer=9, turns=2, key="value"):
    texts = [" ".join(["p"] * num_prompt), " ".join(["a"] * num_answer), "more"][:turns]
    roles = ["human", "gpt", "human"]
    turns = [{"from": role, key: text} for role, text in zip(roles, texts, strict=False)]
    return {"id": str(number), "conversations": turns}


def test_sharegpt_is_read_as_vllms_benchmark_reads_it(write):
    chats = [
        chat(0),
        chat(1, turns=1),
        chat(2, num_prompt=3),
        chat(3, num_answer=3),
        chat(4, num_prompt=1025),
        chat(5, num_prompt=1000, num_answer=1049),
        chat(6, num_prompt=1024, num_answer=1024, turns=3),
        chat(7, num_prompt=4, num_answer=4),
        {"id": "8"},
        {"id": "9", "conversations": [{"from": "human", "value": None}, {}]},
    ]
    path = str(write(json.dumps(chats, indent=1), "ShareGPT_V3.json"))
    raw = read_workload(path, None, 1.0, None, seed=0)
    with pytest.raises(ConfigError, match="prompts as text"):
        raw.token_lengths()
    work = raw.tokenized(words)
    assert sorted(work.token_lengths()) == [(4, 4), (8, 9), (1024, 1024)]
    assert work.notes[0] == "left out, without two turns of text: 3 of 10 conversations"
    assert work.notes[1].startswith("left out, under 4 tokens, over 1,024 of prompt")
    assert work.notes[1].endswith("4 of 7 conversations")
    assert [item.arrival_s for item in work.with_ids(99)] == [0, 0, 0]


def test_conversations_are_drawn_by_seed_and_begin_again(write):
    text = "\n".join(json.dumps(chat(n, num_prompt=4 + n, key="content")) for n in range(20))
    path = str(write(text, "sglang.jsonl"))

    def lengths(num, seed):
        work = read_workload(path, num, 1.0, None, seed=seed).tokenized(words)
        return work.token_lengths(), work.notes

    few = lengths(5, seed=0)
    assert few == lengths(5, seed=0) != lengths(5, seed=1)
    assert len(set(few[0])) == 5 and not few[1]
    many, notes = lengths(45, seed=0)
    assert len(many) == 45 and len(set(many)) == 20 and "begins again: it has 20 of 45" in notes[0]


def test_conversations_that_are_all_too_short(write):
    path = str(write(json.dumps([chat(0, num_prompt=1)]), "s.json"))
    with pytest.raises(ConfigError, match="none of 1 conversations has 4 to 1,024 prompt tokens"):
        read_workload(path, None, 1.0, None, seed=0).tokenized(words)
    with pytest.raises(ConfigError, match="--scale is 2"):
        read_workload(path, None, 2.0, None, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "element 1: not a JSON object"),
        ("[{}]", "element 1: a line has one of prompt and prompt_token_ids"),
        ('[{"prompt": "a", "max_tokens": 1},\n{"prompt": 3}]', "element 2: prompt must be text"),
        ("[\n{]", "not JSON: Expecting property name .* at line 2, column 2"),
        ("[]", "no rows; give a trace"),
        ('[{"conversations": []}, {"conversations": "[]"}]', "no conversation has two turns of"),
        ("", "no rows; give a trace"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_a_bad_array_names_the_element(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_workload(str(write(text, "s.json")), None, 1.0, None, seed=0)
