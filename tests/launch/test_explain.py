"""`--explain`: a line for each microbatch, which says what the records say."""

import json
import re
from math import inf
from types import SimpleNamespace

import pytest
from fake_client import FakeDriver, byte_tokenizer

from pipeserve.core.nouns import Chunk, RequestId, StageCost
from pipeserve.core.records import Planned
from pipeserve.core.view import Outstanding, Why
from pipeserve.launch import cli
from pipeserve.launch.run import starting
from pipeserve.launch.show.explain import explanation
from pipeserve.profiling.recording.reader import read_recording

RUN = ["llama2-7b", "--device-profile", "a100-80gb-dgx", "-pp", "2", "--max-model-len", "1024"]
LINE = re.compile(
    r"microbatch (\d+): (?:(\d+) decodes?)?(?:, )?(?:(\d+) prefill tokens? of (\d+) prompts?)?"
    r", predicted ([\d.]+) ms; budget [\d.]+ ms \((?:share|kv|longest)\), "
    r"through in [\d.]+ s(, due in [\d.]+ s)?"
)


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "work.jsonl"
    line = {"prompt_token_ids": [7] * 300, "max_tokens": 4}
    path.write_text(3 * (json.dumps(line) + "\n"))
    return str(path)


def lines_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("microbatch ")]


@pytest.mark.processes
@pytest.mark.parametrize("verb", [["simulate", *RUN], ["bench", *RUN, "--device", "emulated"]])
def test_every_microbatch_is_explained(capsys, tmp_path, workload, verb):
    run = [*verb, "--workload", workload, "--record", str(tmp_path / "run"), "--slo-tbt", "1"]
    assert cli.main([*run, "--explain"]) == 0
    lines, planned = lines_of(capsys), read_recording(tmp_path / "run").planned
    assert len(lines) == len(planned)
    for line, plan in zip(lines, planned, strict=True):
        lengths = [chunk.stop - chunk.start for chunk in plan.chunks]
        index, num_decodes, num_tokens, num_prompts, predicted_ms, due = LINE.fullmatch(
            line
        ).groups("0")
        assert int(index) == plan.index
        assert int(num_decodes) + int(num_tokens) == sum(lengths)
        assert int(num_decodes) + int(num_prompts) == len(lengths)
        assert num_decodes == "0" or due != "0"
        assert float(predicted_ms) == pytest.approx(max(plan.predicted_s) * 1e3, abs=0.051)


def test_a_policy_without_reasons_shows_what_it_made(capsys, workload):
    run = ["simulate", *RUN, "--workload", workload, "--policy", "sarathi_serve", "--explain"]
    assert cli.main(run) == 0
    assert lines_of(capsys)[0] == "microbatch 0: 512 prefill tokens of 2 prompts"


def planned(num_decodes, num_prefill, predicted_s):
    chunks = [Chunk(RequestId(n), 9, 10, (), None, 1) for n in range(num_decodes)]
    if num_prefill:
        chunks.append(Chunk(RequestId(99), 0, num_prefill, (), None, 0))
    return Planned(5, "", -1, 0.0, 10.0, 10.0, tuple(chunks), 0, 1, 1, predicted_s)


@pytest.mark.parametrize(
    ("plan", "why", "line"),
    [
        (planned(1, 0, ()), None, "1 decode"),
        (planned(1, 0, (0.01, 0.02)), None, "1 decode, predicted 20.0 ms"),
        (
            planned(2, 1, ()),
            Why("kv", 64.0, inf),
            "2 decodes, 1 prefill token of 1 prompt; budget 64 tokens (kv)",
        ),
        (
            planned(0, 1500, (0.01, 0.02)),
            Why("share", 0.03, 12.5),
            "1,500 prefill tokens of 1 prompt, predicted 20.0 ms; budget 30.0 ms (share), "
            "through in 0.75 s, due in 2.50 s",
        ),
    ],
)
def test_what_is_unknown_is_left_out(plan, why, line):
    prefill = [chunk.stop - chunk.start for chunk in plan.chunks if chunk.start == 0]
    cost = StageCost(plan.predicted_s) if plan.predicted_s else None
    last = Outstanding(5, len(plan.chunks) - len(prefill), sum(prefill), cost)
    engine = SimpleNamespace(last=last, why=why, last_known_s=10.75)
    assert explanation(engine, plan) == f"microbatch 5: {line}"


def test_generate_explains_too(capsys, tmp_path, monkeypatch):
    driver = FakeDriver(byte_tokenizer(tmp_path))
    driver.engine.why, driver.engine.last = None, Outstanding(0, 1, 0, None)

    def open_driver(run_config, record, check):
        driver.record = record
        return driver

    monkeypatch.setattr(starting, "open_driver", open_driver)
    assert cli.main(["generate", "m", "--prompt", "ab", "--explain"]) == 0
    assert lines_of(capsys)[0].startswith("microbatch 1: 1 decode")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "m", "--prompt", "x", "--live"], "give one"),
        (["bench", "m", "--live"], "--live and --explain both write to stderr; give one"),
        (["simulate", *RUN, "--find-capacity", "--slo-tbt", "1"], "--explain is for one run"),
    ],
)
def test_where_it_cannot_be(capsys, arguments, message):
    assert cli.main([*arguments, "--explain"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
