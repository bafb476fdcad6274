"""The wire schema keeps what it carries, and a step is as small as DESIGN asks."""

from dataclasses import replace

import pytest

from pipeserve.core.nouns import (
    Admission,
    Chunk,
    Microbatch,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)
from pipeserve.stage.sample_row import sample_row
from pipeserve.stage.sequences import Sequences
from pipeserve.wire import control


def _request(request_id, prompt, **params):
    return Request(
        id=RequestId(request_id),
        prompt=tuple(prompt),
        params=SamplingParams(seed=2**63 - 1, **params),
        stop_ids=frozenset({2, 7}),
    )


def _step(*arguments, requests=()):
    message = control.step_message(Microbatch(*arguments), {r.id: r for r in requests})
    return control.decode_for_stage(control.encode(message, 1))[1]


def test_a_step_survives_the_wire():
    sampling = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "min_tokens": 2}
    request = _request(3, range(5), **sampling, logprobs=1, prompt_logprobs=0)
    step = _step(
        9,
        (Chunk(3, 0, 5, (8, 1), None, 5, 4), Chunk(4, 17, 18, (), 8, 1)),
        (Admission(3, (0, 1, 2, 3, 4), 5, ()),),
        (1, 2),
        requests=[request],
    )
    assert (step.index, step.released) == (9, (1, 2))
    assert step.chunks[0] == control.StepChunk(3, 0, 5, (8, 1), None, 5, 4)
    assert step.chunks[1] == control.StepChunk(4, 17, 18, (), 8, 1, 0)
    (registered,) = step.admitted
    assert list(control.unpack_tokens(registered.token_ids)) == [0, 1, 2, 3, 4]
    assert {name: getattr(registered, name) for name in sampling} == sampling
    assert (registered.seed, registered.logprobs, registered.prompt_logprobs) == (2**63 - 1, 1, 0)
    assert registered.stop_ids == [2, 7]
    assert registered.rules is None


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.25},
        {"logit_bias": {5: -1.0, 70_000: 2}},
        {"allowed_token_ids": (4, 70_000)},
    ],
)
def test_each_rule_survives_the_wire(changes):
    request = _request(3, range(5), **changes)
    chunk, admission = Chunk(3, 0, 5, (8,), None, 1), Admission(3, (0, 1, 2, 3, 4), 5, ())
    rules = _step(0, (chunk,), (admission,), requests=[request]).admitted[0].rules
    (name,) = changes
    if name == "allowed_token_ids":
        assert tuple(control.unpack_tokens(rules.allowed_ids)) == changes[name]
    else:
        assert getattr(rules, name) == changes[name]


def test_bad_words_survive_the_wire_as_token_ids():
    request = replace(_request(3, (1,)), bad_word_ids=((5, 6), (70_000,)))
    step = _step(0, (Chunk(3, 0, 1, (8,), None, 1),), (Admission(3, (1,), 1, ()),),
                 requests=[request])  # fmt: skip
    assert step.admitted[0].rules.bad_words == ((5, 6), (70_000,))


def test_the_worker_samples_by_all_that_was_registered():
    """Each parameter gets from the request to the row that the last stage samples by."""
    params = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "logprobs": 3,
              "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25,
              "logit_bias": {5: -1.0}, "allowed_token_ids": (4, 6), "min_tokens": 2}  # fmt: skip
    request = replace(_request(3, (1, 8), **params), bad_word_ids=((5, 6),))
    step = _step(0, (Chunk(3, 0, 3, (8,), None, 1),), (Admission(3, (1, 8, 9), 2, ()),),
                 requests=[request])  # fmt: skip
    sequences = Sequences()
    (sequence,) = sequences.apply(step)
    row = sample_row(sequence, 3)
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.5, 4, 0.9, 0.1)
    assert (row.seed, row.output_index, row.num_logprobs) == (2**63 - 1, 1, 3)
    assert row.banned_ids == (2, 7)
    rules = row.rules
    assert (rules.repetition_penalty, rules.presence_penalty) == (1.5, 0.5)
    assert (rules.frequency_penalty, rules.logit_bias) == (0.25, {5: -1.0})
    assert (rules.bad_words, list(rules.allowed_ids)) == (((5, 6),), [4, 6])
    assert (list(rules.known_ids), rules.num_prompt_tokens) == ([1, 8, 9], 2)
    sequence.token_ids.append(4)
    assert sample_row(sequence, 4).banned_ids == ()
    plain = _step(1, (Chunk(4, 0, 1, (9,), None, 1),), (Admission(4, (1,), 1, ()),),
                  requests=[_request(4, (1,))])  # fmt: skip
    assert sample_row(sequences.apply(plain)[0], 1).rules is None


def test_a_decode_costs_a_few_bytes_however_long_its_context():
    def bytes_of(num_decodes):
        chunks = tuple(Chunk(i, 9000, 9001, (), 5, 1) for i in range(num_decodes))
        return len(control.encode(control.step_message(Microbatch(6, chunks), {}), 1))

    assert bytes_of(64) - bytes_of(32) <= 32 * 16


def test_logprobs_survive_the_wire():
    prompt = [(-0.25, []), (-0.75, [(1, -0.1)])]
    sampled = control.Sampled(4, [5, 6], [(-0.5, [(5, -0.5), (9, -1.5)]), None], prompt, {1: "why"})
    result = control.step_result(control.decode_from_stage(control.encode(sampled, 1))[1])
    assert result.tokens == (5, 6)
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
    sequences.take_tokens(0, [99], 2.5)
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
    sequences.take_tokens(0, [99], 2.5)
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
    sequences.take_tokens(0, [99], 2.5)
    assert (len(first.token_ids), list(second.token_ids)) == (3, [10, 11, 12, 99])


def test_feedback_out_of_step_is_refused():
    sequences, _ = _stage_with()
    with pytest.raises(RuntimeError, match="out of step"):
        sequences.take_tokens(1, [99], 2.5)


def test_a_released_request_is_forgotten():
    sequences, _ = _stage_with()
    sequences.apply(_step(1, (), (), (1,)))
    assert len(sequences) == 0
