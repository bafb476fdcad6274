"""The engine's rules under random load: see `plan_checker.py` and `model_stages.py`.

Few examples of each policy: `test_loads.py` takes all of them through more. What only is here is a
policy that drafts whatever the rules allow.
"""

import random
from collections import deque
from dataclasses import dataclass, replace

import pytest
from hand_driven import Pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_stages import VOCAB

from pipeserve.core.engine import Limits
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.core.view import Draft, Policy, RequestView, Traits, View
from pipeserve.sampling_params import SamplingParams


class Chaotic:
    """Drafts at random what the rules allow, to reach what sensible policies never do.

    Admits out of order, reserves no more than it runs, preempts for no reason (at first), decodes
    as far ahead as it may.
    """

    name = "chaotic"

    def __init__(self, traits: Traits, seed: int):
        self.traits = traits
        self.random = random.Random(seed)
        self.whims = 10  # preemptions for no reason that are left; without end nothing would end

    def compose(self, view: View, now: float) -> Draft:
        if view.running and self.whims and self.random.random() < 0.1:
            self.whims -= 1
            return Draft(preempt=(self.random.choice(list(view.running)),))
        draft = self.chunks(view)
        if not draft.chunks and not view.outstanding and view.running:
            return Draft(preempt=(list(view.running)[-1],))
        return draft

    def chunks(self, view: View) -> Draft:
        budget, free = view.limits.max_num_batched_tokens, view.free_blocks
        chunks: dict[RequestId, int] = {}
        admit: dict[RequestId, int] = {}
        for request in self.shuffled(view):
            is_waiting = request.id in view.waiting
            start, slots, most = request.num_planned, request.num_slots, 1
            if is_waiting:
                prefix = view.prefix(request.id)
                start, slots = prefix.num_tokens, prefix.num_blocks * view.limits.block_size
            if request.id not in view.decodes:
                most = request.num_known - start
            num_tokens = min(self.random.randint(1, most), budget)
            missing = -(-(start + num_tokens - slots) // view.limits.block_size)
            missing += prefix.num_idle if is_waiting else 0
            full = len(view.running) + len(admit) == view.limits.max_num_seqs
            if not num_tokens or missing > free or (is_waiting and full):
                continue
            chunks[request.id] = num_tokens
            budget, free = budget - num_tokens, free - max(0, missing)
            if is_waiting:
                admit[request.id] = start + num_tokens
        return Draft(chunks=chunks, admit=admit)

    def shuffled(self, view: View) -> list[RequestView]:
        requests = [*view.decodes.values(), *view.prefills.values()]
        if self.whims or not view.running:  # later one at a time, which always comes to an end
            requests += [r for r in view.waiting.values() if not r.num_outstanding]
        self.random.shuffle(requests)
        return requests


@dataclass
class Scenario:
    num_stages: int
    limits: Limits
    requests: list[Request]
    events: bytes


@st.composite
def scenarios(draw) -> Scenario:
    """Small everything: two trunks that prompts share, blocks of 1..4, room for little more than
    the largest request, budgets from one token; some requests import a part of their KV, some are
    further samples of others, some want their prompt scored."""
    block_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(8, 24))
    trunks = [draw(st.lists(st.integers(0, 1), min_size=16, max_size=16)) for _ in range(2)]
    requests = []
    for number in range(draw(st.integers(1, 8))):
        trunk = trunks[draw(st.integers(0, 1))][: draw(st.sampled_from([0, 1, 4, 6, 9, 16]))]
        tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=not trunk, max_size=4))
        prompt = tuple([*trunk, *tail][: max_model_len - 1])
        salt = draw(st.sampled_from(["", "", "", "x"]))
        sample_of = None
        if requests and draw(st.booleans()):  # a further sample of an earlier prompt
            first = draw(st.sampled_from(requests))
            sample_of, prompt, salt = first.id, first.prompt, first.cache_salt
        params = SamplingParams(
            max_tokens=draw(st.integers(1, 10)),
            min_tokens=draw(st.integers(0, 3)),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        )
        imports = draw(st.sampled_from(["no", "no", "some", "all but the last"]))
        if params.prompt_logprobs is not None:
            imports = "no"
        num_imported = {
            "no": 0,
            "some": draw(st.integers(0, len(prompt) - 1)),
            "all but the last": len(prompt) - 1,
        }[imports]
        requests.append(
            Request(
                id=RequestId(number),
                prompt=prompt,
                num_imported=num_imported,
                params=params,
                stop_ids=frozenset(draw(st.sets(st.integers(0, VOCAB - 1), max_size=2))),
                cache_salt=salt,
                sample_of=sample_of,
            )
        )
    reach = max(min(len(r.prompt) + r.params.max_tokens, max_model_len) - 1 for r in requests)
    limits = Limits(
        num_blocks=-(-reach // block_size) + draw(st.integers(0, 12)),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 3, 5, 8, 24])),
        max_model_len=max_model_len,
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
    )
    num_events = draw(st.sampled_from([0, 20, 100, 400]))
    events = draw(st.binary(min_size=num_events, max_size=num_events))
    return Scenario(draw(st.integers(1, 8)), limits, requests, events)


def play(policy: Policy, scenario: Scenario, faults: bool = True) -> Pipeline:
    """Random events first, then whatever is left, in turn. Every request comes to the tokens that
    it comes to alone, whatever the schedule."""
    pipeline = Pipeline(policy, scenario.num_stages, suited(scenario.limits, policy.traits))
    arriving = deque(scenario.requests)
    for event_number, event in enumerate(scenario.events):
        kind, detail = event // 8, event % 8
        if kind < 3 and arriving:
            pipeline.add(arriving.popleft())
        elif kind < 10:
            pipeline.plan()
        elif kind < 24:
            pipeline.run_stage(detail % scenario.num_stages)
        elif kind < 31:
            pipeline.deliver()
        elif faults and detail == 0:
            pipeline.lose()
        elif faults and pipeline.requests and detail < 3:
            pipeline.finish(RequestId(event_number % len(pipeline.requests)))
        elif faults and pipeline.requests and detail < 5:
            if detail == 3:
                pipeline.lose()
            request_id = RequestId(event_number % len(pipeline.requests))
            pipeline.run_alone(request_id if event_number % 3 else None)
    for request in arriving:
        pipeline.add(request)
    pipeline.drain()
    pipeline.check_end()
    return pipeline


def suited(limits: Limits, traits: Traits) -> Limits:
    """The same, with room for the longest prompt in a microbatch where the policy needs it."""
    if not traits.whole_prompts:
        return limits
    budget = limits.max_num_batched_tokens + limits.max_model_len - 1
    return replace(limits, max_num_batched_tokens=budget)


def checked(max_examples: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=slow)


@pytest.mark.parametrize("name", sorted(POLICIES))
@checked(30)
@given(scenario=scenarios())
def test_every_rule_holds_under_random_load_finishes_and_faults(name, scenario):
    play(get_policy(name), scenario)


@checked(400)
@given(
    scenario=scenarios(),
    traits=st.builds(
        Traits,
        plans_ahead=st.booleans(),
        chunk_pipelining=st.booleans(),
        one_in_flight=st.booleans(),
    ),
    seed=st.integers(0, 99),
)
def test_every_rule_holds_whatever_a_policy_drafts(scenario, traits, seed):
    play(Chaotic(traits, seed), scenario)


@checked(20)
@given(scenario=scenarios())
def test_the_same_calls_give_the_same_microbatches(scenario):
    first, second = (play(get_policy("uniform"), scenario) for _ in range(2))
    assert first.crossing == second.crossing
    assert first.engine.stats == second.engine.stats
