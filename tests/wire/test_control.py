"""The wire schema keeps what it carries, and a step is as small as DESIGN asks."""

from array import array
from collections.abc import Mapping
from dataclasses import replace
from math import inf

import pytest

from pipeserve.core.nouns import Admission, Chunk, Microbatch, Request, RequestId, TokenLogprobs
from pipeserve.sampling_params import DRAW_OPTIONS, DrawParams, SamplingParams
from pipeserve.stage.sequences import Sequences
from pipeserve.wire import control
from pipeserve.wire.stage_job import encode_job
from pipeserve.wire.step_messages import (
    Sampled,
    StepChunk,
    pack_params,
    step_message,
    step_result,
    unpack_tokens,
)


def _request(request_id, prompt, **params):
    return Request(
        id=RequestId(request_id),
        prompt=tuple(prompt),
        params=SamplingParams(seed=2**63 - 1, **params),
        stop_ids=frozenset({2, 7}),
    )


def _step(*arguments, requests=()):
    message = step_message(Microbatch(*arguments), {r.id: r for r in requests})
    return control.decode_for_stage(control.encode(message, 1))[1]


def test_a_step_survives_the_wire():
    request = _request(3, range(5))
    step = _step(
        9,
        (Chunk(3, 0, 5, (8, 1), None, 5, 4), Chunk(4, 17, 18, (), 8, 1)),
        (Admission(3, (0, 1, 2, 3, 4), 5, ()),),
        (1, 2),
        requests=[request],
    )
    assert (step.index, step.released) == (9, (1, 2))
    assert step.chunks[0] == StepChunk(3, 0, 5, (8, 1), None, 5, 4)
    assert step.chunks[1] == StepChunk(4, 17, 18, (), 8, 1, 0)
    (registered,) = step.admitted
    assert list(unpack_tokens(registered.token_ids)) == [0, 1, 2, 3, 4]
    assert registered.num_prompt_tokens == 5
    assert registered.stop_ids == [2, 7]


def _registered(request):
    """What a stage then knows of the request."""
    chunk, admission = Chunk(3, 0, 2, (8,), None, 1), Admission(3, request.prompt, 2, ())
    (sequence,) = Sequences().apply(_step(0, (chunk,), (admission,), requests=[request]))
    return sequence


_A_VALUE = {int: 3, float: 0.3, tuple[int, ...]: (4, 70_000), Mapping[int, float]: {70_000: -1.5}}


@pytest.mark.parametrize("option", DRAW_OPTIONS, ids=lambda option: option.name)
def test_each_option_gets_to_the_stage(option):
    value = _A_VALUE[option.type]
    params = replace(SamplingParams(seed=5), **{option.name: value})
    params = _registered(replace(_request(3, (1, 8)), params=params)).params
    got = getattr(params, option.name)
    assert (tuple(got) if isinstance(value, tuple) else got) == value
    assert replace(params, **{"seed": None, option.name: option.default}) == DrawParams()


def test_token_ids_are_an_array_on_the_stage():
    """Which the sampler takes up a hundred times as fast as a list."""
    assert isinstance(
        _registered(_request(3, (1, 8), allowed_token_ids=(4, 6))).params.allowed_token_ids, array
    )


def test_bad_words_get_to_the_stage_as_token_ids():
    request = replace(_request(3, (1, 8)), bad_word_ids=((5, 6), (70_000,)))
    assert _registered(request).registration.bad_word_ids == ((5, 6), (70_000,))


def test_options_cost_a_few_bytes():
    """Each request is registered once, with nothing of what is at its default."""

    def bytes_of(**params):
        return len(encode_job(pack_params(SamplingParams(**params))))

    assert bytes_of() == 1
    assert bytes_of(seed=2**63 - 1, max_tokens=9, stop=("x",), ignore_eos=True) == 11
    assert bytes_of(seed=2**63 - 1, temperature=0.7, top_k=40, top_p=0.9) <= 33


def test_a_decode_costs_a_few_bytes_however_long_its_context():
    def bytes_of(num_decodes):
        chunks = tuple(Chunk(i, 9000, 9001, (), 5, 1) for i in range(num_decodes))
        return len(control.encode(step_message(Microbatch(6, chunks), {}), 1))

    assert bytes_of(64) - bytes_of(32) <= 32 * 16


def test_logprobs_survive_the_wire():
    prompt = [(-0.25, []), (-0.75, [(1, -0.1)])]
    own = [(-0.5, [(5, -0.5), (9, -1.5)]), None]
    sampled = Sampled(4, [5, 6], b"\2\0", own, prompt, {1: "why"})
    result = step_result(control.decode_from_stage(control.encode(sampled, 1))[1])
    assert (result.tokens, result.counts) == ((5, 6), b"\2\0")
    assert result.logprobs == (TokenLogprobs(-0.5, {5: -0.5, 9: -1.5}), None)
    assert result.prompt_logprobs == (TokenLogprobs(-0.25, {}), TokenLogprobs(-0.75, {1: -0.1}))
    assert result.failed == {1: "why"}


def _stage_with(request_id=1, prompt=(10, 11, 12)):
    sequences = Sequences()
    step = _step(
        0,
        (Chunk(request_id, 0, 3, (4,), None, 1),),
        (Admission(request_id, prompt, 3, ()),),
        requests=[_request(request_id, prompt)],
    )
    (sequence,) = sequences.apply(step)
    sequences.await_tokens(step, [sequence])
    return sequences, sequence


def test_feedback_reaches_the_sequence_that_waits_for_it():
    sequences, sequence = _stage_with()
    sequences.take_tokens(0, [99], b"\1", 2.5)
    assert list(sequence.token_ids) == [10, 11, 12, 99]
    assert (sequence.block_table, sequence.token_s) == ([4], 2.5)


def test_feedback_that_comes_after_a_new_registration_changes_nothing_there():
    """The driver may admit a preempted request again before stage 0 has the old token."""
    sequences, _ = _stage_with()
    again = _step(
        1,
        (Chunk(1, 0, 4, (6,), None, 1),),
        (Admission(1, (10, 11, 12, 99), 3, ()),),
        (1,),
        requests=[_request(1, (10, 11, 12))],
    )
    (sequence,) = sequences.apply(again)
    sequences.take_tokens(0, [99], b"\1", 2.5)
    assert list(sequence.token_ids) == [10, 11, 12, 99]
    assert sequence.block_table == [6]


def test_a_chunk_that_only_scores_brings_no_token():
    sequences = Sequences()
    step = _step(
        0,
        (Chunk(1, 0, 2, (4,), None, 2, 2), Chunk(2, 0, 3, (5,), None, 3, 2)),
        (Admission(1, (10, 11, 12), 3, ()), Admission(2, (10, 11, 12), 3, ())),
        requests=[_request(1, (10, 11, 12)), _request(2, (10, 11, 12))],
    )
    first, second = sequences.apply(step)
    sequences.await_tokens(step, [first, second])
    sequences.take_tokens(0, [99], b"\0\1", 2.5)
    assert (len(first.token_ids), list(second.token_ids)) == (3, [10, 11, 12, 99])


def test_a_chunk_may_bring_several_tokens():
    sequences = Sequences()
    step = _step(
        0,
        tuple(Chunk(number, 0, 3, (number,), None, 1) for number in range(3)),
        tuple(Admission(number, (10, 11, 12), 3, ()) for number in range(3)),
        requests=[_request(number, (10, 11, 12)) for number in range(3)],
    )
    first, second, third = sequences.apply(step)
    sequences.await_tokens(step, [first, second, third])
    sequences.take_tokens(0, [96, 97, 98, 99], b"\1\0\3", 2.5)
    assert [list(each.token_ids[3:]) for each in (first, second, third)] == [
        [96],
        [],
        [97, 98, 99],
    ]
    assert (second.token_s, third.token_s) == (-inf, 2.5)


def test_feedback_out_of_step_is_refused():
    sequences, _ = _stage_with()
    with pytest.raises(RuntimeError, match="out of step"):
        sequences.take_tokens(1, [99], b"\1", 2.5)


@pytest.mark.parametrize(("tokens", "counts"), [([98, 99], b"\1"), ([99], b""), ([99], b"\1\0")])
def test_feedback_of_another_number_of_tokens_is_refused(tokens, counts):
    sequences, _ = _stage_with()
    with pytest.raises(RuntimeError, match="out of step"):
        sequences.take_tokens(0, tokens, counts, 2.5)


def test_a_released_request_is_forgotten():
    sequences, _ = _stage_with()
    sequences.apply(_step(1, (), (), (1,)))
    assert len(sequences) == 0
