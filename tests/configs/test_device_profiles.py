"""Device profiles and model shapes as YAML: the shipped ones, and every wrong file in one line."""

from dataclasses import replace

import pytest
import yaml

from pipeserve.configs.device_profiles import load_profile, profile_names, save_profile
from pipeserve.configs.model_shapes import load_shape, shape_names
from pipeserve.core.cost.kernels import Tables
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.work import Work
from pipeserve.errors import ConfigError

# Billions of parameters and bytes of KV a token at 2 bytes a value, as the papers have them.
PUBLISHED = {
    "codellama-34b": (33.7, 196_608),
    "falcon-180b": (179.5, 163_840),
    "falcon-40b": (41.8, 122_880),
    "gpt3-175b": (174.6, 4_718_592),
    "internlm-20b": (20.1, 1_228_800),
    "llama-13b": (13.0, 819_200),
    "llama-33b": (32.5, 1_597_440),
    "llama2-70b": (69.0, 327_680),
    "llama2-7b": (6.74, 524_288),
    "llama3-8b": (8.03, 131_072),
    "mistral-7b": (7.24, 131_072),
    "mixtral-8x7b": (46.7, 131_072),
    "opt-13b": (12.9, 819_200),
    "opt-175b": (174.6, 4_718_592),
    "opt-66b": (65.7, 2_359_296),
    "smollm2-135m": (0.1345, 23_040),
    "yi-34b": (34.4, 245_760),
}


def test_every_shape_has_its_published_size():
    assert set(shape_names()) == set(PUBLISHED)
    for name, (billions, kv_bytes) in PUBLISHED.items():
        shape = load_shape(name)
        assert shape.name == name
        assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.005), name
        assert shape.kv_bytes_per_token == kv_bytes, name
        assert shape.parallel_attention == name.startswith("falcon"), name


def test_gpt3_leaves_room_for_the_batches_of_sarathi():
    """11 requests of 4,096 tokens at TP8, 27 a microbatch at TP8 x PP8, with 90 % of the memory."""
    shape, memory = load_shape("gpt3-175b"), 0.9 * load_profile("a100-80gb-dgx").memory_bytes
    per_request = 4096 * shape.kv_bytes_per_token
    weights = shape.num_parameters * shape.bytes_per_value
    assert (8 * memory - weights) // per_request == 11
    assert (64 * memory - weights) // per_request // 8 == 27


def test_every_shipped_profile_says_where_it_is_from_and_predicts():
    assert profile_names() == ["a100-80gb-dgx", "nc96ads-a100-v4"]
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert {"linear", "attention", "all-reduce", "links"} <= set(profile.provenance)
        assert all(profile.provenance.values())
        assert 0 < profile.residuals.jitter < profile.residuals.linear < 0.2
        for size in (1, 2, 4, 8):
            cost = PipelineCost(profile, load_shape("falcon-180b"), split_layers(80, 2), size)
            hybrid = Work(512, 32, ((1536, 480),), 32, 32 * 2048)
            assert 0.01 < cost.seconds(hybrid)[0] < 1


def test_falcon_takes_what_sarathi_serve_reports():
    """ "Falcon-180B, one 4k prompt: about 1,150 ms" at TP4 x PP2 on NC96ads nodes (OSDI'24)."""
    profile, shape = load_profile("nc96ads-a100-v4"), load_shape("falcon-180b")
    cost = PipelineCost(profile, shape, split_layers(80, 2), 4)
    assert cost.seconds(Work(4096, 1, ((0, 4096),), 0, 0))[0] == pytest.approx(1.15, rel=0.05)


def test_257_tokens_cost_a_tile_more_than_256():
    profile, shape = load_profile("a100-80gb-dgx"), load_shape("llama2-70b")
    cost = PipelineCost(profile, shape, split_layers(80, 8))

    def seconds(tokens):
        return cost.seconds(Work(tokens, 0, ((0, tokens),), 0, 0))[1]

    assert seconds(257) / seconds(256) > 1.3
    assert seconds(384) / seconds(257) < 1.03
    assert seconds(256) / seconds(255) < 1.01


# ---- files --------------------------------------------------------------------------------------


def text_with(change) -> str:
    """A shipped profile's YAML after `change(mapping)`."""
    import pipeserve.configs.device_profiles as home

    path = home._FOLDER / "a100-80gb-dgx.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    return yaml.safe_dump(values)


def test_saved_and_loaded_again(tmp_path):
    tables = Tables(
        model="m",
        dtype="float32",
        threads=2,
        layer=((1, 1e-3),),
        head=((1, 1e-3),),
        embedding=((1, 5e-6), (64, 1e-4)),
    )
    profile = replace(load_profile("nc96ads-a100-v4"), kernels=None, tables=tables, host_s=2.5e-4)
    path = tmp_path / "mine.yaml"
    save_profile(profile, path, "made by a test\non two lines")
    assert path.read_text().startswith("# made by a test\n# on two lines\n")
    assert load_profile(str(path)) == profile


def put(*keys, value):
    def change(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("host_sec", value=1), "unknown key 'host_sec'; did you mean 'host_s'?"),
        (
            put("kernels", "gemm", "flop_per_s", value=1),
            "kernels.gemm: unknown key 'flop_per_s'; did",
        ),
        (lambda v: v.pop("attention"), "attention is missing"),
        (lambda v: v["kernels"]["gemm"].pop("norm"), "kernels.gemm.norm is missing"),
        (put("memory_bytes", value="80GB"), "memory_bytes is '80GB', must be a whole number"),
        (put("memory_bytes", value=8.5), "memory_bytes is 8.5, must be a whole number"),
        (put("devices_per_node", value=True), "devices_per_node is True, must be a whole number"),
        (put("devices_per_node", value=0), "devices_per_node is 0, must be at least 1"),
        (put("host_s", value=-1), "host_s is -1.0, must be finite and 0 or more"),
        (put("host_s", value=float("nan")), "host_s is nan, must be finite"),
        (
            put("intra_node", "bytes_per_s", value=0),
            "intra_node.bytes_per_s is 0.0, must be finite and",
        ),
        (put("intra_node", value=3), "intra_node must be `key: value` lines"),
        (put("name", value=3), "name is 3, must be text"),
        (put("provenance", value={"date": 1}), "provenance must be `key: text` lines"),
        (put("all_reduce", value=3), "all_reduce must be a list"),
        (
            put("all_reduce", 0, "points", 1, value=[1, 2, 3]),
            "all_reduce[0].points[1] has 3 values",
        ),
        (put("all_reduce", 0, "points", 0, value=[10**9, 1.0]), "points must increase"),
        (put("kernels", value=None), "both kernels and tables, or neither"),
    ],
)
def test_a_wrong_profile_names_its_file_key_and_remedy(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text_with(change))
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1", "the file must be"), ("\xff", "utf-8")]
)
def test_not_a_profile_at_all(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))


def test_numbers_as_people_write_them(tmp_path):
    """YAML takes 5e-6 for text, and 1 is a number of seconds too."""
    path = tmp_path / "mine.yaml"
    path.write_text(text_with(put("host_s", value=1)).replace("host_s: 1", "host_s: 5e-6"))
    assert load_profile(str(path)).host_s == 5e-6


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match="no device profile 'a100-dgx'; did you mean 'a100-80gb-dgx'"
    ):
        load_profile("a100-dgx")
    with pytest.raises(
        ConfigError, match="no model shape 'falcon180b'; did you mean 'falcon-180b'"
    ):
        load_shape("falcon180b")
    with pytest.raises(ConfigError, match="no device profile 'x'; known: a100"):
        load_profile("x")
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(str(tmp_path / "none.yaml"))
