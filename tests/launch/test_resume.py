"""`generate --resume`: an interrupted run, gone on with, is the run that nothing interrupted."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import random_prompts, tiny_llama
from fake_client import FakeDriver, byte_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeserve.launch import cli
from pipeserve.launch.run import starting

pytestmark = pytest.mark.usefixtures("no_collections")

PROMPTS = (
    {"prompt": "abc", "max_tokens": 5},
    {"prompt": "caf\u00e9 \u2028 \U0001f600", "max_tokens": 3, "logprobs": 0},
    {"prompt_token_ids": [97, 98], "max_tokens": 1},
    {"prompt": "z" * 64},  # over the context: a result with "error"
    {"messages": [{"role": "user", "content": "h\u00e9\n"}], "max_tokens": 7},
    {"prompt": "abc", "max_tokens": 5},  # as the first: told apart by their number
    {"prompt": "xy", "max_tokens": 4, "n": 3, "prompt_logprobs": 1},
)
NUM_RUN = len(PROMPTS) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path):
    return write_jsonl(tmp_path / "in.jsonl", *PROMPTS)


class Runs:
    """`pipeserve generate` on fake stages; `drivers` are those that were started, in order."""

    def __init__(self, folder, prompts, monkeypatch):
        self.prompts, self.output = prompts, prompts.with_name("out.jsonl")
        self.drivers = []
        self.dies_at_look = None
        self._folder = folder
        monkeypatch.setattr(starting, "open_driver", self._open)

    def _open(self, run_config, record, check):
        driver = FakeDriver(self._folder, dies_at_look=self.dies_at_look)
        driver.config, driver.record = run_config, record
        self.drivers.append(driver)
        return driver

    def __call__(self, *flags, dies_at_look=None, model="m"):
        self.dies_at_look = dies_at_look
        command = ["generate", model, "--prompts", self.prompts, "--output", self.output, *flags]
        return cli.main([str(part) for part in command])

    def whole(self):
        """What a run that nothing interrupts writes."""
        self.output.unlink(missing_ok=True)
        assert self() == 1  # one prompt cannot run
        return self.output.read_bytes()


@pytest.fixture
def runs(folder, prompts, monkeypatch):
    return Runs(folder, prompts, monkeypatch)


def prompts_of(driver):
    """The requests that a driver was given, but for further samples."""
    return [request for request in driver.added if request.sample_of is None]


def refused(capsys, exit_code, *parts):
    assert exit_code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for part in parts:
        assert part in lines[0]


def test_after_a_death_at_any_moment_the_rest_is_run(runs, capsys):
    whole = sorted(runs.whole().splitlines())
    for moment in range(1, 7):
        runs.output.unlink()
        assert runs(dies_at_look=moment) == 1
        assert "--resume goes on from there" in capsys.readouterr().err
        kept = runs.output.read_bytes()
        num_kept = kept.count(b"\n")
        runs.drivers.clear()
        assert runs("--resume") == 1
        assert f"{num_kept} of {len(PROMPTS)} are done" in capsys.readouterr().err
        assert runs.output.read_bytes().startswith(kept)
        assert sorted(runs.output.read_bytes().splitlines()) == whole
        (driver,) = runs.drivers
        assert len(prompts_of(driver)) == len(PROMPTS) - num_kept  # nothing twice


def test_the_last_line_cut_anywhere(runs):
    """At each byte of a character, near both ends, and at every eighth place between."""
    whole = runs.whole()
    last = whole.splitlines(keepends=True)[-1]
    odd = {place for place, byte in enumerate(last) if byte > 127}
    assert odd
    near = {place + step for place in odd for step in (-1, 0, 1)}
    ends = {*range(4), *range(len(last) - 4, len(last))}
    for num_left in sorted(near | ends | {*range(0, len(last), 8)}):
        runs.output.write_bytes(whole[: len(whole) - len(last) + num_left])
        runs.drivers.clear()
        assert runs("--resume") == 1
        assert runs.output.read_bytes() == whole
        (driver,) = runs.drivers
        assert len(prompts_of(driver)) == 1


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_the_file_cut_anywhere(runs, data):
    """Twice, as who is killed once may be killed again; with lines in any order."""
    lines = runs.whole().splitlines(keepends=True)
    whole = b"".join(data.draw(st.permutations(lines)))
    for _ in range(2):
        cut = data.draw(st.integers(0, len(whole)))
        runs.output.write_bytes(whole[:cut])
        runs.drivers.clear()
        assert runs("--resume") == 1
        written = runs.output.read_bytes()
        assert written.startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])
        assert sorted(written.splitlines(keepends=True)) == sorted(lines)
        whole = written


def test_what_is_done_starts_no_stage(runs, capsys):
    whole = runs.whole()
    runs.drivers.clear()
    assert runs("--resume") == 1
    assert not runs.drivers and runs.output.read_bytes() == whole
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: 1 of the 7 kept could not run")
    runs.prompts = write_jsonl(runs.prompts, *PROMPTS[:3])
    runs.output.unlink()
    assert runs() == 0
    assert runs("--resume") == 0


def test_a_run_may_begin_with_it(runs):
    whole = runs.whole()
    runs.output.unlink()
    assert runs("--resume") == 1
    assert runs.output.read_bytes() == whole
    runs.output.write_bytes(b"")
    assert runs("--resume") == 1
    assert runs.output.read_bytes() == whole


def test_nothing_done_leaves_no_new_file_and_what_there_was(runs):
    assert runs("--resume", dies_at_look=1) == 1
    assert runs.output.exists()  # the prompt that cannot run
    runs.prompts = write_jsonl(runs.prompts, *PROMPTS[:3])
    runs.output.unlink()
    assert runs("--resume", dies_at_look=1) == 1
    assert not runs.output.exists()


def test_how_it_is_served_may_change(runs, capsys):
    whole = sorted(runs.whole().splitlines())
    runs.output.unlink()
    runs(dies_at_look=2)
    flags = ["-pp", "3", "--max-num-seqs", "2", "--policy", "vllm"]
    assert runs("--resume", *flags) == 1
    assert sorted(runs.output.read_bytes().splitlines()) == whole


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-tokens", "9"],
        ["--temperature", "0.5"],
        ["--stop", "x"],
        ["--seed", "1"],
        ["--dtype", "float32"],
        ["--chat"],
    ],
)
def test_other_sampling_is_another_job(runs, capsys, flags):
    runs(dies_at_look=2)
    kept = runs.output.read_bytes()
    capsys.readouterr()
    refused(capsys, runs("--resume", *flags), f"{runs.output}:1 is of another job", "--overwrite")
    assert runs.output.read_bytes() == kept


@pytest.mark.parametrize(
    "changed",
    [
        [*PROMPTS, {"prompt": "more"}],
        PROMPTS[:-1],
        [*PROMPTS[:-1], {"prompt": "abd", "max_tokens": 5}],
        [*PROMPTS[:-1], {"prompt": "abc", "max_tokens": 6}],
        [*PROMPTS[:-1], {"prompt_token_ids": [97, 98, 99], "max_tokens": 5}],
        [PROMPTS[1], PROMPTS[0], *PROMPTS[2:]],
    ],
    ids=["added", "removed", "text", "parameter", "as ids", "order"],
)
def test_other_prompts_are_another_job(runs, capsys, changed):
    runs(dies_at_look=2)
    with runs.output.open("ab") as file:
        file.write(b'{"index": 4, "mess')  # what is refused is not touched, half a line neither
    kept = runs.output.read_bytes()
    runs.prompts = write_jsonl(runs.prompts, *changed)
    capsys.readouterr()
    refused(capsys, runs("--resume"), "is of another job", "prompts")
    assert runs.output.read_bytes() == kept


def test_another_model_is_another_job(runs, capsys):
    runs(dies_at_look=2)
    capsys.readouterr()
    refused(capsys, runs("--resume", model="another"), "model")


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b"\xff\xfe\n",
        b"[]\n",
        b'{"index": 0}\n',
        b'{"job": "x"}\n',
        b"\0\0\n",
        b'{"index": [0], "job": "x"}\n',
        b'{"index": true, "job": "x"}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda line: repr(line[:30]),
)
def test_what_is_no_result_is_named(runs, capsys, line):
    runs(dies_at_look=2)
    kept = runs.output.read_bytes() + line
    runs.output.write_bytes(kept)
    number = kept.count(b"\n")
    capsys.readouterr()
    refused(capsys, runs("--resume"), f"{runs.output}:{number} is no result", "--overwrite")
    assert runs.output.read_bytes() == kept


def test_what_an_editor_leaves_is_kept(runs, capsys):
    """Blank lines, line ends of Windows, a BOM, results that are there twice."""
    whole = runs.whole()
    lines = whole.splitlines()
    kept = b"\xef\xbb\xbf" + b"\r\n".join([*lines[:3], b"", *lines[:3], b"  "]) + b"\n"
    runs.output.write_bytes(kept)
    runs.drivers.clear()
    capsys.readouterr()
    assert runs("--resume") == 1
    assert f"3 of {len(PROMPTS)} are done" in capsys.readouterr().err
    written = runs.output.read_bytes()
    assert written.startswith(kept)
    assert sorted(written[len(kept) :].splitlines()) == sorted(lines[3:])
    assert runs("--resume") == 1  # of all that is there twice, one could not run
    assert "error: 1 of the 7 kept could not run" in capsys.readouterr().err


def test_flags_that_contradict(runs, capsys, prompts):
    runs.whole()
    runs.drivers.clear()
    capsys.readouterr()
    refused(capsys, runs("--resume", "--overwrite"), "give one")
    for command in (
        ["generate", "m", "--prompts", str(prompts), "--resume"],
        ["generate", "m", "--prompt", "x", "--output", str(runs.output), "--resume"],
    ):
        refused(capsys, cli.main(command), "--resume goes on with an --output file of --prompts")
    refused(capsys, runs(), "give --resume to go on with it, --overwrite to replace it")
    assert not runs.drivers


def test_overwrite_begins_anew(runs):
    whole = runs.whole()
    runs.drivers.clear()
    assert runs("--overwrite") == 1
    assert runs.output.read_bytes() == whole
    assert len(prompts_of(runs.drivers[0])) == NUM_RUN


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_two_processes_never_write_one_file(runs, capsys, flag):
    runs(dies_at_look=2)
    kept = runs.output.read_bytes()
    capsys.readouterr()
    with runs.output.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(capsys, runs(flag), "is being written by another process")
    assert runs.output.read_bytes() == kept
    assert runs(flag) == 1


def test_a_line_draws_the_same_whichever_run_beside_it(runs):
    runs.whole()
    seeds = [request.params.seed for request in prompts_of(runs.drivers[-1])]
    assert len(set(seeds)) == NUM_RUN
    runs.output.unlink()
    runs(dies_at_look=4)
    kept = {json.loads(line)["index"] for line in runs.output.read_bytes().splitlines()}
    assert {1, 2} < kept
    runs("--resume")
    resumed = [request.params.seed for request in prompts_of(runs.drivers[-1])]
    by_line = dict(zip((0, 1, 2, 4, 5, 6), seeds, strict=True))
    assert resumed == [seed for line, seed in by_line.items() if line not in kept]
    runs("--overwrite", "--seed", "1")
    assert not {request.params.seed for request in prompts_of(runs.drivers[-1])} & set(seeds)


# ---- real processes ---------------------------------------------------------------------------


def _start(model, prompts, output, *flags):
    command = [sys.executable, "-m", "pipeserve.launch.cli", "generate", model]
    command += ["--prompts", prompts, "--output", output, "-pp", "2", "--dtype", "float32"]
    command += ["--max-num-seqs", "3", "--num-gpu-blocks-override", "64", *flags]
    return subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def _num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.processes
def test_killed_half_way_and_resumed(tmp_path):
    model = tiny_llama(tmp_path / "model")
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        *(
            {"prompt_token_ids": ids, "max_tokens": 30, "temperature": number % 2}
            for number, ids in enumerate(random_prompts(model, (5, 9, 14, 3) * 15))
        ),
    )
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    uninterrupted = _start(model, prompts, whole)
    assert uninterrupted.wait(120) == 0, uninterrupted.stderr.read()

    killed = _start(model, prompts, output)
    while _num_lines(output) < 10 and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    kept = output.read_bytes()
    num_kept = kept.count(b"\n")
    assert 10 <= num_kept < 60
    last = kept[kept.rfind(b"\n", 0, -1) + 1 :]
    output.write_bytes(kept[: -len(last) // 2])  # as if it had been writing

    resumed = _start(model, prompts, output, "--resume")
    _, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert f"{num_kept - 1} of 60 are done" in error and f"{61 - num_kept} prompts" in error
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    texts = [tuple(json.loads(line)["token_ids"]) for line in whole.read_text().splitlines()]
    assert len(set(texts)) > 50
