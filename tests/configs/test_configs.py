"""RunConfig and recipes: every wrong value is one line with the value, the limit and the remedy."""

from dataclasses import fields

import pytest

from pipeserve.configs import RunConfig, load_recipe, make_config, recipe_names
from pipeserve.core.policies import POLICIES
from pipeserve.errors import ConfigError


def test_every_shipped_recipe_makes_a_config():
    assert "smollm2-2stage" in recipe_names()
    for name in recipe_names():
        assert make_config(load_recipe(name), {}).model


def test_every_field_is_documented():
    assert all(item.metadata["help"] for item in fields(RunConfig))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0, must be at least 1"),
        ({"pipeline_parallel_size": "2"}, "pipeline_parallel_size is '2', must be a whole number"),
        ({"pipeline_parallel_size": True}, "pipeline_parallel_size is True, must be a whole"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0, must be over 0 and at most"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization is 'most', must be a number"),
        ({"slo_tbt": 0}, "slo_tbt is 0, must be over 0 and finite"),
        ({"slo_tbt": float("nan")}, "slo_tbt is nan, must be over 0 and finite"),
        ({"slo_tbt": "1s"}, "slo_tbt is '1s', must be a number"),
        ({"dtype": "fp8"}, "dtype is 'fp8', must be one of auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "device is 'tpu', must be one of auto, cpu, cuda"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"max_model_len": 1}, "max_model_len is 1, must be at least 2"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override is 0"),
        ({"num_gpu_blocks_override": 4, "kv_cache_memory_bytes": 4}, "both size the KV pool"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1, must be true or false"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, f"seed is {2**63}, must be at most {2**63 - 1}"),
        ({"max_num_batched_tokens": 2**31}, f"is {2**31}, must be at most {2**31 - 1}"),
        ({"num_gpu_blocks_override": 2**70}, f"is {2**70}, must be at most {2**31 - 1}"),
        ({"kv_cache_memory_bytes": 2**63}, f"is {2**63}, must be at most {2**63 - 1}"),
        ({"pipeline_layers": [16, 14]}, "pipeline_layers lists 2 stages"),
        ({"pipeline_layers": "16;14"}, "must be whole numbers, such as 16,14"),
        ({"pipeline_layers": [-1, 31], "pipeline_parallel_size": 2}, "pipeline_layers has -1"),
        ({"launcher": "slurm"}, "launcher is 'slurm'"),
        ({"launcher": "external"}, "control is not set"),
        ({"control": "localhost"}, "control is 'localhost', not HOST:PORT"),
        ({"control": "localhost:99999"}, "control is 'localhost:99999', not HOST:PORT"),
        ({"polcy": "uniform"}, "unknown key 'polcy'; did you mean 'policy'?"),
        ({"model": ""}, "model is empty"),
    ],
)
def test_a_wrong_value_names_itself_and_the_remedy(values, message):
    with pytest.raises(ConfigError) as caught:
        make_config({"model": "m"}, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_model():
    with pytest.raises(ConfigError, match="no model"):
        make_config({}, {})


def test_overrides_win_over_the_recipe():
    recipe = {"model": "a", "block_size": 8, "max_num_seqs": 2}
    config = make_config(recipe, {"model": "b", "max_num_seqs": 3})
    assert (config.model, config.block_size, config.max_num_seqs) == ("b", 8, 3)
    assert recipe == {"model": "a", "block_size": 8, "max_num_seqs": 2}


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("policy", POLICIES)
def test_a_recipe_takes_every_policy(name, policy):
    """Its budget holds for policies of its own kind; the other kind has its own."""
    recipe = load_recipe(name)
    config = make_config(recipe, {"policy": policy})
    traits = POLICIES[policy].traits
    budget = config.batched_tokens(traits.whole_prompts, max_model_len=4096)
    assert budget == (4096 if traits.whole_prompts else recipe.get("max_num_batched_tokens", 512))


def test_where_the_run_does_not_say_the_policy_says_who_goes_first():
    orders = {name: RunConfig(model="m", policy=name).serving_order for name in POLICIES}
    assert orders.pop("uniform") == "sjf"
    assert set(orders.values()) == {"fcfs"}, "those of others are as published"
    assert RunConfig(model="m", order="fcfs").serving_order == "fcfs"


def test_a_budget_is_kept_where_it_was_given_for_the_policy():
    cut = {"model": "m", "max_num_batched_tokens": 384}
    whole = {**cut, "policy": "vllm", "max_num_batched_tokens": 8192}

    def budget(recipe, **overrides):
        return make_config(recipe, overrides).max_num_batched_tokens

    assert budget(cut, policy="vllm", max_num_batched_tokens=9) == 9
    assert budget(cut, policy="sarathi_serve") == budget(cut) == 384
    assert budget(whole) == budget(whole, policy="orca") == 8192
    assert budget(whole, policy="sarathi_serve") is None
    assert budget({**cut, "policy": "vllm"}) == 384  # as the recipe itself says
    assert cut["max_num_batched_tokens"] == 384


def test_what_a_flag_replaces_takes_with_it_what_was_said_for_the_old_value():
    recipe = {"model": "m", "pipeline_parallel_size": 2, "pipeline_layers": "16,14",
              "num_gpu_blocks_override": 9}  # fmt: skip
    assert make_config(recipe, {"pipeline_parallel_size": 3}).pipeline_layers is None
    assert make_config(recipe, {"pipeline_parallel_size": 2}).pipeline_layers == (16, 14)
    config = make_config(recipe, {"kv_cache_memory_bytes": 10**9})
    assert (config.kv_cache_memory_bytes, config.num_gpu_blocks_override) == (10**9, None)
    with pytest.raises(ConfigError, match="lists 2 stages"):
        make_config(recipe, {"pipeline_parallel_size": 3, "pipeline_layers": "16,14"})


@pytest.mark.parametrize("layers", ["16,14", [16, 14], (16, 14), "16, 14"])
def test_layers_as_text_or_list(layers):
    config = make_config({}, {"model": "m", "pipeline_parallel_size": 2, "pipeline_layers": layers})
    assert config.pipeline_layers == (16, 14)


def test_recipe_from_a_file_with_dashes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: here\npipeline-parallel-size: 3\n")
    assert load_recipe(str(path)) == {"model": "here", "pipeline_parallel_size": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\npipline_parallel_size: 2\n", "did you mean 'pipeline_parallel_size'?"),
        ("- model\n", "a recipe is `key: value` lines"),
        ("", "a recipe is `key: value` lines"),
        ("model: [\n", "not YAML"),
        ("\xff", "utf-8"),
    ],
)
def test_a_wrong_recipe_names_its_file(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipes(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'smollm2-2stage'"):
        load_recipe("smolm2-2stage")
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(str(tmp_path / "none.yaml"))
