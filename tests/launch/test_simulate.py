"""`pipeserve simulate` from the command line: recipes, results, and what it refuses."""

import json
from dataclasses import replace

import pytest
from made_up_profile import TRUE

from pipeserve.configs import load_recipe, recipe_names
from pipeserve.configs.device_profiles import load_profile, save_profile
from pipeserve.core.policies import POLICIES
from pipeserve.launch import cli
from pipeserve.launch.verbs import disaggregate
from pipeserve.launch.verbs import simulate as simulate_verb

FALCON = ["simulate", "--config", "falcon-180b-8xa100", "--num-prompts", "40", "--rate", "1"]
SMALL = [
    "simulate", "llama2-7b", "--device-profile", "a100-80gb-dgx", "-pp", "2", "--max-model-len",
    "2048",
]  # fmt: skip

POOLED = ["simulate", "llama2-7b", "--device-profile", "a100-80gb-dgx", "--max-model-len", "2048"]
SLO = ["--slo-ttft", "0.2", "--slo-tpot", "0.05"]
POOLS = ["--prefill-pool", "2x1", "--decode-pool", "1x1*2"]


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.jsonl"
    line = {"prompt_token_ids": [0] * 1900, "max_tokens": 4}
    path.write_text(json.dumps(line) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    """Searches by few requests: what they find is close enough, and tests of the searches
    themselves are in tests/profiling."""
    monkeypatch.setattr(simulate_verb, "CAPACITY_REQUESTS", 100)
    monkeypatch.setattr(disaggregate, "TRIAL_REQUESTS", 60)


@pytest.fixture
def simulate(tmp_path, capsys):
    """Runs a command with --json: the object, and what was printed."""

    def simulate(*arguments):
        path = tmp_path / "result.json"
        assert cli.main([*arguments, "--json", str(path)]) == 0
        # Lines are broken where the terminal ends.
        return json.loads(path.read_text()), " ".join(capsys.readouterr().out.split())

    return simulate


def failure(capsys, arguments, code=2):
    assert cli.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_run_reports_what_bench_does(simulate):
    result, printed = simulate(*FALCON)
    assert result["requests"] == 40
    assert result["policy"] == "uniform"
    assert result["simulated"] == load_profile("a100-80gb-dgx").name
    assert len(result["stages"]) == 8
    for stage in result["stages"]:
        assert 0 < stage["busy"] < 1
        assert stage["busy"] + sum(stage["idle_by_cause"].values()) == pytest.approx(1)
    for key in ("seconds", "total_tokens_per_s", "output_tokens_per_s"):
        assert result[key] > 0
    for key in ("ttft_s", "tbt_s", "queueing_s"):
        assert 0 <= result[key]["p50"] <= result[key]["p90"] <= result[key]["p99"]
    assert "trained to 2,048 positions" in printed


def test_the_same_seed_gives_the_same_run_and_another_another(simulate):
    first, again, other = (simulate(*FALCON, "--seed", seed)[0] for seed in ("5", "5", "6"))
    assert first == again
    assert first["seconds"] != other["seconds"]


def test_a_wanted_time_between_tokens_steers_the_policy(simulate):
    """Alone it searches nothing; what holds, holds for all but a few tokens."""
    run = [*FALCON, "--max-num-batched-tokens", "2048", "--slo-tbt"]
    loose, tight = simulate(*run, "5")[0], simulate(*run, "0.5")[0]
    assert tight["limits"]["max_tbt_s"] == tight["config"]["slo_tbt"] == 0.5
    assert tight["tbt_s"]["p99"] <= 0.5 < loose["tbt_s"]["p99"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_serves_everything(simulate, policy):
    result, _ = simulate(*SMALL, "--policy", policy, "--workload", "azure-conv", "--scale", "12",
                         "--num-prompts", "30", "--rate", "8")  # fmt: skip
    assert result["requests"] == 30
    assert result["policy"] == policy


@pytest.fixture
def search(lengths, tmp_path):
    """For a capacity, by a recipe that wants what no schedule gives; of a large model, for a trial
    lasts so long that a small one serves thousands of requests in it."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: falcon-180b\ndevice_profile: a100-80gb-dgx\ntensor_parallel_size: 4\n"
        "pipeline_parallel_size: 2\nmax_model_len: 2048\nslo_tbt: 1.0e-6\n"
    )
    return ["simulate", "--config", str(recipe), "--workload", lengths, "--find-capacity"]


def test_capacity_is_under_the_ceiling_and_holds_what_it_promises(simulate, search):
    result, printed = simulate(*search, "--slo-tbt", "0.5")
    assert result["slo_tbt_s"] == 0.5
    assert 0 < result["capacity_rps"] < result["ceiling_rps"]
    (best,) = (t for t in result["trials"] if t["rate"] == result["capacity_rps"])
    assert best["tbt_p99_s"] <= 0.5 and best["queueing_p50_s"] <= 2
    assert f"capacity {result['capacity_rps']:.3f} requests/s" in printed


def test_an_slo_that_no_schedule_meets_is_said_so(simulate, search):
    """The recipe's own, where no flag says another."""
    result, printed = simulate(*search)
    assert result["capacity_rps"] == 0
    assert "cannot: even requests that hardly meet" in printed


@pytest.mark.parametrize("name", [n for n in recipe_names() if "device_profile" in load_recipe(n)])
def test_every_simulated_recipe_runs(simulate, name):
    result, _ = simulate("simulate", "--config", name, "--workload", "azure-conv", "--scale", "20",
                         "--num-prompts", "5", "--rate", "1")  # fmt: skip
    assert result["requests"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "falcon-180b"], "no device profile: give --device-profile"),
        ([*SMALL, "--device-profile", "a100-80gb"], "a100-80gb-dgx"),
        (["simulate", "falcon-180", "--device-profile", "a100-80gb-dgx"], "falcon-180b"),
        ([*SMALL, "--rate", "0"], "--rate is 0"),
        ([*SMALL, "--num-prompts", "10000001"], "is 10000001, must be 1 to 10,000,000"),
        ([*SMALL, "--max-num-seqs", str(2**70)], f"must be at most {2**31 - 1}"),  # vllm#43496
        ([*SMALL, "--kv-cache-memory-bytes", str(2**60)], "it must be at most 134217728; give"),
        ([*SMALL, "--rate", "-1"], "--rate is -1"),
        ([*SMALL, *SLO, "--place", "1x2", "--rate", "inf"], "--place is for so many requests"),
        ([*SMALL, "--find-capacity"], "give --slo-tbt SECONDS"),
        ([*SMALL, "--slo-tbt", "inf"], "slo_tbt is inf, must be over 0 and finite"),
        ([*SMALL, "--find-capacity", "--slo-tbt", "0"], "slo_tbt is 0"),
        ([*SMALL, "--find-capacity", "--slo-tbt", "1", "--rate", "2"], "leave --rate out"),
        ([*SMALL, "--max-model-len", "100"], "the context holds 100"),
        ([*SMALL, "--policy", "vllm", "--max-num-batched-tokens", "64"], "give at least max_model"),
        ([*SMALL, "--slo-ttft", "1"], "--slo-ttft and --slo-tpot go together"),
        ([*SMALL, *SLO, "--attainment", "1.5"], "the attainment is 1.5"),
        ([*SMALL, "--attainment", "0.5"], "--attainment is for --slo-ttft and --slo-tpot"),
        ([*SMALL, *POOLS, "--slo-ttft", "inf", "--slo-tpot", "1"], "ttft_s is inf: must be over 0"),
        ([*SMALL, *SLO, "--find-capacity", "--slo-tbt", "1"], "goes by --slo-tbt; leave"),
        ([*POOLED, *SLO, *POOLS, "--policy", "vllm"], "--policy has no effect on pools"),
        ([*SMALL, *SLO, "--prefill-pool", "1x1*99999999999", *POOLS[2:]], "give at most 4096"),
        ([*SMALL, *SLO, "--place", "99999x9"], "--place asks for 899991 GPUs"),
        ([*SMALL, "--rate", "1e-320"], "--rate is 1e-320, must be over 1e-09"),
        ([*SMALL, "--scale", "4"], "use --scale 5 or another"),
        ([*SMALL, "--kv-cache-memory-bytes", "1"], "--kv-cache-memory-bytes 1 holds no block"),
        ([*SMALL, *SLO, "--prefill-pool", "1x1"], "--prefill-pool and --decode-pool go together"),
        ([*SMALL, *SLO, *POOLS[:2], "--decode-pool", "2"], "--decode-pool is '2'; give TPxPP"),
        ([*SMALL, *SLO, *POOLS[:2], "--decode-pool", "0x1"], "--decode-pool is '0x1'"),
        ([*SMALL, *POOLS], "pools are measured by --slo-ttft and --slo-tpot"),
        ([*POOLED, *POOLS, *SLO, "--slo-tbt", "1"], "--slo-tbt has no effect on pools"),
        ([*SMALL, *SLO, "--place", "4"], "--place is '4'; give NODESxGPUS"),
        ([*SMALL, *SLO, "--place", "1x4"], "--place needs --slo-ttft, --slo-tpot and --rate"),
        ([*SMALL, *SLO, "--place", "1x4", "--rate", "1", *POOLS], "--place looks for pools"),
        ([*SMALL, "--fast-network"], "--fast-network is for --place"),
        ([*SMALL, "-tp", "3"], "tensor_parallel_size is 3, and llama2-7b has 32 attention heads"),
        ([*SMALL, "-pp", "33"], "more than the model's 32 layers"),
        (["simulate", "falcon-180b", "--device-profile", "a100-80gb-dgx"], "no room for KV"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, arguments, message):
    assert message in failure(capsys, arguments)


@pytest.mark.parametrize(("num_two", "num_one"), [(0, 1), (1, 2999)])
def test_a_workload_without_times_between_tokens_has_no_capacity(
    capsys, tmp_path, num_two, num_one
):
    """Nor one with so few that each trial would be of 300,000 requests."""
    path = tmp_path / "one.csv"
    path.write_text("prefill,decode\n" + "100,2\n" * num_two + "100,1\n" * num_one)
    search = [*SMALL, "--workload", str(path), "--find-capacity", "--slo-tbt", "1"]
    most = f"{num_one:,} of {num_two + num_one:,} requests of {path} have one output token"
    assert most in failure(capsys, search)


@pytest.mark.parametrize("search", [[], ["--find-capacity", "--slo-tbt", "1"]])
def test_a_request_that_the_pool_cannot_hold_is_named_before_anything_runs(
    capsys, tmp_path, search
):
    path = tmp_path / "late.csv"
    path.write_text("prefill,decode\n100,40\n100,61\n150,40\n")
    run = [*SMALL, "--num-gpu-blocks-override", "10", "--block-size", "16"]
    wanted = "request 2 of the workload has 150 + 40 tokens, the KV cache has room for 160; use"
    assert f"{wanted} --scale 2" in failure(capsys, [*run, "--workload", str(path), *search])


@pytest.mark.parametrize("scale", ["1", "3", "3.7", "4"])
def test_the_scale_that_is_proposed_suits_all_requests(capsys, tmp_path, scale):
    """Not the first alone that is too long (vllm#36197: a remedy that is none)."""
    path = tmp_path / "long.csv"
    path.write_text("prefill,decode,arrival_s\n4001,4,0\n9999,15,1\n2999,999,2\n")
    run = [*SMALL, "--max-model-len", "500", "--workload", str(path), "--scale"]
    proposed = failure(capsys, [*run, scale]).partition("use --scale ")[2].split()[0]
    assert cli.main([*run, proposed]) == 0


def test_no_scale_is_proposed_for_prompts(capsys, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3], "max_tokens": 500}\n')
    said = failure(capsys, [*SMALL, "--max-model-len", "500", "--workload", str(path)])
    assert "3 + 500 tokens, the context holds 500; shorten it, or use another workload" in said


@pytest.mark.parametrize("pools", [["--prefill-pool", "1x1", "--decode-pool", "1x1"], []])
def test_weights_that_do_not_fit_say_so(capsys, lengths, pools):
    run = ["simulate", "falcon-180b", "--device-profile", "a100-80gb-dgx", "--max-model-len",
           "2048", "--workload", lengths, *(SLO if pools else []), *pools]  # fmt: skip
    assert "no room for KV; use more stages" in failure(capsys, run)


def test_a_profile_of_another_type_is_refused(capsys, tmp_path):
    path = tmp_path / "cpu.yaml"
    save_profile(replace(TRUE, tables=replace(TRUE.tables, dtype="float32")), path)
    arguments = ["simulate", "smollm2-135m", "--device-profile", str(path)]
    assert "is for dtype float32; give --dtype float32" in failure(capsys, arguments)


def test_a_profile_of_another_model_is_refused(capsys, tmp_path):
    path = tmp_path / "cpu.yaml"
    save_profile(TRUE, path)
    arguments = ["simulate", "llama2-7b", "--device-profile", str(path)]
    assert "for model smollm2-135m, not llama2-7b" in failure(capsys, arguments)


def test_a_calibrated_profile_simulates_its_model(simulate, tmp_path):
    path = tmp_path / "cpu.yaml"
    save_profile(TRUE, path)
    result, _ = simulate("simulate", "smollm2-135m", "-pp", "2", "--device-profile", str(path),
                         "--workload", "azure-conv", "--scale", "8",
                         "--num-prompts", "5")  # fmt: skip
    assert result["simulated"] == "made up"


# ---- prefill and decode apart -------------------------------------------------------------------


def test_a_run_counts_what_was_within_the_slo(simulate, lengths):
    """One prompt of 1,900 tokens takes over 50 ms, so a TTFT of 10 ms is met by none."""
    run = [*SMALL, "--workload", lengths, "--slo-tpot", "1"]
    assert simulate(*run, "--slo-ttft", "0.01")[0]["attainment"]["both"] == 0
    result, printed = simulate(*run, "--slo-ttft", "5")
    assert result["attainment"] == {"ttft": 1, "tpot": 1, "both": 1}
    assert "both 100.0% of requests" in printed


def test_pools_of_their_own(simulate, lengths):
    result, printed = simulate(*POOLED, *SLO, *POOLS, "--workload", lengths)
    assert result["requests"] == 1
    assert result["num_gpus"] == 4
    assert [len(result["pools"][name]) for name in ("prefill", "decode")] == [1, 2]
    assert result["attainment"]["both"] == 1
    assert "TTFT within 0.2 s and TPOT within 0.05 s for 90%" in printed


def test_goodput_of_pools_and_one_that_cannot_be(simulate, lengths):
    run = [*POOLED, *POOLS, "--workload", lengths, "--find-capacity", "--slo-tpot", "0.05"]
    result, printed = simulate(*run, "--slo-ttft", "0.5")
    assert result["goodput_rps"] == pytest.approx(4 * result["goodput_rps_per_gpu"])
    assert f"goodput {result['goodput_rps']:.2f} requests/s" in printed
    result, printed = simulate(*run, "--slo-ttft", "0.001")
    assert result["goodput_rps"] == 0
    assert "cannot: no rate is within the SLO" in printed


@pytest.mark.parametrize(("more", "algorithm"), [([], 2), (["--fast-network"], 1)])
def test_the_best_pools_for_a_rate(simulate, lengths, more, algorithm):
    run = [*POOLED, "--workload", lengths, *SLO, "--place", "1x2", "--rate", "30", *more]
    result, printed = simulate(*run)
    found = result["placement"]
    assert result["algorithm"] == algorithm
    assert found["num_gpus"] * found["rate_per_gpu"] >= 30 * 0.99
    assert f"{found['num_gpus']} GPUs for 30 requests/s" in printed
