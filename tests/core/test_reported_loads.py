"""Loads on which other engines were reported to crash, stall, leak or repeat a token, under every
policy. The numbers are those of the reports."""

from dataclasses import replace

import pytest
from load_runs import run
from loads import Fault, Finish, Load

from pipeserve.core.cost.kernels import TILE
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Limits
from pipeserve.sampling_params import SamplingParams

POOL = 32
"""Positions that the KV cache holds, in blocks of 4."""

every_policy = pytest.mark.parametrize("policy", POLICIES)


def load_of(policy: str, lengths, num_stages=1, same=False, cost="right", **changes) -> Load:
    """Requests of these lengths (prompt, output), all there at once; equal ids where `same`."""
    requests = [
        Request(
            id=RequestId(number),
            prompt=tuple([0 if same else (number + p * p) % 5 for p in range(length)]),
            params=SamplingParams(max_tokens=max_tokens),
        )
        for number, (length, max_tokens) in enumerate(lengths)
    ]
    longest = max(sum(each) for each in lengths)
    limits = {
        "num_blocks": POOL // 4,
        "block_size": 4,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 64,
        "max_model_len": longest,
    } | changes
    if get_policy(policy).traits.whole_prompts:
        limits["max_num_batched_tokens"] = max(limits["max_num_batched_tokens"], longest)
    return Load(
        seed=0,
        policy=policy,
        num_stages=num_stages,
        window=num_stages,
        limits=Limits(**limits),
        cost=cost,
        clock="runs",
        slow=1.0,
        arrivals=[(0.0, request) for request in requests],
    )


@every_policy
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("lengths", [(POOL, 1), (POOL - 1, 2), (1, POOL), (POOL // 2, POOL // 2)])
def test_a_request_that_needs_every_block_runs(policy, num_stages, lengths):
    """nano-vllm#274: the scheduler asserts when the one sequence left finds no block; vllm#39734
    and vllm#35541: what needs more than there is blocks the queue for ever (here it is refused)."""
    run(load_of(policy, [lengths] * 3, num_stages))
    run(load_of(policy, [(2, 3), lengths, (3, 2), lengths], num_stages))


@every_policy
@pytest.mark.parametrize("budget", [TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("max_tbt_s", [None, 1e-6, 0.3])
def test_a_prompt_over_the_budget_of_a_tile_is_chunked(policy, budget, max_tbt_s):
    """sglang#36344: 129 tokens, chunks of 128, cut at multiples of 4096: never scheduled."""
    lengths = [(TILE + 1, 3), (2 * TILE, 3), (1, 30)]
    limits = {"num_blocks": 200, "max_num_batched_tokens": budget, "max_tbt_s": max_tbt_s}
    run(load_of(policy, lengths, 2, cost="tiled", **limits))


@every_policy
@pytest.mark.parametrize("num_stages", [1, 4])
def test_preempted_with_a_token_on_its_way(policy, num_stages):
    """vllm#38624 and vllm-gaudi#1794: the token is dropped or comes twice; vllm#49674: one failed
    allocation preempts one request after another, and nothing gets on."""
    lengths = [(3 + number, 20) for number in range(8)]
    engine = run(load_of(policy, lengths, num_stages))
    assert engine.stats.preemptions <= 60


@every_policy
@pytest.mark.parametrize("num_stages", [1, 4])
def test_part_done_prompts_do_not_lock_each_other_out(policy, num_stages):
    """DeepSpeed-MII#274: each waits for the blocks of the others."""
    run(load_of(policy, [(POOL - 4, 4)] * 6, num_stages, max_num_batched_tokens=8))


@every_policy
def test_a_cached_prompt_again_and_again_leaks_nothing(policy):
    """xllm#828: blocks that the prefix cache has as well are never given back; and a hit must not
    count blocks as free that it is about to take (sglang#34676)."""
    engine = run(load_of(policy, [(POOL - 8, 4)] * 100, 2, same=True))
    assert engine.stats.cached_prefix_tokens >= 99 * (POOL - 12)


@every_policy
@pytest.mark.parametrize("reason", ["abort", "stop", "error"])
def test_ended_from_outside_at_any_moment(policy, reason):
    """vllm#46240: an abort while more of the request is to come; omlx#1450: one that ends before it
    ran keeps its share of cached blocks."""
    load = load_of(policy, [(6, 8)] * 6, 3, same=True)
    for moment in range(12):
        finish = Finish(reason, 0.011 * moment)
        ends = {RequestId(number): finish for number in (0, 2, 5)}
        run(replace(load, finishes=ends))


@every_policy
def test_a_fault_at_any_moment(policy):
    """vllm#42043: after a pause that clears the cache the first token is dropped."""
    load = load_of(policy, [(6, 8)] * 6, 3)
    for moment in range(12):
        run(replace(load, faults=[Fault(0, 0.011 * moment, 0.0), Fault(1, 0.013 * moment, 0.02)]))


@pytest.mark.parametrize("cost", ["right", "tiled", "learning", "dear", "cheap", "garbage"])
@pytest.mark.parametrize("max_tbt_s", [0.05, 0.3, 3.0])
def test_prompts_and_decodes_that_wait_for_company_get_it(cost, max_tbt_s):
    """sglang#35241: what delays prompts to batch them feeds on itself, and none gets on."""
    lengths = [(4, 60)] * 6 + [(90, 2)] * 6
    run(load_of("uniform", lengths, 4, cost=cost, max_tbt_s=max_tbt_s, num_blocks=400))
