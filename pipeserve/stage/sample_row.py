"""From what a stage knows of a request to what `stages.sampling` needs for one of its tokens."""

from pipeserve.stage.sequences import Sequence
from pipeserve.stages.sampling import LogitRules, SampleRow
from pipeserve.wire.control import unpack_tokens


def sample_row(sequence: Sequence, position: int) -> SampleRow:
    """How to draw the token at `position`; a function of the request and the position alone."""
    registration = sequence.registration
    output_index = position - registration.num_prompt_tokens
    return SampleRow(
        temperature=registration.temperature,
        top_k=registration.top_k,
        top_p=registration.top_p,
        min_p=registration.min_p,
        seed=registration.seed,
        output_index=output_index,
        banned_ids=tuple(registration.stop_ids) if output_index < registration.min_tokens else (),
        rules=None if registration.rules is None else _logit_rules(sequence, position),
        num_logprobs=registration.logprobs,
    )


def _logit_rules(sequence: Sequence, position: int) -> LogitRules:
    assert len(sequence.token_ids) == position, "rules need every token before theirs"
    rules = sequence.registration.rules
    allowed = rules.allowed_ids
    return LogitRules(
        repetition_penalty=rules.repetition_penalty,
        presence_penalty=rules.presence_penalty,
        frequency_penalty=rules.frequency_penalty,
        logit_bias=rules.logit_bias,
        bad_words=rules.bad_words,
        allowed_ids=None if allowed is None else unpack_tokens(allowed),
        known_ids=sequence.token_ids,
        num_prompt_tokens=sequence.registration.num_prompt_tokens,
    )
