"""Which time a rate is of."""

from batch_and_context import decode_rate, prefill_rate

from pipeserve.profiling.recording.summary import RequestRecord


def record(*times_s: float, num_prompt_tokens: int = 10) -> RequestRecord:
    return RequestRecord(num_prompt_tokens=num_prompt_tokens, arrival_s=1.0, token_times_s=times_s)


def test_decodes_count_while_all_decode():
    records = [record(2, 3, 4, 5), record(3, 3.5, 4, 7)]
    assert decode_rate(records) == 4 / (5 - 3)  # 4, 5 of the first, 3.5, 4 of the second


def test_prompts_count_until_the_last_has_a_token():
    assert prefill_rate([record(2), record(6)]) == 20 / 5
