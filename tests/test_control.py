"""The wire schema keeps what it carries, and a step is as small as DESIGN asks."""

import pytest

from pipeserve import control
from pipeserve.core.nouns import (
    Admission,
    Chunk,
    Microbatch,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)
from pipeserve.sequences import Sequences


def _request(request_id, prompt, **params):
    return Request(
        id=RequestId(request_id),
        prompt=tuple(prompt),
        params=SamplingParams(seed=2**63 - 1, **params),
        stop_ids=frozenset({2, 7}),
    )


def _step(*arguments, requests=()):
    message = control.step_message(Microbatch(*arguments), {r.id: r for r in requests})
    return control.decode_for_stage(control.encode(message))


def test_a_step_survives_the_wire():
    request = _request(3, range(5), temperature=0.5, top_k=4, top_p=0.9, min_tokens=2, logprobs=1)
    step = _step(
        9,
        (Chunk(3, 0, 5, (8, 1), None, 1), Chunk(4, 17, 18, (), 8, 1)),
        (Admission(3, (0, 1, 2, 3, 4), 5, ()),),
        (1, 2),
        requests=[request],
    )
    assert (step.index, step.released) == (9, (1, 2))
    assert step.chunks[0] == control.StepChunk(3, 0, 5, (8, 1), None, 1)
    assert step.chunks[1] == control.StepChunk(4, 17, 18, (), 8, 1)
    (registered,) = step.admitted
    assert control.unpack_tokens(registered.token_ids) == [0, 1, 2, 3, 4]
    assert (registered.temperature, registered.top_k, registered.top_p) == (0.5, 4, 0.9)
    assert (registered.seed, registered.min_tokens, registered.logprobs) == (2**63 - 1, 2, 1)
    assert registered.stop_ids == [2, 7]


def test_a_decode_costs_a_few_bytes_however_long_its_context():
    def bytes_of(num_decodes):
        chunks = tuple(Chunk(i, 9000, 9001, (), 5, 1) for i in range(num_decodes))
        return len(control.encode(control.step_message(Microbatch(6, chunks), {})))

    assert bytes_of(64) - bytes_of(32) <= 32 * 16


def test_logprobs_survive_the_wire():
    sampled = control.Sampled(4, [5, 6], [(-0.5, [(5, -0.5), (9, -1.5)]), None])
    result = control.step_result(control.decode_for_driver(control.encode(sampled)))
    assert result.tokens == (5, 6)
    assert result.logprobs == (TokenLogprobs(-0.5, {5: -0.5, 9: -1.5}), None)


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
    sequences.take_tokens(0, [99])
    assert sequence.token_ids == [10, 11, 12, 99]
    assert sequence.block_table == [4]


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
    sequences.take_tokens(0, [99])
    assert sequence.token_ids == [10, 11, 12, 99]
    assert sequence.block_table == [6]


def test_feedback_out_of_step_is_refused():
    sequences, _ = _stage_with()
    with pytest.raises(RuntimeError, match="out of step"):
        sequences.take_tokens(1, [99])


def test_a_released_request_is_forgotten():
    sequences, _ = _stage_with()
    sequences.apply(_step(1, (), (), (1,)))
    assert len(sequences) == 0
