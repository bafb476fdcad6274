"""The command line over a driver without stages: verbs, files, errors of one line, exit codes."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fake_client import EOS, VOCAB_SIZE, FakeDriver, byte_tokenizer, write_jsonl
from rich.progress import Progress

import pipeserve
from pipeserve.configs import RunConfig
from pipeserve.errors import PipeserveError
from pipeserve.frontend.completion import Delta
from pipeserve.frontend.llm import LLM
from pipeserve.launch import cli
from pipeserve.launch.inputs.flags import run_flags, sampling_flags
from pipeserve.launch.inputs.jsonl import ResultFile
from pipeserve.launch.inputs.prompts import one_prompt
from pipeserve.launch.inputs.workload import read_workload
from pipeserve.launch.run import starting
from pipeserve.launch.verbs.generate import write_results
from pipeserve.profiling.simulation.workloads import DISTRIBUTIONS
from pipeserve.sampling_params import REFUSED, SamplingParams

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_collections")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def driver(folder, monkeypatch):
    """The driver that the verbs get; `driver.config` becomes what they asked for."""
    fake = FakeDriver(folder)

    def open_driver(run_config, record, check=lambda model_config: None):
        fake.config = run_config
        fake.record = record
        check(fake)
        return fake

    monkeypatch.setattr(starting, "open_driver", open_driver)
    return fake


@pytest.fixture
def no_driver(monkeypatch):
    """For what must be found before any process starts."""
    monkeypatch.setattr(
        starting, "open_driver", lambda *_, **__: pytest.fail("stages were started")
    )


def _error(capsys, arguments, exit_code):
    """The one line that the command leaves on stderr."""
    assert cli.main([str(argument) for argument in arguments]) == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def _results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- flags ------------------------------------------------------------------------------------


def test_every_field_is_a_flag():
    names = {flag.name for flag in run_flags()} | {"model"}
    assert names == {item.name for item in fields(RunConfig)}
    names = {flag.name for flag in sampling_flags()} | {"seed"}
    assert names == {item.name for item in fields(SamplingParams)} - REFUSED.keys()
    assert all(flag.default is None for flag in [*run_flags(), *sampling_flags()])
    assert all(flag.kind is inspect.Parameter.KEYWORD_ONLY for flag in run_flags())


def test_flags_reach_the_run(driver, capsys):
    command = ["generate", "m", "--prompt", "ab", "-pp", "2", "-tp", "1", "--dtype", "float32"]
    command += ["--pipeline-layers", "3,1", "--no-enable-prefix-caching", "--seed", "5"]
    command += ["--max-tokens", "3", "--top-p", "0.5", "--stop", "x", "--stop", "y"]
    assert cli.main([*command, "--stop-token-ids", "4"]) == 0
    config, params = driver.config, driver.added[0].params
    assert (config.model, config.pipeline_parallel_size, config.dtype) == ("m", 2, "float32")
    assert (config.pipeline_layers, config.enable_prefix_caching) == ((3, 1), False)
    assert (params.max_tokens, params.top_p, params.stop) == (3, 0.5, ("x", "y"))
    assert driver.added[0].stop_ids == {4, EOS}
    assert driver.closed


def test_flags_win_over_the_recipe(driver, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: a\nblock_size: 8\nmax_num_seqs: 4\n")
    command = ["generate", "--prompt", "x", "--config", str(recipe), "--block-size", "32"]
    assert cli.main(command) == 0
    assert (driver.config.model, driver.config.block_size) == ("a", 32)
    assert driver.config.max_num_seqs == 4


def test_version_and_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == pipeserve.__version__
    assert cli.main([]) == 0
    assert "generate" in capsys.readouterr().out
    assert cli.main(["bench", "--help"]) == 0
    assert "--workload" in capsys.readouterr().out
    assert cli.main(["generate", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Most output tokens of a sample. [default: 16]" in printed
    assert '{"prompt_token_ids": [...]}' in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "generate"),
        (["generate", "m", "--prompt", "x", "--polcy", "uniform"], "--policy"),
        (["generate", "m", "--prompt", "x", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["generate", "m", "--prompt", "x", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["generate", "m", "--prompt", "x", "-tp", "0"], "tensor_parallel_size is 0"),
        (["generate", "m", "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "m", "--prompt", "x", "--top-p", "0"], "top_p is 0"),
        (["generate", "m", "--prompt", "x", "--min-p", "2"], "min_p is 2"),
        (["generate", "m", "--prompt", "x", "--stop-token-ids", "-1"], "ids are 0 or more"),
        (["generate", "m", "--prompt", "x", "--n", "0"], "n is 0, must be 1 to"),
        (["generate", "m", "--prompt", "x", "--n", "2", "--temperature", "0"], "n is 2 at temp"),
        (["generate", "m", "--prompt", "x", "--logit-bias", "x"], "--logit-bias x is not ID=NUM"),
        (["generate", "m", "--prompt", "x", "--prompt-logprobs", "9999"], "logprobs is 9999"),
        (["generate", "m", "--prompt", "x", "--print", "--logprobs", "1"], "--print shows no log"),
        (["generate", "m"], "one of --prompt TEXT and --prompts FILE"),
        (["generate", "m", "--prompt", "x", "--prompts", "f"], "one of --prompt TEXT"),
        (["generate", "--prompt", "x"], "no model"),
        (["generate", "--prompt", "x", "--config", "smolm2-2stage"], "did you mean"),
        (["generate", "m", "--prompts", "none.jsonl"], "none.jsonl: No such file"),
        (["generate", "m", "--prompt", "x", "--device", "gpu"], "device is 'gpu'"),
        (["bench", "m", "--workload", "shargpt"], "no workload 'shargpt'"),
        (["bench", "m", "--scale", "0"], "--scale is 0"),
        (["bench", "m", "--repeat", "0"], "--repeat"),
        (["bench", "m", "--json", "no/such/folder/x.json"], "No such file"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_starts(
    no_driver, capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in _error(capsys, arguments, 2)


# ---- generate ---------------------------------------------------------------------------------


def test_one_prompt_writes_its_text(driver, capsys):
    driver.reply = lambda prompt: list("caf\u00e9".encode())
    assert cli.main(["generate", "m", "--prompt", "x", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "caf\u00e9\n"


def test_token_ids_that_the_model_does_not_have(driver, capsys, tmp_path):
    command = ["generate", "m", "--prompt", "x", "--allowed-token-ids", "97,999999"]
    expected = "error: prompt 0: allowed_token_ids has 999999, token ids are 0 to 257"
    assert _error(capsys, command, 2) == expected
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b", "logprobs": 256})
    driver.vocab_size = 200
    error = _error(capsys, ["generate", "m", "--prompts", prompts], 2)
    assert error == "error: prompt 1: logprobs is 256, the vocabulary has 200 tokens"
    assert not driver.added


def test_samples_of_one_prompt_stand_one_below_the_other(driver, capsys, monkeypatch):
    """Whichever ends first: here the second of three, then the first."""
    texts = [["One\n", "more"], ["two"], ["thr", "ee", "!"]]
    deltas = [(0, 0), (2, 0), (1, 0), (2, 1), (0, 1), (2, 2)]

    def stream(llm, prompt, params):
        for sample, step in deltas:
            is_last = step == len(texts[sample]) - 1
            yield Delta(
                index=0, sample=sample, prompt_token_ids=(1,), token_ids=(2,),
                text=texts[sample][step], finish_reason="length" if is_last else None,
                finished=(sample, step) == deltas[-1], logprobs=None, prompt_logprobs=None,
            )  # fmt: skip
            written.append(capsys.readouterr().out)

    written = []
    monkeypatch.setattr(LLM, "stream", stream)
    assert cli.main(["generate", "m", "--prompt", "x", "--n", "3"]) == 0
    assert written == ["[0] One\n", "", "", "", "more\n\n[1] two\n\n[2] three", "!\n"]


def test_one_prompt_with_logprobs_is_a_result_in_json(driver, capsys):
    command = ["generate", "m", "--prompt", "ab", "--max-tokens", "2", "--prompt-logprobs", "2"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["index"], result["prompt"], len(result["token_ids"])) == (0, "ab", 2)
    assert result["prompt_logprobs"] == [None, {"sampled": -98.0, "top": {}}]
    assert "logprobs" not in result
    assert cli.main([*command[:-2], "--logprobs", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["sampled"] for entry in result["logprobs"]] == [-0.5, -0.5]
    assert "prompt_logprobs" not in result


def test_one_prompt_that_cannot_run(driver, capsys):
    assert "64 tokens" in _error(capsys, ["generate", "m", "--prompt", "a" * 64], 1)
    assert driver.closed


def test_results_go_to_a_file_as_they_end(driver, tmp_path, capsys):
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "abc", "max_tokens": 5},
        {"prompt_token_ids": [97], "max_tokens": 1, "logprobs": 0},
        {"messages": [{"role": "user", "content": "hi"}]},
    )
    with prompts.open("a") as file:
        file.write("\n")  # a blank line is no prompt
    output = tmp_path / "out.jsonl"
    command = ["generate", "m", "--prompts", str(prompts), "--output", str(output)]
    assert cli.main([*command, "--max-tokens", "2"]) == 0
    results = _results(output)
    assert [result["index"] for result in results] == [1, 2, 0]  # in the order of ending
    assert results[2]["prompt"] == "abc" and len(results[2]["token_ids"]) == 5
    assert results[2]["text"] == bytes(results[2]["token_ids"]).decode()
    assert results[0]["prompt_token_ids"] == [97] and results[0]["finish_reason"] == "length"
    assert results[0]["logprobs"][0]["sampled"] == -0.5
    assert results[1]["num_prompt_tokens"] == len("user: hi\nassistant: ")
    error = capsys.readouterr().err
    assert "3 prompts, 8 output tokens" in error and "stages busy" in error


def test_results_of_several_samples(driver, tmp_path, capsys):
    driver.reply = lambda prompt: list(prompt) * 3  # the same for each sample, but for its end
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "abc", "n": 3, "logprobs": 0, "prompt_logprobs": 0, "seed": 5},
        {"prompt": "d"},
    )
    output = tmp_path / "out.jsonl"
    command = ["generate", "m", "--prompts", str(prompts), "--max-tokens", "4"]
    assert cli.main([*command, "--output", str(output)]) == 0
    results = {result["index"]: result for result in _results(output)}
    assert not {"outputs", "prompt_logprobs", "logprobs"} & results[1].keys()
    outputs = results[0]["outputs"]
    assert [sample["index"] for sample in outputs] == [0, 1, 2]
    sample = {key: results[0][key] for key in ("text", "token_ids", "finish_reason", "logprobs")}
    assert outputs == [{"index": index, **sample} for index in range(3)]
    assert sample["text"] == "abca" and len(sample["logprobs"]) == 4
    first, *others = results[0]["prompt_logprobs"]
    assert first is None and [entry["sampled"] for entry in others] == [-98, -99]
    assert "2 prompts, 16 output tokens" in capsys.readouterr().err
    assert [request.params.seed for request in driver.added[:3]] == [5, 6, 7]


def test_which_sample_is_which(folder):
    """Samples that end in another order than they began in."""
    llm = LLM.on(FakeDriver(folder))
    line = one_prompt("ab", {"n": 3, "max_tokens": 5}, chat=False)
    tokens = {0: [*b"zero"], 1: [*b"1"], 2: [*b"two"]}
    replies = iter(tokens.values())
    llm.client.reply = lambda prompt: [*next(replies), EOS]
    results = []
    assert write_results(llm, [line], results.append, lambda start, stop: [0.0, 0.0]) == 0
    assert [sample["text"] for sample in results[0]["outputs"]] == ["zero", "1", "two"]
    assert (results[0]["text"], results[0]["finish_reason"]) == ("zero", "stop")


def test_the_bar_counts_prompts(folder, monkeypatch):
    """Not samples; and those that cannot run, too."""
    llm = LLM.on(FakeDriver(folder))
    bars = []

    class Bar(Progress):
        def stop(self):
            bars.append([(task.completed, task.total) for task in self.tasks])
            super().stop()

    monkeypatch.setattr("pipeserve.launch.verbs.generate.Progress", Bar)
    options = {"n": 3, "max_tokens": 2}
    lines = [one_prompt(text, options, chat=False) for text in ("a", "b" * 64, "c")]
    assert write_results(llm, lines, lambda result: None, lambda start, stop: [0.0]) == 1
    assert bars == [[(3, 3)]]


def test_without_output_results_go_to_stdout(driver, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "abc"})
    assert cli.main(["generate", "m", "--prompts", str(prompts), "--chat"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "abc"
    assert bytes(driver.added[0].prompt) == b"user: abc\nassistant: "


def test_print_is_for_people(driver, tmp_path, capsys):
    driver.reply = lambda prompt: list(b"four")
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "2 + 2?"}, {"prompt": ""})
    command = ["generate", "m", "--prompts", str(prompts), "--print", "--max-tokens", "4"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "[0] 2 + 2?\n    four\n" in printed
    assert "[1] \n    error: the prompt of request 1 is empty" in printed
    assert "give one" in _error(capsys, [*command, "--output", tmp_path / "out.jsonl"], 2)
    prompts.write_text('{"prompt": "a", "n": 2, "temperature": 1}\n')
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "[0] a\n    [0] four\n    [1] four\n\n"


def test_a_prompt_that_cannot_run_is_a_result_and_the_others_go_on(driver, tmp_path, capsys):
    prompts = write_jsonl(
        tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b" * 64}, {"prompt": ""}
    )
    output = tmp_path / "out.jsonl"
    assert cli.main(["generate", "m", "--prompts", str(prompts), "--output", str(output)]) == 1
    results = {result["index"]: result for result in _results(output)}
    assert "text" in results[0] and "64 tokens" in results[1]["error"]
    assert "empty" in results[2]["error"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 2 of 3 prompts could not run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"prompt": "a\\ud800b"}', "half a surrogate pair"),
        ("[]", "not an object"),
        ('{"promt": "x"}', "did you mean 'prompt'"),
        ("{}", "one has none of them"),
        ('{"prompt": "x", "messages": []}', "one has prompt and messages"),
        ('{"prompt": 1}', "prompt is 1, must be text"),
        ('{"prompt_token_ids": [1.5]}', "must be a list of token ids"),
        ('{"messages": ["hi"]}', "must be a list of objects"),
        ('{"prompt": "x", "max_tokens": "9"}', "max_tokens is '9'"),
        ('{"prompt": "x", "top_p": 2}', "top_p is 2"),
    ],
)
def test_a_malformed_line_names_file_and_line(no_driver, capsys, tmp_path, line, message):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "good"}\n' + line + "\n")
    output = tmp_path / "out.jsonl"
    command = ["generate", "m", "--prompts", prompts, "--output", output]
    error = _error(capsys, command, 2)
    assert f"{prompts}:2: " in error and message in error
    assert not output.exists()


def test_files_that_cannot_be(no_driver, capsys, tmp_path):
    empty, good = tmp_path / "empty.jsonl", write_jsonl(tmp_path / "in.jsonl", {"prompt": "a"})
    empty.write_text("\n")
    assert "empty" in _error(capsys, ["generate", "m", "--prompts", empty], 2)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in _error(capsys, ["generate", "m", "--prompts", binary], 2)
    command = ["generate", "m", "--prompts", good, "--output"]
    assert "No such file" in _error(capsys, [*command, tmp_path / "no" / "out.jsonl"], 2)
    assert "Is a directory" in _error(capsys, [*command, tmp_path], 2)
    (tmp_path / "link").symlink_to(good)
    for same in (good, tmp_path / "link"):
        assert "holds the prompts" in _error(capsys, [*command, same, "--overwrite"], 2)
    old = write_jsonl(tmp_path / "old.jsonl", {"old": 1})
    assert "give --resume to go on with it, --overwrite" in _error(capsys, [*command, old], 2)
    assert _results(good) == [{"prompt": "a"}]


def test_overwrite_keeps_the_old_file_until_there_is_a_result(driver, capsys, tmp_path):
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "a"})
    output = write_jsonl(tmp_path / "out.jsonl", {"old": 1})
    command = ["generate", "m", "--prompts", prompts, "--output", output, "--overwrite"]
    driver.dies_at_look = 1
    _error(capsys, command, 1)
    assert _results(output) == [{"old": 1}]
    driver.dies_at_look = None
    driver.aborted.clear()
    assert cli.main([str(part) for part in command]) == 0
    assert [result["index"] for result in _results(output)] == [0]


def test_a_stage_that_dies_leaves_what_had_ended(driver, capsys, tmp_path):
    lines = [{"prompt": "a", "max_tokens": n} for n in (2, 9, 1)]
    prompts = write_jsonl(tmp_path / "in.jsonl", *lines)
    output = tmp_path / "out.jsonl"
    driver.dies_at_look = 4
    error = _error(capsys, ["generate", "m", "--prompts", prompts, "--output", output], 1)
    assert "stage 1 (pid 7) died" in error and "2 of 3 prompts are done" in error
    assert [result["index"] for result in _results(output)] == [2, 0]
    assert driver.closed


def test_nothing_written_leaves_no_file(driver, capsys, tmp_path):
    driver.dies_at_look = 1
    output = tmp_path / "out.jsonl"
    _error(capsys, ["generate", "m", "--prompt", "a", "--output", output], 1)
    assert not output.exists()


def test_ctrl_c(driver, capsys, monkeypatch):
    monkeypatch.setattr(driver, "outputs", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["generate", "m", "--prompt", "a"]) == 130
    assert driver.closed


# ---- bench ------------------------------------------------------------------------------------


def test_bench_counts_and_writes_its_keys(driver, tmp_path, capsys):
    workload = write_jsonl(
        tmp_path / "mix.jsonl",
        {"prompt_token_ids": [1, 2, 3], "max_tokens": 4},
        {"prompt": "ab", "max_tokens": 1, "arrival_s": 0.01},
    )
    report_file = tmp_path / "report.json"
    command = ["bench", "m", "-pp", "2", "--workload", str(workload), "--repeat", "2"]
    assert cli.main([*command, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert (report["requests"], report["prompt_tokens"], report["output_tokens"]) == (2, 5, 5)
    assert report["total_tokens_per_s"] == pytest.approx(10 / report["seconds"])
    assert report["output_tokens_per_s"] == pytest.approx(5 / report["seconds"])
    for key in ("ttft_s", "tbt_s"):
        assert list(report[key]) == ["p50", "p90", "p99"]
    assert report["policy"] == "uniform" and report["config"]["model"] == "m"
    assert len(report["run_seconds"]) == 2 and report["seconds"] in report["run_seconds"]
    first, second = report["stages"]
    assert first["busy"] + sum(first["idle_by_cause"].values()) == pytest.approx(1)
    assert (first["layers"], second["layers"]) == (2, 1)
    memory = [first[f"{part}_bytes"] for part in ("weight", "kv", "baseline", "peak")]
    assert memory == [1000, 500, 2000, 3600]
    printed = capsys.readouterr().out
    assert "TTFT p50 / p90 / p99" in printed and "1.03" in printed  # 3600 / 3500


def test_bench_is_greedy_ignores_eos_and_shares_no_prefix_between_passes(driver, tmp_path):
    workload = write_jsonl(tmp_path / "mix.jsonl", {"prompt": "ab", "max_tokens": 3})
    driver.reply = lambda prompt: [EOS]
    assert cli.main(["bench", "m", "--workload", str(workload), "--repeat", "2"]) == 0
    warmup, first, second = driver.added
    assert all(request.params.temperature == 0 for request in driver.added)
    assert all(request.params.ignore_eos and not request.stop_ids for request in driver.added)
    assert len({request.cache_salt for request in driver.added}) == 3
    assert warmup.prompt != first.prompt == second.prompt


def test_a_built_in_workload_is_the_same_for_the_same_seed(driver):
    driver.limits = replace(driver.limits, max_model_len=10**6)

    def prompts(seed):
        driver.added.clear()
        command = ["bench", "m", "--workload", "azure-conv", "--num-prompts", "3"]
        assert cli.main([*command, "--scale", "500", "--seed", seed]) == 0
        return [(request.prompt, request.params.max_tokens) for request in driver.added]

    assert prompts("1") == prompts("1") != prompts("2")
    assert all(0 <= token < VOCAB_SIZE for prompt, _ in prompts("1") for token in prompt)


def test_bench_refuses_what_is_over_the_context(driver, capsys, tmp_path):
    workload = write_jsonl(tmp_path / "mix.jsonl", {"prompt": "a" * 60, "max_tokens": 9})
    error = _error(capsys, ["bench", "m", "--workload", workload], 2)
    assert "60 + 9 tokens" in error and "shorten it, or use another workload" in error
    assert driver.closed and not driver.added


def test_bench_refuses_what_is_over_the_kv_cache_before_anything_runs(driver, capsys, tmp_path):
    driver.limits = replace(driver.limits, num_blocks=2, block_size=16)
    items = [{"prompt": "a" * length, "max_tokens": 9} for length in (24, 25)]
    workload = write_jsonl(tmp_path / "mix.jsonl", *items)
    error = _error(capsys, ["bench", "m", "--workload", workload], 2)
    assert "request 1 of the workload has 25 + 9 tokens, the KV cache has room for 32" in error
    assert driver.closed and not driver.added


def test_what_is_too_long_though_divided_wants_more_than_the_same_scale(driver, capsys, tmp_path):
    workload = tmp_path / "long.csv"
    workload.write_text("prefill,decode\n120,18\n")
    error = _error(capsys, ["bench", "m", "--workload", str(workload), "--scale", "2"], 2)
    assert "60 + 9 tokens" in error and "--scale 3" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "max_tokens is None"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1}, "one of prompt and prompt_token_ids"),
        ({"prompt": 3, "max_tokens": 1}, "prompt must be text"),
        ({"prompt": "a", "max_tokens": 1, "arrival_s": -1}, "arrival_s is -1"),
        # inference-sim#1606: times since 1970, for which a run would wait 56 years
        ({"prompt": "a", "max_tokens": 1, "arrival_s": 1.787e9}, "after the run's start"),
        ({"prompt": "a", "max_token": 1}, "did you mean 'max_tokens'"),
    ],
)
def test_a_wrong_workload_line(no_driver, capsys, tmp_path, line, message):
    workload = write_jsonl(tmp_path / "mix.jsonl", line)
    error = _error(capsys, ["bench", "m", "--workload", workload], 2)
    assert f"{workload}:1: " in error and message in error


@pytest.mark.parametrize(
    ("name", "mean_prompt", "mean_output"),
    [("sharegpt", 2340, 439), ("arxiv", 2588, 291), ("azure-conv", 1155, 211)],
)
def test_built_in_lengths_have_the_means_of_their_traces(name, mean_prompt, mean_output):
    """Means of the traces themselves, which the quantiles were not fitted to."""
    lengths = read_workload(name, 20_000, 1.0, None, seed=0).lengths
    prompts, outputs = zip(*lengths, strict=True)
    assert sum(prompts) / len(prompts) == pytest.approx(mean_prompt, rel=0.1)
    assert sum(outputs) / len(outputs) == pytest.approx(mean_output, rel=0.1)
    assert max(prompts) <= DISTRIBUTIONS[name].prompt_tokens[-1]


def test_a_full_disk_is_one_line():
    with (
        ResultFile(Path("/dev/full"), "job", overwrite=True) as results,
        pytest.raises(PipeserveError, match="No space left on device; make room"),
    ):
        results.write({"text": "x"})


def test_standard_streams_that_are_closed():
    """Nothing takes their places: neither standard output that of stderr, nor a file."""
    program = (
        "import os; from pipeserve.launch import cli; "
        "assert cli.main(['generate', '/nowhere', '--prompt', 'x']) == 2; "
        "assert os.open('/dev/null', 0) > 2"
    )
    command = f'exec "{sys.executable}" -c "{program}" <&- 2>&-'
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"")
