"""Which time a rate is of, and that a run goes on where an earlier one was ended."""

from argparse import Namespace

import pytest
from batch_and_context import Cell, Rates, decode_rate, prefill_rate, read, write

from pipeserve.errors import ConfigError
from pipeserve.profiling.recording.summary import RequestRecord


def record(*times_s: float, num_prompt_tokens: int = 10) -> RequestRecord:
    return RequestRecord(num_prompt_tokens=num_prompt_tokens, arrival_s=1.0, token_times_s=times_s)


def test_decodes_count_while_all_decode():
    records = [record(2, 3, 4, 5), record(3, 3.5, 4, 7)]
    assert decode_rate(records) == 4 / (5 - 3)  # 4, 5 of the first, 3.5, 4 of the second


def test_prompts_count_until_the_last_has_a_token():
    assert prefill_rate([record(2), record(6)]) == 20 / 5


def test_what_an_earlier_run_has_measured_is_not_measured_again(tmp_path):
    args = Namespace(json=tmp_path / "rates.json", model="m", outputs=32)
    assert read(args) == {}
    found = {Cell(2, 16, 512): Rates(900.5, 300.0), Cell(1, 1, 128): Rates(80.0, 20.0)}
    write(args, found)
    assert read(args) == found
    with pytest.raises(ConfigError, match="give another file"):
        read(Namespace(json=args.json, model="m", outputs=64))
