"""Every policy under hundreds of requests of which a few are most of the work, in a pool too small
for all of them: what `load_runs.py` checks at each step, and what only a whole run shows."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from load_runs import CheckedEngine, run
from loads import Finish, Load

from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.order import ORDERS, PASSED
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.request_state import check_fits
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError
from pipeserve.sampling_params import SamplingParams

CONTEXT = 1500
WORDS = 5
"""Token ids of prompts."""


@st.composite
def heavy_tails(draw, policy: str) -> Load:
    """Half of the prompts are under 20 tokens and some as long as can be; many begin alike, or come
    at once. The pool may be smaller than the context. Some leave at any moment."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    num_stages = draw(st.sampled_from([1, 2, 3, 4, 8]))
    block_size = draw(st.sampled_from([1, 4, 16]))
    limits = Limits(
        num_blocks=-(-draw(st.sampled_from([300, 800, 1600, 5000])) // block_size),
        block_size=block_size,
        max_num_seqs=draw(st.sampled_from([num_stages, 16, 256])),
        max_num_batched_tokens=draw(st.sampled_from([16, 64, 512]))
        + CONTEXT * get_policy(policy).traits.whole_prompts,
        max_model_len=CONTEXT,
        enable_prefix_caching=draw(st.booleans()),
        max_tbt_s=draw(st.sampled_from([None, 0.3])),
        order=draw(st.sampled_from(list(ORDERS))),
    )
    leave, apart_s = draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.0, 0.02, 0.1]))
    trunk = rng.choices(range(WORDS), k=CONTEXT)
    now, arrivals, finishes = 0.0, [], {}
    for number in range(draw(st.integers(150, 300))):
        if rng.random() < 0.5:  # else at the same moment as the one before
            now += rng.expovariate(1 / apart_s) if apart_s else 0.0
        request = a_request(rng, number, trunk)
        if not fits(request, limits):
            continue
        arrivals.append((now, request))
        if rng.random() < leave:
            finishes[request.id] = Finish("abort", now + rng.choice([0.0, rng.expovariate(1)]))
    return Load(
        seed=0,
        policy=policy,
        num_stages=num_stages,
        window=num_stages,
        limits=limits,
        cost=draw(st.sampled_from(["none", "right", "tiled", "rough"])),
        clock=draw(st.sampled_from(["runs", "stands still"])),
        slow=1.0,
        arrivals=arrivals,
        finishes=finishes,
    )


def a_request(rng: random.Random, number: int, trunk: list[int]) -> Request:
    length = min(int(10 * rng.paretovariate(1.0)), CONTEXT - 1)
    prompt = trunk[:length] if rng.random() < 0.3 else rng.choices(range(WORDS), k=length)
    params = SamplingParams(max_tokens=min(int(4 * rng.paretovariate(1.2)), 300), seed=number)
    priority = rng.choice([-1, 0, 0, 0, 7])
    return Request(id=RequestId(number), prompt=tuple(prompt), params=params, priority=priority)


def fits(request: Request, limits: Limits) -> bool:
    """Whether the request can ever run; if not, it is refused with what it needs, what there is
    and what helps."""
    num_positions = min(len(request.prompt) + request.max_tokens, CONTEXT) - 1
    num_slots = limits.num_blocks * limits.block_size
    if num_positions <= num_slots:
        check_fits(request, limits)
        return True
    needs = f"{num_positions} positions and the KV cache holds {num_slots}: lower max_tokens or"
    with pytest.raises(CapacityError, match=needs):
        check_fits(request, limits)
    return False


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_all_come_to_their_own_tokens_and_none_is_passed_by_more_than_its_share(policy, data):
    load = data.draw(heavy_tails(policy))
    engine = run(load)
    if load.limits.order == "sjf":
        check_passes(engine, [request for _, request in load.arrivals])


def check_passes(engine: CheckedEngine, requests: list[Request]) -> None:
    """Prompts that came later and were first admitted in an earlier microbatch are together at most
    `PASSED` times as long, whatever was preempted or left meanwhile."""
    first: dict[RequestId, int] = {}
    for microbatch in engine.microbatches:
        for admission in microbatch.admitted:
            first.setdefault(admission.request_id, microbatch.index)
    for place, request in enumerate(requests):
        if request.id not in first:
            continue  # it left before its turn
        later = [each for each in requests[place + 1 :] if each.id in first]
        passed_by = sum(len(e.prompt) for e in later if first[e.id] < first[request.id])
        assert passed_by <= PASSED * len(request.prompt)
