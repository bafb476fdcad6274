"""Chat templates without transformers: the texts that transformers makes of them."""

import json

import pytest
from chat_templates import CONVERSATIONS, OPTIONS, TEMPLATES
from fake_client import byte_tokenizer
from hypothesis import given, settings

from pipeserve.errors import ConfigError
from pipeserve.frontend.plain_tokenizer import load_plain
from pipeserve.frontend.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and transformers' tokenizer of one folder."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"), chat_template=None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<eos>"}))
    return load_plain(folder), Tokenizer(folder)._full


def told(tokenizer, messages, **options):
    """The text, or what was raised."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        is_theirs = "continue_final_message" in str(error)
        return "continue_final_message" if is_theirs else f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(messages=CONVERSATIONS, options=OPTIONS)
def test_texts_are_transformers(both, name, messages, options):
    ours, theirs = (told(each, messages, chat_template=TEMPLATES[name], **options) for each in both)
    assert ours == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
        "{{ namespace.__init__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ tojson.__globals__ }}{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ strftime_now.__func__ }}",
    ],
)
def test_a_template_stays_in_its_sandbox(both, template):
    ours, theirs = (told(each, HI, chat_template=template) for each in both)
    assert ours.startswith("SecurityError") == theirs.startswith("SecurityError")
    assert ours in ("", theirs) or ours.startswith(("SecurityError", "UndefinedError"))


class Dangerous:
    def write(self, path):
        raise AssertionError("it was called")


def test_what_is_no_json_is_its_types_name(both):
    """Of Python's API: an image has methods that write files."""
    messages = [{"role": "user", "content": "a", "image": Dangerous(), "many": (1, [Dangerous()])}]
    shows = "{{ messages[0].image }}{{ messages[0].many }}"
    ours, theirs = (told(each, messages, chat_template=shows) for each in both)
    assert ours == theirs == "<Dangerous>(1, ['<Dangerous>'])"
    calls = "{{ messages[0].image.write('x') }}"
    ours, theirs = (told(each, messages, chat_template=calls) for each in both)
    assert ours == theirs and ours.startswith("UndefinedError")


@pytest.mark.parametrize(
    ("files", "config", "wanted"),
    [
        ({}, "own", "own"),
        ({}, [{"name": "default", "template": "own"}, {"name": "tool_use", "template": "t"}],
         {"default": "own", "tool_use": "t"}),
        ({"chat_template.jinja": "file"}, "own", "file"),
        ({"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}, "own",
         {"default": "file", "rag": "rag"}),
        ({"additional_chat_templates/rag.jinja": "rag"}, "own", {"rag": "rag"}),
        ({}, None, None),
    ],
)  # fmt: skip
def test_where_templates_lie(tmp_path, files, config, wanted):
    folder = byte_tokenizer(tmp_path, chat_template=None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": config}))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    plain, full = load_plain(folder), Tokenizer(folder)._full
    assert plain.chat_template == full.chat_template == wanted
    for options in ({}, {"tools": [{}]}, {"chat_template": "rag"}, {"chat_template": "{{ 7 }}"}):
        ours, theirs = (told(each, HI, **options) for each in (plain, full))
        assert ours == theirs or (ours.startswith("ValueError") and theirs.startswith("ValueError"))


def test_what_goes_wrong_is_one_line(tmp_path):
    tokenizer = Tokenizer(byte_tokenizer(tmp_path, chat_template="{{ messages[0].content }}"))
    with pytest.raises(ConfigError) as error:
        options = {"add_generation_prompt": False, "continue_final_message": True}
        tokenizer.encode_chat([{"role": "user", "content": None}], **options)
    told = str(error.value)
    assert "no content to go on with" in told and "\n" not in told
