"""Text that grows token by token: whole characters only, and stop strings that span tokens."""

import pytest
from fake_driver import EOS, byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeserve.detokenizer import Detokenizer
from pipeserve.errors import ConfigError
from pipeserve.stop_strings import StopStrings
from pipeserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As Llama 2's: words begin with a mark for the space before, unknown letters are bytes."""
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
    folder = tmp_path_factory.mktemp("sentencepiece")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return Tokenizer(folder)


def _pieces(tokenizer, prompt, token_ids):
    detokenizer = Detokenizer(tokenizer, prompt)
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


def test_stop_string_over_three_pieces():
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("abS", "TO", "Pxyz")] == ["ab", "", ""]
    assert stops.found


def test_held_back_text_comes_when_it_was_no_stop_string():
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("aST", "Sb", "S")] == ["a", "STSb", ""]
    assert stops.flush() == "S" and not stops.found


def test_the_earliest_of_several_stop_strings():
    stops = StopStrings(["yy", "x"])
    assert stops.push("abxyy") == "ab"


_letters = st.text(alphabet="ab", max_size=12)


@given(pieces=st.lists(_letters, max_size=8), stop=st.lists(_letters.filter(bool), max_size=3))
def test_stop_strings_against_the_whole_text(pieces, stop):
    stops, shown = StopStrings(stop), ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.found:
            break
    shown += stops.flush()
    assert _is_cut_rightly(shown, "".join(pieces), stop, stops.found)


def _is_cut_rightly(shown, text, stop, found):
    if not found:
        return shown == text and not any(s in text for s in stop)
    return (
        text.startswith(shown)
        and not any(s in shown for s in stop)
        and any(text[len(shown) :].startswith(s) for s in stop)
    )
