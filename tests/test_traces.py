"""Traces by path, in the forms in which they are published, and what is wrong with bad ones."""

import gzip

import pytest

from pipeserve.errors import ConfigError
from pipeserve.launch.traces import is_trace, read_trace
from pipeserve.launch.workload import read_workload


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", newline="") as file:
            file.write(text)
        return path

    return write


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 23:59:59.6805900,374,44\r
2023-11-17 00:00:01.1805901,396,109"""


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azures_dates_cross_midnight_with_seven_digits(write, name):
    trace = read_trace(write(AZURE, name))
    assert trace.lengths == ((374, 44), (396, 109))
    assert trace.arrivals_s == pytest.approx((0.0, 1.5), abs=1e-6)


def test_vidurs_seconds_and_floats(write):
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n3.5,10.0,2\n3.5,20,3\n4,5,1\n"
    trace = read_trace(write(text))
    assert trace.lengths == ((10, 2), (20, 3), (5, 1))
    assert trace.arrivals_s == (0.0, 0.0, 0.5)


def test_sarathis_has_lengths_alone(write):
    trace = read_trace(write("num_prefill_tokens,num_decode_tokens,pd_ratio\n74,918,0.08\n"))
    assert trace.lengths == ((74, 918),)
    assert trace.arrivals_s == ()


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_mooncakes_milliseconds(write, name):
    path = write(
        '{"timestamp": 500, "input_length": 9, "output_length": 6, "hash_ids": [0]}\n'
        '{"timestamp": 2500, "input_length": 3, "output_length": 4, "hash_ids": [1]}\n',
        name,
    )
    assert is_trace(path)
    assert read_trace(path).lengths == ((9, 6), (3, 4))
    assert read_trace(path).arrivals_s == (0.0, 2.0)


def test_jsonl_of_prompts_is_no_trace(write, tmp_path):
    assert not is_trace(write('{"prompt": "a", "max_tokens": 1}\n', "w.jsonl"))
    assert not is_trace(tmp_path / "not there")


HEADER = "timestamp,prefill,decode\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns here: a, b"),
        ("", "columns here: none"),
        (HEADER, "no rows with a prefill"),
        ("prefill\n5\n", "a decode (or generated) column"),
        (HEADER + "0,5,1\n1,0,1\n", ":3: prefill is 0, must be at least 1 token"),
        (HEADER + "0,5,-4\n", ":2: decode is -4, must be at least 1 token"),
        (HEADER + "0,5,x\n", ":2: decode is 'x', must be a number"),
        (HEADER + "0,5\n", ":2: decode is None, must be a number"),
        (HEADER + "0,inf,1\n", ":2: prefill is 'inf', must be a number"),
        (HEADER + "5,1,1\n4,1,1\n", ":3: timestamp is 4, before the row above; sort"),
        (HEADER + "0,1,1\nnan,1,1\n", ":3: timestamp is 'nan', must be seconds"),
        (HEADER + "noon,1,1\n", ":2: timestamp is 'noon', must be seconds or a date"),
        (HEADER + "-inf,1,1\n0,1,1\n", ":2: timestamp is '-inf', must be seconds"),
        (HEADER + "nan,1,1\n", ":2: timestamp is 'nan', must be seconds"),
        (HEADER + "0,1,1\n1e300,1,1\n", ":3: timestamp is '1e300', must be seconds"),
        (HEADER + "0,1e300,1\n", ":2: prefill is '1e300', must be a number of at most"),
        (HEADER + "\n0,x,1\n", ":3: prefill is 'x'"),
        ("prefill,decode,prefill\n1,1,1\n", "column 'prefill' is there twice"),
    ],
)
def test_a_bad_trace_names_the_line_and_the_remedy(write, text, message):
    with pytest.raises(ConfigError) as error:
        read_trace(write(text))
    assert message in str(error.value)


def test_blank_lines_of_json_are_skipped_and_counted(write):
    text = '{"input_length": 9, "output_length": 6}\n\n{"input_length": 0, "output_length": 6}\n'
    with pytest.raises(ConfigError, match=":3: input_length is 0"):
        read_trace(write(text, "m.jsonl"))


def test_a_bad_json_row_names_its_line(write):
    text = '{"timestamp": 0, "input_length": 9, "output_length": 6}\n'
    with pytest.raises(ConfigError, match=":2: not JSON"):
        read_trace(write(text + "{", "m.jsonl.gz"))
    with pytest.raises(ConfigError, match=":2: not a JSON object"):
        read_trace(write(text + "[]", "m.jsonl.gz"))


def test_a_missing_and_a_damaged_file(write, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="give a readable trace"):
        read_trace(damaged)


def test_a_workload_of_a_trace_is_scaled_and_timed(write):
    path = str(write(AZURE))
    own = read_workload(path, None, 10.0, None, seed=0)
    assert own.token_lengths() == [(37, 4), (39, 10)]
    assert [len(item.prompt) for item in own.with_ids(99)] == [37, 39]
    assert own.with_ids(99)[1].arrival_s == pytest.approx(1.5, abs=1e-6)
    drawn = read_workload(path, None, 1.0, 5.0, seed=0)
    assert drawn.arrival_times_s()[0] == 0 < drawn.arrival_times_s()[1] != pytest.approx(1.5)
    assert read_workload(path, 1, 1.0, None, seed=0).lengths == ((374, 44),)


def test_a_trace_without_arrivals_is_sampled_and_comes_at_once(write):
    rows = "".join(f"{number},{number}\n" for number in range(1, 101))
    path = str(write("prefill,decode\n" + rows))
    some = read_workload(path, 10, 1.0, None, seed=3)
    assert len(set(some.lengths)) == 10 and some.lengths != tuple((n, n) for n in range(1, 11))
    assert list(some.arrival_times_s()) == [0.0] * 10


def test_lengths_of_text_prompts_need_a_tokenizer(write):
    path = str(write('{"prompt": "a", "max_tokens": 1}\n', "w.jsonl"))
    with pytest.raises(ConfigError, match="prompts as text"):
        read_workload(path, None, 1.0, None, seed=0).token_lengths()
