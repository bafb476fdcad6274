"""generation_config.json by vLLM's rules: what a request leaves out, and what ends it."""

import json

import pytest
from fake_client import EOS, FakeClient, FakeDriver, byte_tokenizer, write_jsonl

from pipeserve import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.frontend.llm import LLM
from pipeserve.launch import cli
from pipeserve.launch.run import starting

pytestmark = pytest.mark.usefixtures("no_collections")

ALL = {
    "repetition_penalty": 1.3,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
    "max_new_tokens": 7,
}
FILLED = SamplingParams(
    repetition_penalty=1.3, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, max_tokens=7
)


@pytest.fixture
def folder(tmp_path):
    return byte_tokenizer(tmp_path / "model")


def _write(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))


def _llm(folder, generation_config="auto", **driver):
    fake = FakeClient(folder, **driver)
    object.__setattr__(fake.config, "generation_config", generation_config)
    return LLM.on(fake)


def _without_seed(driver):
    (request,) = driver.added
    return {name: getattr(request.params, name) for name in SamplingParams.__slots__ if
            name != "seed"}  # fmt: skip


def test_it_fills_what_is_left_out(folder):
    """vllm#11164."""
    _write(folder, **ALL, do_sample=False, eos_token_id=5, transformers_version="5", typical_p=0.2)
    llm = _llm(folder)
    assert llm.get_default_sampling_params() == FILLED
    llm.generate("a")
    expected = {name: getattr(FILLED, name) for name in SamplingParams.__slots__ if name != "seed"}
    assert _without_seed(llm.client) == expected


def test_explicit_params_are_taken_as_they_are(folder):
    _write(folder, **ALL)
    llm = _llm(folder)
    llm.generate(["a", "b"], [SamplingParams(max_tokens=2), None])
    explicit, filled = (request.params for request in llm.client.added)
    assert (explicit.temperature, explicit.top_k, explicit.max_tokens) == (1.0, 0, 2)
    assert (filled.temperature, filled.top_k, filled.max_tokens) == (0.6, 20, 7)


def test_vllm_means_vllm_s_own_defaults(folder):
    _write(folder, **ALL)
    assert _llm(folder, "vllm").get_default_sampling_params() == SamplingParams()


def test_another_folder_s_file(folder, tmp_path):
    _write(folder, **ALL)
    _write(tmp_path / "other", temperature=0.25, eos_token_id=[99, 5000])
    llm = _llm(folder, str(tmp_path / "other"), reply=lambda prompt: [97, 98, 99, 100])
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25)
    (completion,) = llm.generate("a")
    assert completion.token_ids == (97, 98, 99)  # its eos, too
    assert llm.client.added[0].stop_ids == {99, EOS}
    with pytest.raises(ConfigError, match=r"there is no .*nowhere/generation_config.json; give"):
        _llm(folder, str(tmp_path / "nowhere"))


def test_without_a_file_nothing_is_filled(folder):
    """transformers 5 takes eos from config.json, and no sampling."""
    (folder / "config.json").write_text(json.dumps({"temperature": 0.5, "hidden_size": 4}))
    assert _llm(folder).get_default_sampling_params() == SamplingParams()
    _write(folder)
    assert _llm(folder).get_default_sampling_params() == SamplingParams()


def test_whatever_is_in_the_file_counts(folder):
    """Though transformers 4 had the same value where the file had none."""
    _write(folder, top_k=50, temperature=1.0, transformers_version="4.40.0")
    assert _llm(folder).get_default_sampling_params() == SamplingParams(top_k=50)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": None, "top_k": None}, SamplingParams()),
        ({"top_k": 50.0, "top_p": 1}, SamplingParams(top_k=50, top_p=1)),
        ({"top_k": -1}, SamplingParams()),
        ({"max_length": 20}, SamplingParams()),
    ],
)
def test_odd_values_that_are_taken(folder, values, expected):
    _write(folder, **values)
    assert _llm(folder).get_default_sampling_params() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": -1}', "temperature is -1, must be"),
        ('{"top_k": "many"}', "top_k is 'many'"),
        ('{"top_p": 0.0}', "top_p is 0.0"),
        ('{"max_new_tokens": 0}', "max_tokens is 0"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_cannot_be_names_the_file(folder, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        _llm(folder)
    assert "generation_config.json" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_s_eos_ends_a_request(folder):
    """vllm#4182: `<|im_end|>` is missing in generation_config.json."""
    for eos, expected in (((), {EOS}), ((5,), {5, EOS}), ((EOS,), {EOS})):
        llm = _llm(folder, reply=lambda prompt: [104, 105, EOS, 106])
        llm.client.eos_token_ids = eos
        (completion,) = llm.generate("a", SamplingParams(max_tokens=9))
        assert (completion.text, completion.finish_reason) == ("hi", "stop")
        assert llm.client.added[0].stop_ids == expected
    llm.generate("a", SamplingParams(max_tokens=4, ignore_eos=True))
    assert llm.client.added[-1].stop_ids == set()


def test_an_eos_that_the_model_does_not_have(folder):
    llm = _llm(folder)
    llm.client.vocab_size = 200
    llm.generate("a", SamplingParams(max_tokens=2))
    assert EOS not in llm.client.added[0].stop_ids


def test_ids_alone_need_no_eos(tmp_path):
    llm = _llm(tmp_path)
    llm.generate([97], SamplingParams(max_tokens=2))
    assert llm.client.added[0].stop_ids == {EOS}  # config.json's


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the command on fake stages; the parameters that reached the driver, and the code."""

    def run(*command):
        driver = FakeDriver(folder)

        def open_driver(run_config, record, check=lambda model_config: None):
            driver.config, driver.record = run_config, record
            check(driver)
            return driver

        monkeypatch.setattr(starting, "open_driver", open_driver)
        code = cli.main([str(part) for part in command])
        return [request.params for request in driver.added], code

    return run


def test_flags_and_lines_win(run, folder, tmp_path):
    _write(folder, **ALL)
    prompts = write_jsonl(
        tmp_path / "in.jsonl",
        {"prompt": "a"},
        {"prompt": "b", "temperature": 0, "top_k": None},
    )
    (first, second), code = run("generate", "m", "--prompts", prompts, "--top-p", "0.5")
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.6, 20, 0.5, 7)
    assert (second.temperature, second.top_k, second.top_p, code) == (0, 20, 0.5, 0)
    (only,), _ = run("generate", "m", "--prompt", "a", "--generation-config", "vllm")
    assert (only.temperature, only.max_tokens) == (1.0, 16)
    (only,), _ = run("generate", "m", "--prompt", "a")
    assert (only.temperature, only.max_tokens) == (0.6, 7)


def test_bench_stays_greedy(run, folder, tmp_path):
    _write(folder, **ALL)
    work = write_jsonl(tmp_path / "work.jsonl", {"prompt": "ab", "max_tokens": 3})
    params, code = run("bench", "m", "--workload", work)
    assert code == 0
    assert {(each.temperature, each.top_k, each.ignore_eos) for each in params} == {(0, 0, True)}


def test_what_contradicts_the_model_s_defaults(run, folder, capsys):
    _write(folder, max_new_tokens=7)
    command = ["generate", "m", "--prompt", "a", "--min-tokens", "9"]
    assert run(*command)[1] == 2
    assert "prompt 0: min_tokens is 9, over max_tokens 7" in capsys.readouterr().err
    assert run(*command, "--max-tokens", "9")[1] == 0
    assert run("generate", "m", "--prompt", "a", "--generation-config", "nowhere")[1] == 2
    assert "generation_config is 'nowhere'" in capsys.readouterr().err


def test_resume_knows_which_defaults_there_were(run, folder, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "a"})
    command = ["generate", "m", "--prompts", prompts, "--output", tmp_path / "out.jsonl"]
    assert run(*command)[1] == 0
    assert run(*command, "--resume")[1] == 0
    assert run(*command, "--resume", "--generation-config", "vllm")[1] == 2
    assert "is of another job" in capsys.readouterr().err
