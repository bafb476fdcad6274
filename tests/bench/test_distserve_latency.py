"""DistServe's published latency model against figures that its coefficients give by hand."""

import pytest
from published.distserve_latency import FITS, PublishedTimes, published_times

from pipeserve.core.nouns import Chunk, Microbatch, RequestId
from pipeserve.errors import ConfigError


def prompts(*lengths: int) -> Microbatch:
    return Microbatch(
        0, tuple(Chunk(RequestId(i), 0, length, (), None, 1) for i, length in enumerate(lengths))
    )


def decodes(num: int, context: int) -> Microbatch:
    """`context` tokens each, the one that is decoded among them."""
    chunks = (Chunk(RequestId(i), context - 1, context, (), None, 1) for i in range(num))
    return Microbatch(0, tuple(chunks))


def call_ms(num_tokens: int) -> float:
    return 2 + 1e-4 * num_tokens


@pytest.mark.parametrize(
    ("model", "tp", "length", "expected_ms"),
    [
        ("opt-66b", 4, 512, 110),
        ("opt-66b", 4, 756, 150),
        ("opt-66b", 4, 1738, 319),
        ("opt-13b", 1, 512, 73),
    ],
)
def test_prefill_of_one_prompt(model: str, tp: int, length: int, expected_ms: float) -> None:
    (seconds,) = published_times("distserve", model, tp, 1).compute_s(prompts(length))
    assert seconds * 1e3 - call_ms(length) == pytest.approx(expected_ms, abs=0.6)


def test_prefill_squares_each_prompt_and_not_their_sum() -> None:
    times = published_times("distserve", "opt-66b", 4, 1)
    (two,) = times.compute_s(prompts(500, 500))
    by_hand = 29.44164 + 0.1513522 * 1000 + 8.317451e-06 * 2 * 500**2 + 1 + call_ms(1000)
    assert two * 1e3 == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(("batch", "expected_ms"), [(32, 79.5), (128, 121.3)])
def test_decode_over_two_stages(batch: int, expected_ms: float) -> None:
    first, second = published_times("distserve", "opt-66b", 2, 2).compute_s(decodes(batch, 900))
    assert 2 * second * 1e3 == pytest.approx(expected_ms, abs=0.1)
    assert (first - second) * 1e3 == pytest.approx(call_ms(batch * 899))


def test_the_second_decode_fit_begins_at_95_requests() -> None:
    times = published_times("distserve", "opt-13b", 1, 1)
    small, large = (times.compute_s(decodes(n, 100))[0] * 1e3 for n in (94, 95))
    assert small == pytest.approx(
        19.9347 + 0.0006269357 * 9400 + 0.03850698 * 94 + call_ms(94 * 99)
    )
    assert large == pytest.approx(7.166189 + 0.0005798 * 9500 + 0.158311 * 95 + call_ms(95 * 99))


def test_stages_share_the_work_and_each_adds_a_millisecond_a_stage() -> None:
    one = published_times("distserve", "opt-13b", 2, 1)
    four = published_times("distserve", "opt-13b", 2, 4)
    whole = one.compute_s(prompts(800))[0] * 1e3 - call_ms(800) - 1
    first, *rest = (seconds * 1e3 for seconds in four.compute_s(prompts(800)))
    assert rest == pytest.approx([whole / 4 + 4] * 3)
    assert first - rest[0] == pytest.approx(call_ms(800))
    assert four.hop_s(prompts(800)) == (0, 0, 0)


def test_a_mixed_microbatch_costs_both_in_turn() -> None:
    times = published_times("vllm", "opt-13b", 1, 1)
    prompt, decode = prompts(300), decodes(3, 50)
    mixed = Microbatch(0, prompt.chunks + decode.chunks)
    apart = times.compute_s(prompt)[0] + times.compute_s(decode)[0]
    assert times.compute_s(mixed)[0] == pytest.approx(apart)


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    times = published_times("distserve", "opt-13b", 1, 1)
    by_hand = 18.10255 + 0.1019123 + 7.122264e-06 + 1 + call_ms(1)
    assert times.compute_s(prompts(1))[0] * 1e3 == pytest.approx(by_hand)


def test_nothing_costs_nothing() -> None:
    assert PublishedTimes(FITS["vllm", "opt-66b"][8], 2).compute_s(Microbatch(0, ())) == (0, 0)


@pytest.mark.parametrize(("engine", "model", "tp"), [("distserve", "opt-13b", 8), ("x", "y", 1)])
def test_what_was_not_measured_is_refused(engine: str, model: str, tp: int) -> None:
    with pytest.raises(ConfigError, match=rf"{model} at TP {tp}: choose from distserve opt-13b"):
        published_times(engine, model, tp, 1)
