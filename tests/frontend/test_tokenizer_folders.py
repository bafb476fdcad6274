"""Tokenizers as people have them in a model's folder: whole, odd, broken, or with code of its own.

No code of a folder is ever run, nothing is asked, and what a library raises is one line.
"""

import json
import sys
from pathlib import Path

import pytest
import sentencepiece
from checkpoints import edit_config, tiny
from fake_client import byte_tokenizer

from pipeserve.errors import ConfigError
from pipeserve.frontend.tokenizer import Tokenizer

SENTENCES = ["The capital of France is Paris.", "How are you? I am well.", "One, two, three!"]


def folder_of(name, folder, **config) -> Path:
    """A tiny checkpoint whose tokenizer.json has a token for each byte, and nothing beside it."""
    tiny(name, folder)
    if config:
        edit_config(folder, **config)
    byte_tokenizer(folder, None)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, text: str = "The sea") -> str:
    with pytest.raises(ConfigError) as caught:
        Tokenizer(folder).encode(text)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# ---- what a library raises ----------------------------------------------------------------------

BROKEN = {
    "model of the future (unsloth#1059)": {"model": {"type": "BPEFuture", "vocab": {}}},
    "pre-tokenizer of the future": {"pre_tokenizer": {"type": "Future"}},
    "pattern that is none": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}
    },
    "panic": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_tokenizer_that_the_library_does_not_know(tmp_path, what):
    folder = folder_of("llama", tmp_path)
    edit_json(folder / "tokenizer.json", **BROKEN[what])
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\x00"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"auto_map": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": [null, null]}}'),
        ("special_tokens_map.json", '{"eos_token": 5}'),
        ("tokenizer.model", "nonsense"),
        ("tokenizer.model", ""),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path, name, content):
    folder = folder_of("llama", tmp_path)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(content)
    refusal(folder)


@pytest.mark.parametrize("text", ["a\ud800b", 7, None, ["a", 7]])
def test_a_text_that_is_none(tmp_path, text):
    refusal(folder_of("llama", tmp_path), text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ 'a' * 3 ** 100 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no\nway') }}",
    ],
)
def test_a_chat_template_that_fails(tmp_path, monkeypatch, template):
    folder = folder_of("llama", tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="chat template refuses these messages: ") as caught:
        Tokenizer(folder).encode_chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# ---- code of the folder's own -------------------------------------------------------------------

CODE = """
open({ran!r}, "w")
from transformers import PreTrainedTokenizerFast
class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}


class Answers:
    """Standard input that says yes, and remembers that it was asked."""

    def __init__(self):
        self.asked = False

    def readline(self):
        self.asked = True
        return "y\n"


@pytest.fixture
def with_code(tmp_path, monkeypatch, capfd):
    """(model, its tokenizer_config.json, more of its config.json) -> its folder, with code."""
    answers = Answers()
    monkeypatch.setattr(sys, "stdin", answers)

    def make(name, tokenizer_config, **config):
        folder = folder_of(name, tmp_path / "model", **config)
        for module in ("tokenization_my", "configuration_my", "modeling_my"):
            (folder / f"{module}.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return folder

    yield make
    assert not (tmp_path / "ran").exists()
    assert not answers.asked
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "tokenizer_config",
    [
        {"auto_map": OWN},
        {"auto_map": OWN, "tokenizer_class": "MyTokenizer"},
        {"auto_map": OWN["AutoTokenizer"]},
        {"auto_map": {"AutoTokenizer": ["org/name--tokenization_my.MyTokenizer", None]}},
        {"auto_map": {"AutoTokenizer": [None, "tokenization_my.MyTokenizer"]}},
    ],
)
def test_a_class_that_transformers_has_not(with_code, tokenizer_config):
    """The class is named; transformers would ask whether to run it."""
    message = refusal(with_code("llama", tokenizer_config))
    assert "own class" in message and "tokenization_my.MyTokenizer" in message
    assert "never run" in message and "trust_remote_code" not in message


@pytest.mark.parametrize(
    ("name", "tokenizer_config"),
    [
        ("llama", {"auto_map": OWN, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ("falcon_multi_query", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("falcon_multi_query", {}),
        ("qwen2", {"auto_map": OWN}),
        ("opt", {"auto_map": OWN, "tokenizer_class": "MyTokenizer"}),
    ],
)
def test_a_class_that_transformers_has(with_code, name, tokenizer_config):
    """By the tokenizer's name or the model's; falcon-7b's config.json has an auto_map too."""
    own = {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModelForCausalLM": "modeling_my.MyModel",
        "AutoTokenizer": "tokenization_my.MyTokenizer",
    }
    folder = with_code(name, tokenizer_config, auto_map=own)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("The sea")) == "The sea"


# ---- sentencepiece alone ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "phi3", "gemma2"])
def test_sentencepiece_alone(tmp_path, name, kind):
    """transformers#36322: no tokenizer.json, no tokenizer_config.json."""
    tiny(name, tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type=kind,
        add_dummy_prefix=name != "gemma2",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("The capital", "How are you? Three, two, one!", "I am Paris"):
        ids = tokenizer.encode(text)
        without_begin = ids[1:] if ids[0] == plain.bos_id() else ids
        assert without_begin == plain.encode(text)
        assert tokenizer.decode(ids) == text
