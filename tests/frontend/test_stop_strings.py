"""Stop strings: what ends a text, however it was cut into tokens, streamed or not."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeserve.core.nouns import Output, Request
from pipeserve.frontend.completion import Generation
from pipeserve.frontend.stop_strings import StopStrings
from pipeserve.sampling_params import SamplingParams


def test_stop_string_over_three_pieces():
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("abS", "TO", "Pxyz")] == ["ab", "", ""]
    assert stops.found


def test_held_back_text_comes_when_it_was_no_stop_string():
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("aST", "Sb", "S")] == ["a", "STSb", ""]
    assert stops.flush() == "S" and not stops.found


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["yy", "x"], "abxyy", "ab"),
        ([" Paris", "ar"], " Paris", " P"),  # vllm#49391: "ar" is complete first
        (["ar", " Paris"], " Paris", " P"),
        (["cd", "abcd", "bcd"], "zabcd", "z"),  # all at once: the one that begins first
        (["aab"], "aaab", "a"),
        (["abab", "aba"], "ababab", ""),
        (["ababba"], "beforeabababbaafter", "beforeab"),  # streamsearch#19
        (["\u4e16a"], "A \u4e16\u4e16ab", "A \u4e16"),
        (["a" * 300], "a" * 299 + "b" + "a" * 300, "a" * 299 + "b"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 400])
def test_which_stop_string_ends_the_text(stop, text, expected, size):
    stops, shown = StopStrings(stop), ""
    for start in range(0, len(text), size):
        shown += stops.push(text[start : start + size])
        if stops.found:
            break
    assert (shown, bool(stops.found)) == (expected, True)


class _Pieces:
    """A tokenizer whose token n is the n-th of some bytes."""

    exists, bytes_are_replaced_singly, special_ids = True, False, frozenset()

    def __init__(self, pieces):
        self._pieces = pieces

    def token_bytes(self, token_id):
        return self._pieces[token_id]


def _ended(pieces, params):
    """(shown piece by piece, number of tokens, finish reason) of a request whose tokens are
    `pieces`."""
    request = Request(id=0, prompt=(0,), params=params)
    generation = Generation(0, 0, {0}, request, _Pieces([b"p", *pieces]))
    shown = []
    for token in range(1, len(pieces) + 1):
        reason = "length" if token == len(pieces) else None
        delta = generation.take(Output(0, token, reason))
        shown.append(delta.text)
        if delta.finish_reason is not None:
            return shown, token, delta.finish_reason
    raise AssertionError("it did not end")


def _expected(pieces, params):
    """The same by the definition: of all places where a stop string lies and that end behind what
    the first `min_tokens` tokens say, the first to end, and of these the first to begin."""
    said = [b"".join(pieces[:count]).decode(errors="ignore") for count in range(len(pieces) + 1)]
    text, num_safe = said[-1], len(said[min(params.min_tokens, len(pieces))])
    places = [
        (start + len(stop), start)
        for stop in params.stop
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > num_safe
    ]
    if not places:
        return text, len(pieces), "length"
    end, start = min(places)
    num_tokens = next(count for count, so_far in enumerate(said) if len(so_far) >= end)
    return text[: end if params.include_stop_str_in_output else start], num_tokens, "stop"


def test_a_stop_string_that_was_shown_in_part_is_found():
    """Where it is kept in the text, nothing of it is held back."""
    params = SamplingParams(stop=("aab",), include_stop_str_in_output=True)
    assert _ended([b"a", b"ab", b"c"], params) == (["a", "ab"], 2, "stop")


_texts = st.text(alphabet="ab\u00e9", min_size=1, max_size=14)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), text=_texts, stop=st.lists(_texts.map(lambda s: s[:4]), max_size=3),
       min_tokens=st.integers(0, 6), include=st.booleans())  # fmt: skip
def test_any_text_any_tokens_any_stop_strings(data, text, stop, min_tokens, include):
    encoded = text.encode()
    cuts = data.draw(st.sets(st.integers(1, len(encoded) - 1))) if len(encoded) > 1 else set()
    bounds = [0, *sorted(cuts), len(encoded)]
    pieces = [encoded[a:b] for a, b in pairwise(bounds)]
    params = SamplingParams(
        stop=tuple(stop), min_tokens=min_tokens, include_stop_str_in_output=include
    )
    shown, num_tokens, reason = _ended(pieces, params)
    assert ("".join(shown), num_tokens, reason) == _expected(pieces, params)
    if not min_tokens:  # then the text alone decides: one token is as good as many
        whole, _, whole_reason = _ended([encoded], params)
        assert ("".join(whole), whole_reason) == ("".join(shown), reason)
    for count in range(1, num_tokens):  # what is held back may be the beginning of a stop string
        so_far = b"".join(pieces[:count]).decode(errors="ignore")
        held = so_far[len("".join(shown[:count])) :]
        assert not held or (not include and any(s.startswith(held) for s in stop))


def test_thousands_of_stop_strings_cost_a_letter_no_more():
    """The automaton is walked once a letter, whatever it was made of."""
    stops = StopStrings([f"stop {number}." for number in range(5000)])
    assert stops.push("stop 12, stop 123, ") == "stop 12, stop 123, "
    assert (stops.push("stop 4711"), stops.push(".")) == ("", "") and stops.found
