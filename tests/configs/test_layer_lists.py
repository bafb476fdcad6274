"""Layers of each stage as users write them."""

import pytest

from pipeserve.configs import make_config
from pipeserve.configs.layer_lists import parse_layers
from pipeserve.configs.recipes import write_recipe
from pipeserve.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("16,14", (16, 14)),
        (" 16, 14 ", (16, 14)),
        ([16, 14], (16, 14)),
        ("Et*16|t*14L", (16, 14)),
        ("Et*3|(tt|)*2t|L", (3, 2, 2, 1, 0)),
        ("Et*16|t*16|t*16|t*12,L", (16, 16, 16, 12)),
        ("Ett|(tt|)*6L", (2, 2, 2, 2, 2, 2, 2, 0)),  # as in public training scripts
        ("'Et|t|(tt|)*29tL'", (1, 1, *[2] * 29, 1)),
        ("E,t*4|t*4|t*4,L", (4, 4, 4)),
        ("E||t|L", (0, 0, 1, 0)),  # Megatron's own example of an empty stage
        ("(Et|)*1tL", (1, 1)),
        ("EtL", (1,)),
        ("auto", "auto"),
        (None, None),
    ],
)
def test_forms_that_are_read(written, layers):
    assert parse_layers(written) == layers


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ("Et*3|(tt|)*29,m|L", "it has m, layers of multi-token prediction"),
        ("tt|tL", "it has to begin with E"),
        ("tE|tL", "it has to begin with E"),
        ("Et|EtL", "it has to begin with E"),
        ("|Et|tL", "E has to be in the first stage"),
        ("Et|tL|", "L in the last"),
        ("Et|t", "it has to end with L"),
        ("Et|tLt", "it has to end with L"),
        ("Etx|L", "it has 'x'; known are E the embedding, t a layer, L the head"),
        ("Et*99999999|L", "it has over 10000 letters"),
        ("Et*" + "9" * 5000 + "|L", "it has over 10000 letters"),
        ("E((t)*2|)*2L", "parentheses have no others inside"),
        ("E(tt|L", "parentheses"),
        ("Et*|L", "*N has to follow a letter"),
    ],
)
def test_layouts_that_are_refused(layout, why):
    with pytest.raises(ConfigError) as caught:
        parse_layers(layout)
    assert why in str(caught.value) and "give one such as" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pipeline_layers": "16;14"}, "must be whole numbers, such as 16,14, a layout"),
        ({"pipeline_layers": "autos"}, "cannot be read"),
        ({"pipeline_layers": "Et|(t|)*3L"}, "lists 5 stages, pipeline_parallel_size is 2"),
        ({"pipeline_layers": "Et|t|t|tL"}, "there are no virtual stages"),
        ({"pipeline_layers": [16.0, 14]}, "must be whole numbers"),
        ({"stage_slowdown": "1,fast"}, "must be numbers, such as 1,1.5"),
        ({"stage_slowdown": "1"}, "stage_slowdown lists 1 stages"),
        ({"stage_slowdown": [1, 0.0]}, "stage_slowdown has 0.0; give numbers over 0"),
        ({"stage_slowdown": "1,nan"}, "give numbers over 0"),
        ({"stage_slowdown": "1,inf"}, "give numbers over 0"),
    ],
)
def test_a_run_takes_no_other(options, why):
    with pytest.raises(ConfigError) as caught:
        make_config({}, {"model": "m", "pipeline_parallel_size": 2, **options})
    assert why in str(caught.value)


def test_a_recipe_says_them_as_it_was_told():
    for layers in ("16,14", "auto"):
        options = {"model": "m", "pipeline_parallel_size": 2, "pipeline_layers": layers}
        config = make_config({}, {**options, "stage_slowdown": "1,1.5"})
        text = write_recipe(config, (), "")
        assert f"pipeline_layers: {layers}" in text.replace("'", "")
        assert "stage_slowdown: 1.0,1.5" in text.replace("'", "")
