"""What each policy drafts, in small hand-made situations."""

from dataclasses import replace
from itertools import pairwise

import pytest

from pipeserve.core.cost.partition import split_layers
from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import Microbatch, Request, RequestId, StepResult, Wait, one_each
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.errors import ConfigError
from pipeserve.sampling_params import SamplingParams


def make_engine(policy, num_stages, **changes) -> Engine:
    limits = {
        "num_blocks": 1000,
        "block_size": 16,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 512,
        "max_model_len": 4096,
    }
    plan = split_layers(num_stages, num_stages)
    return Engine(plan, get_policy(policy), Limits(**limits | changes))


def add(engine, request_id, num_prompt, max_tokens=100):
    prompt = tuple(1000 * request_id + position for position in range(num_prompt))
    params = SamplingParams(max_tokens=max_tokens)
    engine.add(Request(id=RequestId(request_id), prompt=prompt, params=params), 0.0)


def plan(engine) -> Microbatch:
    planned = engine.plan(0.0)
    assert isinstance(planned, Microbatch), planned
    return planned


def complete(engine, microbatch):
    counts = one_each(microbatch.chunks)
    return engine.complete(StepResult(microbatch.index, (7,) * sum(counts), counts), 0.0)


def run_to_steady_state(engine, num_microbatches) -> list[Microbatch]:
    """Keeps the window full; the microbatches that were planned."""
    planned, flying = [], []
    while len(planned) < num_microbatches:
        microbatch = engine.plan(0.0)
        if isinstance(microbatch, Wait):
            complete(engine, flying.pop(0))
        else:
            planned.append(microbatch)
            flying.append(microbatch)
    return planned


def sizes(microbatch):
    return {chunk.request_id: chunk.num_tokens for chunk in microbatch.chunks}


def test_an_unknown_policy_names_the_nearest_or_all():
    with pytest.raises(ConfigError, match="did you mean sarathi_serve"):
        get_policy("sarathi-serve")
    with pytest.raises(ConfigError, match="choose from uniform, request_level, orca"):
        get_policy("round_robin")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_is_registered_under_its_own_name(name):
    assert get_policy(name).name == name


# ---- sarathi_serve ------------------------------------------------------------------------------


def test_sarathi_fills_the_budget_decodes_first_then_prompts_by_arrival():
    engine = make_engine("sarathi_serve", 1)
    add(engine, 0, 20)
    complete(engine, plan(engine))
    add(engine, 1, 400)
    add(engine, 2, 400)
    assert sizes(plan(engine)) == {1: 400, 2: 111, 0: 1}


def test_sarathi_continues_a_prompt_before_it_admits_another():
    engine = make_engine("sarathi_serve", 1)
    add(engine, 0, 700)
    complete(engine, plan(engine))
    add(engine, 1, 400)
    microbatch = plan(engine)
    assert sizes(microbatch) == {0: 188, 1: 324}
    assert [admission.request_id for admission in microbatch.admitted] == [1]


def test_sarathi_reserves_the_whole_prompt_at_admission():
    engine = make_engine("sarathi_serve", 1)
    add(engine, 0, 700)
    (chunk,) = plan(engine).chunks
    assert chunk.num_tokens == 512
    assert len(chunk.new_blocks) == 44


def test_sarathi_sends_no_second_chunk_before_the_first_came_back():
    engine = make_engine("sarathi_serve", 4)
    add(engine, 0, 2000)
    first = plan(engine)
    assert engine.plan(0.0) == Wait("token")
    complete(engine, first)
    assert sizes(plan(engine)) == {0: 512}


def test_sarathi_gives_all_ready_decodes_to_whichever_microbatch_comes_first():
    engine = make_engine("sarathi_serve", 4)
    for number in range(8):
        add(engine, number, 10)
    complete(engine, plan(engine))
    assert len(plan(engine).chunks) == 8
    assert engine.plan(0.0) == Wait("token")


def test_sarathi_keeps_its_window_at_the_number_of_stages():
    engine = make_engine("sarathi_serve", 2, max_num_batched_tokens=10)
    for number in range(4):
        add(engine, number, 10)
    plan(engine), plan(engine)
    assert engine.plan(0.0) == Wait("window")


def test_decodes_over_the_budget_wait_their_turn():
    engine = make_engine("sarathi_serve", 2, max_num_batched_tokens=3)
    for number in range(6):
        add(engine, number, 1)
    for microbatch in [plan(engine), plan(engine)]:
        complete(engine, microbatch)  # now six decodes are ready
    assert [sizes(plan(engine)) for _ in range(2)] == [{0: 1, 1: 1, 2: 1}, {3: 1, 4: 1, 5: 1}]


def test_one_percent_of_the_blocks_stays_free_at_an_admission_but_not_for_a_lone_request():
    engine = make_engine("sarathi_serve", 1, num_blocks=100, max_num_batched_tokens=2000)
    add(engine, 0, 16 * 50)
    add(engine, 1, 16 * 50)  # would leave nothing
    assert list(sizes(plan(engine))) == [0]
    engine = make_engine("sarathi_serve", 1, num_blocks=100, max_num_batched_tokens=2000)
    add(engine, 0, 16 * 50)
    add(engine, 1, 16 * 49)
    assert list(sizes(plan(engine))) == [0, 1]
    engine = make_engine("sarathi_serve", 1, num_blocks=100, max_num_batched_tokens=2000)
    add(engine, 0, 16 * 100, max_tokens=1)
    assert list(sizes(plan(engine))) == [0]


PREEMPTING = ["chunked_only", "hybrid_only", "sarathi_serve", "token_throttle", "vllm"]


@pytest.mark.parametrize("policy", PREEMPTING)
def test_the_latest_arrival_is_preempted_and_comes_back_first(policy):
    engine = make_engine(
        policy, 1, num_blocks=4, block_size=4, max_num_batched_tokens=64, max_model_len=64
    )
    add(engine, 0, 8, max_tokens=8)
    add(engine, 1, 8, max_tokens=8)
    complete(engine, plan(engine))
    add(engine, 2, 4, max_tokens=2)
    second = plan(engine)
    assert list(sizes(second)) == [0]  # both needed a block, none was free
    assert second.released == (1,)
    assert engine.stats.preemptions == 1
    reasons, admitted, microbatch = {}, [], second
    while isinstance(microbatch, Microbatch):
        admitted += [admission.request_id for admission in microbatch.admitted]
        outputs = complete(engine, microbatch)
        reasons |= {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
        microbatch = engine.plan(0.0)
    assert reasons == {0: "length", 1: "length", 2: "length"}
    assert admitted.index(1) < admitted.index(2)


# ---- uniform ------------------------------------------------------------------------------------


def test_uniform_leaves_a_block_for_each_request_that_runs():
    engine = make_engine(
        "uniform", 1, num_blocks=4, block_size=4, max_num_batched_tokens=64, max_model_len=64
    )
    add(engine, 0, 8, max_tokens=8)
    add(engine, 1, 8, max_tokens=8)
    assert list(sizes(plan(engine))) == [0]  # the other one's 2 would leave it none to grow into
    assert engine.num_free_blocks == 2


def test_uniform_preempts_the_latest_arrival_when_running_requests_outgrow_the_blocks():
    engine = make_engine(
        "uniform", 1, num_blocks=6, block_size=4, max_num_batched_tokens=64, max_model_len=64
    )
    add(engine, 0, 8, max_tokens=12)
    add(engine, 1, 7, max_tokens=12)
    microbatch, ended = plan(engine), {}
    while isinstance(microbatch, Microbatch):
        for output in complete(engine, microbatch):
            if output.finish_reason:
                ended[output.request_id] = output.finish_reason
        microbatch = engine.plan(0.0)
    assert ended == {0: "length", 1: "length"}
    assert engine.stats.preemptions == 1


def test_uniform_sends_the_next_chunk_at_once():
    engine = make_engine("uniform", 2, max_num_batched_tokens=100)
    add(engine, 0, 250)
    assert [sizes(plan(engine)) for _ in range(3)] == [{0: 84}, {0: 84}, {0: 82}]


@pytest.mark.parametrize("num_requests", [8, 9, 11, 32])
def test_uniform_spreads_decodes_so_that_none_misses_its_turn(num_requests):
    engine = make_engine("uniform", 4)
    for number in range(num_requests):
        add(engine, number, 10)
    steady = run_to_steady_state(engine, 60)[30:]
    share = -(-num_requests // 4)
    assert max(len(microbatch.chunks) for microbatch in steady) == share
    for number in range(num_requests):
        turns = [mb.index for mb in steady if number in sizes(mb)]
        assert max(b - a for a, b in pairwise(turns)) <= 4
    decodes = sum(len(microbatch.chunks) for microbatch in steady)
    assert decodes >= 30 * num_requests / 4 - share  # as many as P microbatches in turn can carry


def test_uniform_plans_a_decode_ahead_only_for_the_oldest_of_a_full_window():
    engine = make_engine("uniform", 2)
    add(engine, 0, 10)
    first = plan(engine)
    assert engine.plan(0.0) == Wait("token")  # the window has room: stage 0 would stand still
    add(engine, 1, 10)
    plan(engine)
    ahead = plan(engine)
    assert [(c.request_id, c.token_from) for c in ahead.chunks] == [(0, first.index)]
    assert engine.plan(0.0) == Wait("window")


def test_uniform_spreads_waiting_prompts_over_the_microbatches():
    engine = make_engine("uniform", 4)
    for number in range(4):
        add(engine, number, 200)
    assert [plan(engine).num_tokens for _ in range(4)] == [200, 200, 200, 200]


def test_uniform_uses_nearly_full_budgets_when_enough_waits():
    engine = make_engine("uniform", 4, num_blocks=2000)
    for number in range(60):
        add(engine, number, 300)
    assert [plan(engine).num_tokens for _ in range(4)] == [500, 500, 500, 500]  # 36 even pieces


@pytest.mark.parametrize(
    ("num_prompt", "pieces"), [(30, [30]), (65, [33, 32]), (200, [67, 67, 66]), (512, [128] * 4)]
)
def test_uniform_makes_no_tiny_pieces(num_prompt, pieces):
    engine = make_engine("uniform", 4)
    add(engine, 0, num_prompt)
    planned = run_to_steady_state(engine, len(pieces))
    assert [microbatch.num_tokens for microbatch in planned] == pieces


# ---- room for decodes ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", PREEMPTING)
def test_those_that_share_their_blocks_are_preempted_in_one_go(policy):
    """A system prompt of 20 blocks that 200 requests share, and a block of its own for each: when
    all want another at once, every third has to give way. Who looked at one after the other, and
    each time at all blocks of those before it, would stop the run for half a second."""
    limits = {"block_size": 4, "max_num_batched_tokens": 1000, "max_model_len": 200}
    engine = make_engine(policy, 1, num_blocks=20 + 200 + 2, **limits)
    shared = (0,) * 80
    for number in range(201):
        params = SamplingParams(max_tokens=10)
        engine.add(Request(id=RequestId(number), prompt=(*shared, number), params=params), 0.0)
    looked, compose = [], engine.policy.compose

    def watched(view, now):
        def freed_by(request_ids):
            looked.append(len(request_ids))
            return view.freed_by(request_ids)

        return compose(replace(view, freed_by=freed_by), now)

    engine.policy.compose = watched
    ended, most = [], 0
    while engine.num_unfinished:
        before = engine.stats.preemptions
        ended += [o.request_id for o in complete(engine, plan(engine)) if o.finish_reason]
        most = max(most, engine.stats.preemptions - before)
    assert sorted(ended) == list(range(201))
    assert most >= 50
    assert sum(looked) < 10 * engine.stats.preemptions
