"""Text that grows token by token: whole characters, as soon as they are, at the same cost each."""

import json
from itertools import product

import pytest
from fake_client import EOS, byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeserve.errors import ConfigError
from pipeserve.frontend.detokenizer import Detokenizer
from pipeserve.frontend.plain_tokenizer import load_plain
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As Llama 2's: words begin with a mark for the space before, unknown letters are bytes.
    0 is special, 1 to 3 are words, 4 to 259 bytes."""
    return _sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


def _sentencepiece(folder):
    words = [
        "<unk>",
        "\u2581Hello",
        "\u2581world",
        "!",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    backend = Backend(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """Byte-level, with a step behind it: what bytes a token has is not known."""
    folder = byte_tokenizer(tmp_path_factory.mktemp("hidden"))
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["decoder"] = {"type": "Sequence", "decoders": [state["decoder"], {"type": "Fuse"}]}
    path.write_text(json.dumps(state))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """Without a decoder: tokens are joined by spaces. 0 and 1 are words, 2 and 3 special."""
    folder = tmp_path_factory.mktemp("spaced")
    backend = Backend(models.WordLevel(vocab={"a": 0, "b": 1}, unk_token="a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return Tokenizer(folder)


def _pieces(tokenizer, prompt, token_ids, **params):
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**params))
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.flush()]


def test_encode_and_decode(tokenizer):
    assert tokenizer.encode("a\u00e9") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 0xA9, EOS]) == "a\u00e9"


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizer):
    assert _pieces(tokenizer, [97], b"x\xf0\x9f\x8e\x89y") == [
        "x", "", "", "", "\U0001f389", "y", "",
    ]  # fmt: skip


def test_a_character_cut_short_is_replaced_at_the_end(tokenizer):
    assert _pieces(tokenizer, [97], b"x\xf0\x9f") == ["x", "", "", "\ufffd"]


def test_a_character_that_the_prompt_began(tokenizer):
    assert "".join(_pieces(tokenizer, b"ab\xc3", b"\xa9z")) == "\u00e9z"


@settings(max_examples=150, deadline=None)
@example(text="", prompt="\ufffd")
@example(text="x\ufffd", prompt="a\ufffd")
@given(text=st.text(max_size=12), prompt=st.text(min_size=1, max_size=8))
def test_pieces_join_to_the_whole_text(tokenizer, prompt, text):
    prompt, encoded = prompt.encode(), text.encode()
    pieces = _pieces(tokenizer, prompt, encoded)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=12))
def test_any_bytes_join_to_what_a_decoder_makes_of_all(tokenizer, data):
    assert "".join(_pieces(tokenizer, b"p", data)) == tokenizer.decode(list(data))


def test_spaces_between_words_survive_sentencepiece(sentencepiece):
    assert sentencepiece.decode([1, 2]) == "Hello world"
    # After a prompt, the first word keeps the space in front of it.
    assert _pieces(sentencepiece, [1], [2, 3]) == [" world", "!", ""]


def test_byte_fallback_characters_are_whole(sentencepiece):
    euro = [4 + byte for byte in "\u20ac".encode()]
    assert _pieces(sentencepiece, [1], [*euro, *euro, 3]) == [
        "", "", "\u20ac", "", "", "\u20ac", "!", "",
    ]  # fmt: skip


def test_special_tokens_are_no_text(tokenizer):
    assert _pieces(tokenizer, [97], [EOS, 98, EOS]) == ["", "b", "", ""]


def test_a_folder_without_tokenizer_serves_ids(tmp_path):
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.exists
    assert _pieces(tokenizer, [1], [2, 3]) == ["", "", ""]
    with pytest.raises(ConfigError, match="no tokenizer"):
        tokenizer.encode("a")


def test_a_broken_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        Tokenizer(tmp_path).encode("a")
    assert "\n" not in str(caught.value)


def test_chat_template(tokenizer, tmp_path):
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert bytes(ids) == b"user: hi\nassistant: "
    without = Tokenizer(byte_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(ConfigError, match="no chat template"):
        without.encode_chat([{"role": "user", "content": "hi"}])


def test_chat_template_that_refuses(tmp_path):
    template = "{{ raise_exception('roles must\nalternate') }}"
    tokenizer = Tokenizer(byte_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


# ---- bytes that are no text ---------------------------------------------------------------------


def _may_become_whole(data):
    """Whether bytes that follow can make the end of `data` a character: all are tried that matter
    (the least and the greatest of each range that UTF-8 tells apart)."""
    for size in range(1, min(3, len(data)) + 1):
        for num_more in range(1, 4):
            for more in product((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF), repeat=num_more):
                try:
                    whole = (data[-size:] + bytes(more)).decode()
                except UnicodeDecodeError:
                    continue
                if len(whole) == 1:
                    return size
    return 0


_odd_bytes = st.lists(
    st.sampled_from([0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC1, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xFF]),
    max_size=10,
)


@settings(max_examples=200, deadline=None)
@given(data=_odd_bytes.map(bytes))
def test_bytes_are_let_go_as_soon_as_nothing_can_complete_them(tokenizer, data):
    detokenizer, shown = Detokenizer(tokenizer, [97]), ""
    for size in range(1, len(data) + 1):
        shown += detokenizer.push(data[size - 1])
        num_held = _may_become_whole(data[:size])
        assert shown == tokenizer.decode(list(data[: size - num_held]))
    assert shown + detokenizer.flush() == tokenizer.decode(list(data))


def _said_by_sentencepiece(token_ids):
    """As the library itself: of a run of bytes each that is in no character is replaced."""
    text, run = "", b""
    for token in [*(token for token in token_ids if token), None]:  # 0 is special
        if token is not None and token >= 4:
            run += bytes([token - 4])
            continue
        while run:
            for size in range(min(4, len(run)), 0, -1):
                try:
                    char = run[:size].decode()
                except UnicodeDecodeError:
                    continue
                if len(char) == 1:
                    break
            else:
                size, char = 1, "\ufffd"
            text, run = text + char, run[size:]
        text += {1: " Hello", 2: " world", 3: "!"}.get(token, "")
    return text


@settings(max_examples=300, deadline=None)
@given(
    token_ids=st.lists(
        st.one_of(st.integers(0, 3), _odd_bytes.filter(bool).map(lambda data: data[0] + 4)),
        max_size=12,
    ),
    words=st.lists(st.integers(0, 3), max_size=3),
)
def test_words_and_bytes_of_sentencepiece(sentencepiece, words, token_ids):
    expected = _said_by_sentencepiece(token_ids)
    assert "".join(_pieces(sentencepiece, [1, *words], token_ids)) == expected
    if "\ufffd" not in expected:
        prompt = sentencepiece.decode([1, *words])
        assert sentencepiece.decode([1, *words, *token_ids]) == prompt + expected


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece", "hidden"])
@pytest.mark.parametrize("token", [0x80, 0xFF, 0xE2, 0x6F])
def test_a_token_costs_the_same_however_many_came_before(request, monkeypatch, name, token):
    """sglang#34852: the same byte over and over, whether it is a character or none."""
    tokenizer, widest = request.getfixturevalue(name), 0

    def decode(token_ids, skip_special_tokens=True):
        nonlocal widest
        widest = max(widest, len(token_ids))
        return Tokenizer.decode(tokenizer, token_ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", decode)
    token += 4 * (name == "sentencepiece")
    detokenizer = Detokenizer(tokenizer, [token] * 8)
    pieces = [detokenizer.push(token) for _ in range(400)]
    assert widest <= 10
    assert any(pieces[:4])  # it flows from the beginning
    monkeypatch.undo()
    assert len("".join(pieces) + detokenizer.flush()) == 400


def test_a_character_of_a_tokenizer_whose_bytes_are_not_known(hidden):
    assert hidden.hides_bytes
    assert _pieces(hidden, [97], "a\u20acb".encode()) == ["a", "", "", "\u20ac", "b", ""]
    assert "".join(_pieces(hidden, [97], b"\xe2\x82")) == "\ufffd"


def test_added_tokens_are_decoded_as_the_tokenizer_does(tmp_path):
    """In byte-level BPE an added token is its own text, or bytes where each letter of it is one."""
    folder = byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(folder)
    loaded = tokenizer._loaded = tokenizer._full
    loaded.add_tokens(["caf\u00e9", "a b", "\u20ac", "\u0120x", "<think>"])
    ids = [97, *range(257, len(loaded)), 98, 99999]
    assert "".join(_pieces(tokenizer, [97], ids)) == loaded.decode(ids[:-1])


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece", "hidden"])
def test_ids_that_the_tokenizer_does_not_have(request, name):
    """vllm#44682: a model has more rows than its tokenizer has tokens; in the prompt, too."""
    tokenizer = request.getfixturevalue(name)
    words = {"sentencepiece": [2, 3]}.get(name, b"ab")
    assert (
        "".join(_pieces(tokenizer, [1, 5000, 6000], [words[0], 5000, words[1], 6000]))
        == (tokenizer.decode([1, *words])[len(tokenizer.decode([1])) :])
    )


def test_text_behind_broken_bytes(sentencepiece):
    """vllm#17448: three bytes of a character and then a word is "Invalid prefix" to tokenizers."""
    ids = [4 + byte for byte in b"\xf0\x9f\x8e"]
    assert _pieces(sentencepiece, [1], [*ids, 2, *ids, 3]) == [
        "", "", "", "\ufffd\ufffd\ufffd world", "", "", "", "\ufffd\ufffd\ufffd!", "",
    ]  # fmt: skip


# ---- special tokens ------------------------------------------------------------------------------


def test_special_tokens_are_text_where_that_is_wanted(tokenizer, sentencepiece):
    shown = {"skip_special_tokens": False}
    assert _pieces(tokenizer, [97], [98, EOS, 99], **shown) == ["b", "<eos>", "c", ""]
    # tokenizers' own decoding of all: no space is lost or made by the special token.
    ids = [2, 0, 2, 3]
    assert "".join(_pieces(sentencepiece, [1], ids, **shown)) == " world<unk> world!"
    assert "".join(_pieces(sentencepiece, [1], ids)) == " world world!"


def test_a_character_goes_on_behind_a_special_token_that_is_left_out(tokenizer):
    assert _pieces(tokenizer, [97], [0xC3, EOS, 0xA9]) == ["", "", "\u00e9", ""]
    shown = _pieces(tokenizer, [97], [0xC3, EOS, 0xA9], skip_special_tokens=False)
    assert shown == ["", "\ufffd<eos>", "\ufffd", ""]


def test_the_space_in_front_survives_a_prompt_that_ends_with_special_tokens(sentencepiece):
    assert "".join(_pieces(sentencepiece, [1, *[0] * 9], [2])) == " world"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, " a b"),
        ({"skip_special_tokens": False}, " a <s> </s> b <s>"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False},
         " a <s></s> b <s>"),
        ({"spaces_between_special_tokens": False}, " a b"),
    ],
)  # fmt: skip
def test_spaces_between_special_tokens(spaced, params, text):
    start, end = spaced.encode("<s></s>")
    pieces = _pieces(spaced, [0], [0, start, end, 1, start], **params)
    assert "".join(pieces) == text


# ---- without transformers -----------------------------------------------------------------------

TEXTS = ["Hello world!", " a  b ", "caf\u00e9 \u20ac", "", "<s>a</s>Hello<unk>"]


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece", "spaced"])
def test_tokenizers_alone_do_the_same(request, name):
    known = request.getfixturevalue(name)
    plain, full = load_plain(known.folder), known._full
    assert plain is not None
    for text, special in product(TEXTS, (False, True)):
        ids = plain.encode(text, add_special_tokens=special)
        assert ids == full.encode(text, add_special_tokens=special)
        for skip in (False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert plain.decode(ids, **options) == full.decode(ids, **options)
    assert plain.get_vocab() == full.get_vocab() and plain.eos_token_id == full.eos_token_id
    assert {n: (str(t), t.special) for n, t in plain.added_tokens_decoder.items()} == {
        n: (str(t), t.special) for n, t in full.added_tokens_decoder.items()
    }
    assert json.loads(plain.backend_tokenizer.to_str()) == json.loads(
        full.backend_tokenizer.to_str()
    )
    assert plain.special_tokens_map == full.special_tokens_map
    assert plain.chat_template == full.chat_template
    assert plain.model_max_length == full.model_max_length
    assert plain.transformers_class == type(full).__name__


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": None},
        {"add_bos_token": True},
        {"eos_token": "nobody"},
        {"eos_token": "a"},  # a word, which transformers would make special
        {"extra_special_tokens": {"image": "<image>"}},
        {"added_tokens_decoder": {"900": {"content": "<new>"}}},
        {"image_token": "<image>"},
        {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
        {"extra_special_tokens": 5},
        {"chat_template": 5},
    ],
)
def test_what_takes_transformers(tmp_path, changes):
    folder = byte_tokenizer(tmp_path, chat_template=None)
    assert load_plain(folder) is not None
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert load_plain(folder) is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_older_files_count_where_the_newer_one_lists_nothing(tmp_path, name):
    folder = byte_tokenizer(tmp_path)
    (folder / name).write_text("{}")
    assert load_plain(folder) is None
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": {}}))
    assert load_plain(folder) is not None
