"""What each published schedule says, a rule a test. Sources: the docstrings of the policies."""

from itertools import pairwise

import pytest
from hypothesis import given
from test_engine_properties import checked, play, scenarios
from test_policies import add, complete, make_engine, plan, run_to_steady_state, sizes

from pipeserve.core.nouns import Microbatch, Request, RequestId, Wait
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Traits
from pipeserve.errors import ConfigError

PUBLISHED = sorted(set(POLICIES) - {"uniform"})
WHOLE_PROMPTS = ["hybrid_only", "orca", "request_level", "vllm"]
WORST_CASE = ["orca", "request_level", "sarathi"]


def roomy(policy, num_stages, **changes):
    """An engine in which no prompt of these tests is too long for a microbatch."""
    limits = {"max_num_batched_tokens": 2048, "max_model_len": 2048}
    return make_engine(policy, num_stages, **limits | changes)


def step(engine) -> dict:
    """One microbatch there and back; what it ran."""
    microbatch = plan(engine)
    complete(engine, microbatch)
    return sizes(microbatch)


def run_to_end(engine, flying=()) -> list[Microbatch]:
    """Keeps the window full until nothing is left; the microbatches that were planned."""
    planned, flying = [], list(flying)
    while engine.has_work:
        microbatch = engine.plan(0.0)
        if isinstance(microbatch, Wait):
            complete(engine, flying.pop(0))
        else:
            planned.append(microbatch)
            flying.append(microbatch)
            assert len(planned) < 1000, "no end"
    return planned


# ---- what all of them have in common ------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_policies_keep_their_published_traits(name):
    assert get_policy(name).traits == Traits(
        plans_ahead=False,
        chunk_pipelining=False,
        one_in_flight=True,
        whole_prompts=name in WHOLE_PROMPTS,
    )


@pytest.mark.parametrize("name", WHOLE_PROMPTS)
def test_whole_prompts_need_room_for_the_longest(name):
    with pytest.raises(ConfigError, match="give at least max_model_len, 4096"):
        make_engine(name, 1, max_num_batched_tokens=4095)


@pytest.mark.parametrize("name", WORST_CASE)
def test_worst_case_reservation_takes_all_blocks_at_admission(name):
    engine = roomy(name, 1)
    add(engine, 0, 33, max_tokens=80)
    (first,) = plan(engine).chunks
    assert len(first.new_blocks) == 7  # 112 positions: the last token's KV is never computed


@pytest.mark.parametrize("name", WORST_CASE)
def test_worst_case_reservation_keeps_no_watermark(name):
    engine = roomy(name, 2, num_blocks=100)
    add(engine, 0, 16 * 40, max_tokens=16 * 10)
    add(engine, 1, 16 * 40, max_tokens=16 * 10)
    plan(engine)
    if name == "sarathi":  # one prompt a microbatch
        plan(engine)
    assert engine.num_free_blocks == 0


@pytest.mark.parametrize("name", WORST_CASE)
def test_a_request_that_could_need_every_block_runs(name):
    engine = roomy(name, 1, num_blocks=4, block_size=4)
    add(engine, 0, 7, max_tokens=10)  # 16 positions and a last token without
    assert len(run_to_end(engine)) == 10


@pytest.mark.parametrize("name", ["hybrid_only", "sarathi_serve", "token_throttle", "vllm"])
def test_paged_policies_take_the_blocks_of_the_known_tokens(name):
    engine = roomy(name, 1)
    add(engine, 0, 33, max_tokens=80)
    (first,) = plan(engine).chunks
    assert len(first.new_blocks) == 3


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_imported_prompt_starts_with_its_last_token_alone(name):
    engine = roomy(name, 2)
    engine.add(Request(id=RequestId(0), prompt=tuple(range(100)), num_imported=99), 0.0)
    (chunk,) = plan(engine).chunks
    assert (chunk.start, chunk.stop, chunk.num_logits) == (99, 100, 1)
    assert len(chunk.new_blocks) >= 7


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("num_stages", [1, 3])
def test_one_seat_serves_one_request_after_the_other(name, num_stages):
    engine = roomy(name, num_stages, max_num_seqs=1)
    for number in range(3):
        add(engine, number, 10, max_tokens=3)
    ran = [next(iter(sizes(mb))) for mb in run_to_end(engine)]
    assert ran == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def census(microbatches) -> list[tuple[int, int]]:
    """Of each: prompts and decodes. A request decodes from its first sample since admission."""
    prefilling, counts = set(), []
    for microbatch in microbatches:
        prefilling |= {admission.request_id for admission in microbatch.admitted}
        prompts = [c for c in microbatch.chunks if c.request_id in prefilling]
        sampling = {c.request_id for c in prompts if c.num_logits > c.num_scored}
        prefilling -= sampling
        counts.append((len(prompts), len(microbatch.chunks) - len(prompts)))
    return counts


@pytest.mark.parametrize("name", ["chunked_only", "request_level", "vllm"])
@checked(60)
@given(scenario=scenarios())
def test_prompts_and_decodes_never_share_a_microbatch(name, scenario):
    pipeline = play(get_policy(name), scenario)
    assert not any(prompts and decodes for prompts, decodes in census(pipeline.crossing))


@pytest.mark.parametrize("name", WORST_CASE)
@checked(60)
@given(scenario=scenarios())
def test_who_reserves_the_worst_case_preempts_nobody(name, scenario):
    assert play(get_policy(name), scenario).engine.stats.preemptions == 0


# ---- request_level ------------------------------------------------------------------------------


def test_request_level_lets_nobody_join_a_batch():
    engine = roomy("request_level", 1)
    add(engine, 0, 20, max_tokens=3)
    add(engine, 1, 10, max_tokens=2)
    assert step(engine) == {0: 20, 1: 10}
    add(engine, 2, 5, max_tokens=1)
    assert [step(engine) for _ in range(3)] == [{0: 1, 1: 1}, {0: 1}, {2: 5}]


def test_request_level_fills_the_pipe_with_p_batches_of_equal_size():
    engine = roomy("request_level", 3, max_num_seqs=8)
    for number in range(9):
        add(engine, number, 10)
    assert [list(sizes(plan(engine))) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert engine.plan(0.0) == Wait("window")


def test_request_level_keeps_each_batch_together():
    engine = roomy("request_level", 2, max_num_seqs=4)
    for number in range(4):
        add(engine, number, 10)
    batches = [list(sizes(mb)) for mb in run_to_steady_state(engine, 20)]
    assert batches == [[0, 1], [2, 3]] * 10


def test_request_level_starts_a_batch_in_the_place_of_one_that_ended():
    engine = roomy("request_level", 2, max_num_seqs=4)
    for number, max_tokens in enumerate([1, 1, 9, 9, 9]):
        add(engine, number, 10, max_tokens)
    first, second = plan(engine), plan(engine)
    complete(engine, first)
    third = plan(engine)
    assert sizes(third) == {4: 10}
    complete(engine, second)
    assert sizes(plan(engine)) == {2: 1, 3: 1}


def test_request_level_never_puts_more_than_a_batch_into_a_microbatch():
    engine = roomy("request_level", 2, max_num_seqs=4)
    for number in range(4):
        add(engine, number, 10)
    for microbatch in [plan(engine), plan(engine)]:
        complete(engine, microbatch)  # both are back before the next is planned
    assert [sizes(plan(engine)) for _ in range(2)] == [{0: 1, 1: 1}, {2: 1, 3: 1}]


# ---- orca ---------------------------------------------------------------------------------------


def test_orca_runs_all_decodes_and_any_number_of_whole_prompts():
    engine = roomy("orca", 1)
    add(engine, 0, 20)
    add(engine, 1, 20)
    step(engine)
    for number in (2, 3, 4):
        add(engine, number, 600)
    assert step(engine) == {2: 600, 3: 600, 4: 600, 0: 1, 1: 1}


def test_orca_cuts_no_prompt_and_lets_none_pass():
    engine = roomy("orca", 1)
    for number, num_prompt in enumerate([1500, 600, 10]):
        add(engine, number, num_prompt)
    assert step(engine) == {0: 1500}
    assert step(engine) == {1: 600, 2: 10, 0: 1}


def test_orca_counts_only_what_is_not_cached_of_a_prompt():
    engine = roomy("orca", 1)
    add(engine, 0, 1600)
    step(engine)
    for number in (1, 3):
        engine.add(Request(id=RequestId(number), prompt=tuple(range(1600))), 0.0)  # as 0
        add(engine, number + 1, 900)
    assert step(engine) == {1: 16, 2: 900, 3: 16, 4: 900, 0: 1}


def test_orca_admits_nobody_past_the_first_whose_worst_case_does_not_fit():
    engine = roomy("orca", 1, num_blocks=10)
    add(engine, 0, 16, max_tokens=97)  # 7 blocks
    add(engine, 1, 16, max_tokens=49)  # 4 blocks, 3 are free
    add(engine, 2, 16, max_tokens=1)
    assert step(engine) == {0: 16}
    assert step(engine) == {0: 1}


def test_orca_keeps_p_microbatches_in_flight_and_a_request_in_one_of_them():
    engine = roomy("orca", 3)
    for number in range(4):
        add(engine, number, 10)
    complete(engine, plan(engine))
    assert len(plan(engine).chunks) == 4  # whichever is composed first takes all ready decodes
    assert engine.plan(0.0) == Wait("token")
    add(engine, 4, 10)
    plan(engine)
    add(engine, 5, 10)
    plan(engine)
    assert engine.plan(0.0) == Wait("window")


# ---- vllm ---------------------------------------------------------------------------------------


def test_vllm_runs_prompts_first_and_decodes_stall():
    engine = roomy("vllm", 1)
    add(engine, 0, 20)
    step(engine)
    assert step(engine) == {0: 1}
    add(engine, 1, 1500)
    add(engine, 2, 600)
    assert step(engine) == {1: 1500}
    assert step(engine) == {2: 600}
    assert step(engine) == {0: 1, 1: 1, 2: 1}


def test_vllm_keeps_one_percent_of_the_blocks_free_at_an_admission():
    for num_blocks, admitted in ((49, True), (50, False)):
        engine = roomy("vllm", 1, num_blocks=100)
        add(engine, 0, 16 * 50)
        step(engine)
        add(engine, 1, 16 * num_blocks)
        assert (1 in sizes(plan(engine))) == admitted


def test_vllm_computes_a_preempted_request_again_in_one_piece():
    engine = roomy("vllm", 1, num_blocks=4, block_size=4, enable_prefix_caching=False)
    add(engine, 0, 8, max_tokens=4)
    add(engine, 1, 8, max_tokens=8)
    step(engine)
    assert step(engine) == {0: 1}  # both need a block, none is free: the latest gives way
    assert engine.stats.preemptions == 1
    assert [step(engine) for _ in range(3)] == [{0: 1}, {0: 1}, {1: 9}]


# ---- sarathi ------------------------------------------------------------------------------------


def test_sarathi_2023_fills_one_chunk_up_to_the_tile():
    engine = make_engine("sarathi", 1, max_num_batched_tokens=256, max_num_seqs=8)
    for number in range(3):
        add(engine, number, 10)
        step(engine)
    add(engine, 3, 1000)
    assert step(engine) == {3: 253, 0: 1, 1: 1, 2: 1}


def test_sarathi_2023_runs_one_prompt_at_a_time():
    engine = make_engine("sarathi", 1, max_num_batched_tokens=256)
    add(engine, 0, 300)
    add(engine, 1, 300)
    assert [step(engine) for _ in range(3)] == [{0: 256}, {0: 44}, {1: 255, 0: 1}]


def test_sarathi_2023_runs_one_prompt_at_a_time_though_two_are_part_done():
    engine = make_engine("sarathi", 2, max_num_batched_tokens=256)
    add(engine, 0, 300)
    add(engine, 1, 300)
    for microbatch in [plan(engine), plan(engine)]:
        complete(engine, microbatch)
    assert [sizes(plan(engine)) for _ in range(2)] == [{0: 44}, {1: 44}]


def test_sarathi_2023_leaves_a_slot_of_the_batch_to_the_chunk():
    engine = make_engine("sarathi", 1, max_num_seqs=3)
    for number in range(3):
        add(engine, number, 10, max_tokens=3 if number == 0 else 100)
        step(engine)  # the others decode beside it
    assert step(engine) == {1: 1, 2: 1}
    add(engine, 3, 2000)
    assert step(engine) == {3: 510, 1: 1, 2: 1}


def test_sarathi_2023_runs_b_minus_one_decodes_beside_a_chunk_and_b_without():
    engine = make_engine("sarathi", 2, max_num_seqs=6)
    for number in range(5):
        add(engine, number, 10)
        step(engine)
    add(engine, 5, 800)
    decodes_first = [sorted(sizes(plan(engine)).values()) for _ in range(2)]
    assert decodes_first == [[1, 1, 510], [1, 1, 1]]  # B is 6 / 2


def test_sarathi_2023_reaches_the_paper_s_27_requests_a_microbatch():
    """GPT-3 on 8 stages: the KV cache holds 220 requests, 27.5 for each microbatch in flight."""
    engine = make_engine("sarathi", 8, max_num_seqs=220, num_blocks=6000)
    for number in range(220):
        add(engine, number, 10, max_tokens=400)
    steady = run_to_steady_state(engine, 600)[400:]
    assert max(len(microbatch.chunks) for microbatch in steady) == 27


def test_sarathi_2023_keeps_a_position_for_the_chunk():
    engine = make_engine("sarathi", 1, max_num_batched_tokens=4, max_num_seqs=16)
    for number in range(8):
        add(engine, number, 1)
    ran = [step(engine) for _ in range(8)]
    assert [max(r) for r in ran] == list(range(8))  # a new prompt in each
    assert [len(r) for r in ran] == [1, 2, 3, 4, 4, 4, 4, 4]


def test_sarathi_2023_with_the_longest_chunk_is_orca_at_its_best():
    engine = make_engine("sarathi", 1, max_num_batched_tokens=4096)
    add(engine, 0, 3000)
    add(engine, 1, 2000)
    assert [step(engine) for _ in range(2)] == [{0: 3000}, {1: 2000, 0: 1}]


@checked(60)
@given(scenario=scenarios())
def test_sarathi_2023_has_one_chunk_and_at_most_b_requests(scenario):
    pipeline = play(get_policy("sarathi"), scenario)
    most = max(1, scenario.limits.max_num_seqs // scenario.num_stages)
    for prompts, decodes in census(pipeline.crossing):
        assert prompts <= 1
        assert prompts + decodes <= most


# ---- hybrid_only --------------------------------------------------------------------------------


def test_hybrid_only_runs_whole_prompts_beside_decodes():
    engine = roomy("hybrid_only", 1)
    add(engine, 0, 20)
    step(engine)
    for number, num_prompt in enumerate([1500, 600, 10], start=1):
        add(engine, number, num_prompt)
    assert step(engine) == {1: 1500, 0: 1}
    assert step(engine) == {2: 600, 3: 10, 0: 1, 1: 1}


# ---- chunked_only -------------------------------------------------------------------------------


def test_chunked_only_takes_strict_turns():
    engine = make_engine("chunked_only", 1)
    add(engine, 0, 20)
    step(engine)
    add(engine, 1, 1200)
    turns = [step(engine) for _ in range(6)]
    assert turns == [{0: 1}, {1: 512}, {0: 1}, {1: 512}, {0: 1}, {1: 176}]
    assert step(engine) == {0: 1, 1: 1}


def test_chunked_only_gives_a_turn_with_nothing_to_run_to_the_other_kind():
    engine = make_engine("chunked_only", 1)
    add(engine, 0, 600)
    assert [step(engine) for _ in range(4)] == [{0: 512}, {0: 88}, {0: 1}, {0: 1}]


def test_chunked_only_fills_a_prefill_turn():
    engine = make_engine("chunked_only", 1)
    for number in range(3):
        add(engine, number, 300)
    assert step(engine) == {0: 300, 1: 212}
    step(engine)
    assert step(engine) == {1: 88, 2: 300}


def test_chunked_only_counts_turns_over_the_whole_pipeline():
    engine = make_engine("chunked_only", 2)
    add(engine, 0, 10)
    complete(engine, plan(engine))
    add(engine, 1, 2000)
    decoding, filling = plan(engine), plan(engine)
    assert (sizes(decoding), sizes(filling)) == ({0: 1}, {1: 512})
    complete(engine, decoding)
    assert sizes(plan(engine)) == {0: 1}  # the last microbatch was a prefill turn
    complete(engine, filling)
    assert sizes(plan(engine)) == {1: 512}


# ---- splitfuse ----------------------------------------------------------------------------------


def test_splitfuse_cuts_a_prompt_so_that_the_forward_is_full():
    engine = make_engine("splitfuse", 1)
    add(engine, 0, 20)
    step(engine)
    for number in (1, 2, 3):
        add(engine, number, 300)
    assert step(engine) == {0: 1, 1: 300, 2: 211}
    assert step(engine) == {0: 1, 1: 1, 2: 89, 3: 300}


def test_splitfuse_takes_blocks_as_positions_are_run():
    engine = make_engine("splitfuse", 1)
    add(engine, 0, 700)
    first = plan(engine)
    complete(engine, first)
    assert [len(mb.chunks[0].new_blocks) for mb in (first, plan(engine))] == [32, 12]


def test_splitfuse_starts_a_prompt_only_if_all_of_it_has_room_and_lets_none_pass():
    engine = make_engine("splitfuse", 1, num_blocks=10, block_size=4)
    add(engine, 0, 24, max_tokens=9)  # 6 blocks
    add(engine, 1, 17, max_tokens=9)  # 5
    add(engine, 2, 4, max_tokens=9)
    assert step(engine) == {0: 24}
    assert step(engine) == {0: 1}


def test_splitfuse_lets_a_decode_without_a_block_sit_out():
    engine = make_engine("splitfuse", 1, num_blocks=5, block_size=4)
    add(engine, 0, 8, max_tokens=3)
    add(engine, 1, 8, max_tokens=3)
    step(engine)
    assert [step(engine) for _ in range(2)] == [{0: 1}, {0: 1}]
    assert [step(engine) for _ in range(2)] == [{1: 1}, {1: 1}]
    assert engine.stats.preemptions == 0


def test_splitfuse_resets_everything_when_nothing_can_run():
    engine = make_engine("splitfuse", 1, num_blocks=4, block_size=4, enable_prefix_caching=False)
    add(engine, 0, 8, max_tokens=3)
    add(engine, 1, 8, max_tokens=3)
    step(engine)
    reset = plan(engine)
    assert engine.stats.preemptions == 2
    assert set(reset.released) == {0, 1}
    assert sizes(reset) == {0: 9}  # from prompt and output, and the first one first
    complete(engine, reset)
    assert [sizes(mb) for mb in run_to_end(engine)] == [{0: 1}, {1: 9}, {1: 1}]


def test_splitfuse_waits_for_what_is_outstanding_before_it_resets():
    engine = make_engine("splitfuse", 2, num_blocks=4, block_size=4)
    add(engine, 0, 8, max_tokens=9)
    first = plan(engine)
    add(engine, 1, 8, max_tokens=9)
    second = plan(engine)
    complete(engine, first)
    assert engine.plan(0.0) == Wait("kv")  # 0 has no block to go on, but 1 may end
    assert engine.stats.preemptions == 0
    complete(engine, second)
    assert isinstance(engine.plan(0.0), Microbatch)
    assert engine.stats.preemptions == 2


def test_splitfuse_prompts_of_two_microbatches_do_not_stop_each_other():
    """Each would fit alone; started together, neither could end, and after a reset again."""
    engine = make_engine("splitfuse", 2, num_blocks=10, block_size=4, max_num_batched_tokens=8)
    add(engine, 0, 32, max_tokens=2)  # 8 blocks
    add(engine, 1, 20, max_tokens=2)  # 5
    first = plan(engine)
    assert sizes(first) == {0: 8}
    assert engine.plan(0.0) == Wait("kv")
    run_to_end(engine, flying=[first])
    assert engine.stats.preemptions == 0


def test_splitfuse_takes_at_most_512_sequences():
    engine = make_engine("splitfuse", 1, max_num_batched_tokens=2000, max_num_seqs=1000)
    for number in range(600):
        add(engine, number, 1)
    assert len(step(engine)) == 512
    assert step(engine) == dict.fromkeys(range(512), 1)  # decodes first


# ---- token_throttle -----------------------------------------------------------------------------


def test_token_throttle_works_off_waiting_tokens_in_eight_microbatches():
    engine = make_engine("token_throttle", 4, max_num_batched_tokens=2048)
    for number in range(8):
        add(engine, number, 800)
    assert [plan(engine).num_tokens for _ in range(3)] == [800, 700, 612]


def test_token_throttle_goes_no_lower_than_32_prefill_tokens():
    engine = make_engine("token_throttle", 1)
    add(engine, 0, 100)
    assert [sum(step(engine).values()) for _ in range(4)] == [32, 32, 32, 4]


def test_token_throttle_prefills_less_the_less_kv_is_free():
    engine = make_engine("token_throttle", 4, max_model_len=20000)
    add(engine, 0, 8000)  # 500 of 1000 blocks
    assert plan(engine).num_tokens == 512
    for number in range(1, 9):
        add(engine, number, 800)
    half_free = plan(engine).num_tokens
    assert half_free == 242  # 512 * (0.5 - 0.05) / 0.95


def test_token_throttle_under_the_threshold_keeps_to_the_least():
    engine = make_engine("token_throttle", 4, max_model_len=20000)
    add(engine, 0, 16 * 960)  # 4 % is left
    plan(engine)
    for number in range(1, 9):
        add(engine, number, 400)
    assert plan(engine).num_tokens == 32


@pytest.mark.parametrize(
    ("num_requests", "turns"), [(5, [1, 1, 1, 2]), (8, [2] * 4), (11, [2, 3, 3, 3])]
)
def test_token_throttle_gives_every_decode_a_turn_in_p_microbatches(num_requests, turns):
    engine = make_engine("token_throttle", 4)
    for number in range(num_requests):
        add(engine, number, 10)
    steady = run_to_steady_state(engine, 60)[20:]
    for start in range(len(steady) - 4):
        assert sorted(len(mb.chunks) for mb in steady[start : start + 4]) == turns
    for number in range(num_requests):
        own = [mb.index for mb in steady if number in sizes(mb)]
        assert max(b - a for a, b in pairwise(own)) <= 5


def test_token_throttle_lets_fewer_decodes_than_stages_go_at_once():
    engine = make_engine("token_throttle", 4)
    add(engine, 0, 10, max_tokens=6)
    assert [step(engine) for _ in range(6)] == [{0: 10}] + [{0: 1}] * 5
