"""What is said while stages load, and once they have; and what is found before they start."""

import pytest
from checkpoints import tiny_llama
from safetensors.torch import load_file

from pipeserve.configs import RunConfig
from pipeserve.core.topology import Topology
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.loading import LoadWatch
from pipeserve.driver.starting import StartProgress
from pipeserve.errors import ConfigError
from pipeserve.launch import cli
from pipeserve.launch.run import starting
from pipeserve.launch.show.loaded import listed, loaded
from pipeserve.wire import control


def run_config(model, **options):
    plain = {"dtype": "float32", "num_gpu_blocks_override": 16}
    return RunConfig(model=str(model), **plain | options)


@pytest.mark.processes
def test_how_far_the_stages_are_and_what_they_loaded(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    size = 4 * sum(tensor.numel() for tensor in load_file(f"{folder}/model.safetensors").values())
    said = []
    config = run_config(
        folder, pipeline_parallel_size=3, pipeline_layers=(3, 0, 1), head_stages="last"
    )
    with Driver(checkpoint_setup(config), on_progress=said.append) as driver:
        line = loaded(driver)
        threads = "+".join(str(stage.num_threads) for stage in driver.stages)
        cpus = "+".join(listed(stage.cpus) for stage in driver.stages)
        read = driver.fleet._start.loading.weights
        # As held: kernels fill up rows to whole panels.
        assert all(
            read[stage.stage].num_read <= stage.weight_bytes <= 2 * read[stage.stage].num_read
            for stage in driver.stages
        )
    assert sum(message.num_read for message in read.values()) == size
    assert all(message.num_read == message.num_bytes for message in read.values())
    assert said[0] == "waiting for keepers: 0 of 3 joined"
    assert said[-1] == "connecting stages"
    assert line == (
        f"{folder} (folder): LlamaForCausalLM, {size / 4e6:.1f} M parameters in float32; "
        f"3 stages of 3+0+1 layers, 0.00+0.00+0.00 GB, {threads} threads on CPU {cpus}"
    )


@pytest.mark.parametrize(
    ("cpus", "text"), [([3], "3"), ([0, 1, 2, 8, 10, 11], "0-2,8,10-11"), ([], "")]
)
def test_cpus_are_listed_as_the_kernel_does(cpus, text):
    assert listed(cpus) == text


def test_the_time_between_tokens_that_is_wanted_reaches_the_engine(tmp_path):
    config = run_config(tiny_llama(tmp_path / "model"), slo_tbt=0.5)
    sizes = [control.StageSized(weight_bytes=0, block_bytes=1, memory=())]
    assert checkpoint_setup(config).limits_for(sizes).max_tbt_s == 0.5


def test_how_far_in_words():
    loading = LoadWatch(2, 0.0)
    assert str(loading) == "starting stages: 0 of 2 load weights"
    loading.take(1, control.Loading(10**9, 3 * 10**9), 1.0)
    assert str(loading) == "starting stages: 1 of 2 load weights"
    loading.take(0, control.Loading(250_000_000, 10**9), 2.0)
    assert str(loading) == "loading weights: 1.25 of 4.00 GB, 31%"
    nothing_to_read = LoadWatch(1, 0.0)
    nothing_to_read.take(0, control.Loading(0, 0), 1.0)
    assert str(nothing_to_read) == "loading weights: 0.00 of 0.00 GB, 100%"


def test_who_waits_for_the_others_to_say_what_they_take_has_not_stopped():
    """And has all of its time once they have."""
    names = control.KeeperHello(0, 2, "here", "", 0, "")
    config = run_config("model", load_timeout=10.0)
    start = StartProgress(Topology(((0,), (1,))), {0: names, 1: names}, config, now=0.0)
    size = control.StageSized(0, 0, ())
    assert not start.sized(0, size, 1.0)
    start.loading.moved(1, 9, 5.0)  # it still imports
    assert start.late(14.0) is None
    assert start.sized(1, size, 14.0)
    assert start.late(23.0) is None
    rank, lost = start.late(25.0)
    assert (rank, lost.why.partition(",")[0]) == (0, "stage 0 on here has stopped loading")


@pytest.mark.processes
def test_the_summary_goes_to_stderr_and_the_text_to_stdout(tmp_path, capsys):
    folder = tiny_llama(tmp_path / "model")
    capsys.readouterr()
    with starting.open_driver(run_config(folder)):
        out, error = capsys.readouterr()
    *before, summary = error.splitlines()
    assert out == "" and any(line.startswith("plan: 4 layers over 1 stage") for line in before)
    assert f"{folder} (folder): LlamaForCausalLM" in summary and "1 stage of 4 layers" in summary


def test_what_resolving_says_reaches_who_waits(tmp_path, monkeypatch):
    """Such as how far a download is, or that a GGUF file is converted."""

    def found(model, on_progress):
        on_progress("fetching org/tiny: 1.00 of 2.00 GB")
        return tmp_path  # in which there is nothing

    said = []
    monkeypatch.setattr("pipeserve.driver.checkpoint.resolve", found)
    with pytest.raises(ConfigError, match=r"config\.json"):
        checkpoint_setup(run_config("org/tiny"), said.append)
    assert said == ["fetching org/tiny: 1.00 of 2.00 GB"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--allowed-token-ids", "5,999999"], "allowed_token_ids has 999999, token ids are 0 to"),
        (["--logit-bias", "999999=1"], "logit_bias has 999999"),
        (["--stop-token-ids", "999999"], "stop_token_ids has 999999"),
    ],
)
def test_token_ids_of_no_token_are_found_before_stages_start(
    tmp_path, capsys, monkeypatch, flags, message
):
    folder = tiny_llama(tmp_path / "model")
    capsys.readouterr()
    monkeypatch.setattr(
        "pipeserve.driver.fleet.Fleet.start", lambda *args: pytest.fail("stages were started")
    )
    assert cli.main(["generate", folder, "--prompt", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: prompt 0: {message}") and error.count("\n") == 1


def test_calibrate_says_how_far_a_model_is(monkeypatch, tmp_path):
    """It has to look for the model before anything else."""
    told = []

    def found(model, on_progress):
        on_progress(f"fetching {model} [1]")
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeserve.stages.checkpoint.sources.resolve", found)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: told.append(text))
    assert cli.main(["calibrate", "org/tiny", "--output", str(tmp_path / "profile.yaml")]) == 130
    assert [text.plain for text in told] == ["fetching org/tiny [1]"]  # [1] is no style
