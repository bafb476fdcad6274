"""Stages are lost at 500 random moments, some twice in a row, some while requests recompute what
the loss before took: no token is lost or doubled, and no block leaked."""

import random
from collections import Counter

import pytest
from hand_driven import Pipeline
from model_stages import VOCAB

from pipeserve.core.engine import Limits
from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.policies import POLICIES, get_policy
from pipeserve.sampling_params import SamplingParams

MOMENTS = 500
GROUPS = 10
"""Of moments, so that one that fails is found again soon."""


class Run:
    """Requests that come and go, in steps of whatever may happen next."""

    def __init__(self, draw: random.Random, policy: str):
        self.draw = draw
        whole = get_policy(policy).traits.whole_prompts
        limits = Limits(
            num_blocks=draw.randint(14, 24),
            block_size=draw.choice([1, 2, 4]),
            max_num_seqs=draw.randint(2, 5),
            max_num_batched_tokens=40 if whole else draw.choice([3, 5, 8]),
            max_model_len=13,
            enable_prefix_caching=draw.random() < 0.7,
        )
        self.pipeline = Pipeline(get_policy(policy), draw.randint(1, 4), limits)
        trunk = [draw.randrange(VOCAB) for _ in range(8)]
        self.arriving = [self.request(number, trunk) for number in range(draw.randint(3, 7))]
        self.reached: Counter[RequestId] = Counter()
        """Outputs that each request had at the latest loss."""

    def request(self, number, trunk):
        draw = self.draw
        prompt = [*trunk[: draw.choice([0, 3, 8])], *draw.choices(range(VOCAB), k=2)]
        params = SamplingParams(
            max_tokens=draw.randint(1, 6), seed=number, prompt_logprobs=draw.choice([None, None, 0])
        )
        stops = frozenset(draw.sample(range(VOCAB), draw.choice([0, 0, 1])))
        return Request(id=RequestId(number), prompt=tuple(prompt), params=params, stop_ids=stops)

    def goes_on(self, num_steps: int) -> None:
        pipeline, draw = self.pipeline, self.draw
        for _ in range(num_steps):
            kind = draw.random()
            if kind < 0.1 and self.arriving:
                pipeline.add(self.arriving.pop())
            elif kind < 0.4:
                pipeline.plan()
            elif kind < 0.8:
                pipeline.run_stage(draw.randrange(pipeline.num_stages))
            else:
                pipeline.deliver()

    def points(self) -> Counter[str]:
        """Where in their lives the requests are."""
        found: Counter[str] = Counter()
        view = self.pipeline.engine
        for request in self.pipeline.requests:
            outputs = len(self.pipeline.outputs[request])
            if request in self.pipeline.reasons:
                found["has ended"] += 1
                continue
            aboard = any(request in view.requests_of(index) for index in view.outstanding)
            what = "outstanding" if aboard else "known"
            if self.reached.get(request, -1) == outputs:
                found[f"computes again, {what}"] += 1
            elif outputs:
                found[f"decodes, {what}"] += 1
            else:
                found[f"no token yet, {what}"] += 1
        return found

    def loses(self) -> Counter[str]:
        found = self.points()
        for request, tokens in self.pipeline.outputs.items():
            self.reached[request] = len(tokens)
        self.pipeline.lose()
        return found

    def ends(self) -> None:
        for request in self.arriving:
            self.pipeline.add(request)
        self.pipeline.drain()
        self.pipeline.check_end()


def lose_somewhere(moment: int) -> Counter[str]:
    """Where the requests were."""
    draw = random.Random(moment)
    run = Run(draw, sorted(POLICIES)[moment % len(POLICIES)])
    run.goes_on(draw.randint(0, 150))
    found = run.loses()
    how = draw.choice(["once", "twice in a row", "while recomputing", "while recomputing"])
    if how == "twice in a row":
        found += run.loses()
    elif how == "while recomputing":
        for _ in range(draw.randint(1, 3)):
            run.goes_on(draw.randint(1, 25))
            found += run.loses()
    run.ends()
    return found


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_token_is_lost_or_doubled_and_no_block_leaked(group):
    for moment in range(group, MOMENTS, GROUPS):
        lose_somewhere(moment)


def test_the_moments_are_at_every_point_of_a_request_s_life():
    found: Counter[str] = Counter()
    for moment in range(0, MOMENTS, 5):
        found += lose_somewhere(moment)
    points = ["no token yet", "decodes", "computes again"]
    wanted = {f"{point}, {what}" for point in points for what in ("outstanding", "known")}
    assert found.keys() == wanted | {"has ended"} and min(found.values()) >= 10, found
