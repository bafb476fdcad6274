"""The rules that hold when a microbatch is planned, by what the microbatches themselves say."""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from model_stages import Story

from pipeserve.core.engine import Engine
from pipeserve.core.nouns import Admission, BlockId, Chunk, Microbatch, Request, RequestId, Wait
from pipeserve.core.order import BINDING
from pipeserve.core.queues import MAX_ON_WAY
from pipeserve.core.view import Draft, Policy, RequestView, View


class InOrder:
    """A policy whose drafts are checked to keep to the order: none admits a request and leaves one
    of lower precedence waiting, none preempts a request and lets one run that is to go first."""

    def __init__(self, policy: Policy):
        self.policy, self.name, self.traits = policy, policy.name, policy.traits

    def compose(self, view: View, now: float) -> Draft:
        draft = self.policy.compose(view, now)
        check_order(view.waiting, draft.admit)
        running = list(view.running)
        kept = len(running) - len(draft.preempt)
        assert set(draft.preempt).isdisjoint(running[:kept]), "out of order"
        if view.limits.order in BINDING:
            check_order(view.running, running[:kept])
        return draft


def check_order(queue: Mapping[RequestId, RequestView], first: Collection[RequestId]) -> None:
    """Whether those that go first come before the others, by what each is marked with."""
    later = [view.precedence for each, view in queue.items() if each not in first]
    if first and later:
        assert max(queue[each].precedence for each in first) <= min(later), "out of order"


@dataclass(slots=True)
class Plan:
    """What is planned of an admitted request."""

    next_position: int
    num_tokens: int
    """Known or on their way."""
    num_prefill: int
    """Tokens that were known when it was admitted."""
    blocks: list[BlockId]
    sampled_by: dict[int, int] = field(default_factory=dict)
    """Position of a token -> index of the microbatch that samples it."""
    last_index: int = -1
    """Of the microbatches that name it; -1: none yet since it was admitted."""


class PlanChecker:
    """Follows an engine from outside, and asserts at each microbatch that it keeps to its rules."""

    def __init__(self, engine: Engine):
        self.engine, self.limits, self.traits = engine, engine.limits, engine.policy.traits
        self.asked()
        self.requests: dict[RequestId, Request] = {}
        self.stories: dict[RequestId, Story] = {}
        self.plans: dict[RequestId, Plan] = {}
        self.num_held = 0
        self.num_holders = [0] * self.limits.num_blocks
        self.num_imported: dict[RequestId, int] = {}
        """Positions that a request may still import: none after its first admission, or a fault."""
        self.num_scored: dict[RequestId, int] = {}
        """Prompt positions whose scores came back, of requests that want them."""
        self.outstanding: deque[Microbatch] = deque()
        self.named_last: dict[RequestId, int] = {}
        """The last microbatch that names it, preempted since or not."""
        self.last_index = -1

    def asked(self) -> None:
        """The engine is about to plan."""
        self.most_outstanding = self.engine.window + self.traits.plans_ahead

    def added(self, request: Request) -> None:
        self.requests[request.id] = request
        self.stories[request.id] = Story(request, self.limits.max_model_len)
        self.num_imported[request.id] = request.num_imported

    def planned(self, microbatch: Microbatch) -> None:
        assert microbatch.index == self.last_index + 1
        self.last_index = microbatch.index
        assert microbatch.chunks
        assert microbatch.num_tokens <= self.limits.max_num_batched_tokens
        named = {chunk.request_id for chunk in microbatch.chunks}
        assert len(named) == len(microbatch.chunks), "a request twice in a microbatch"
        for request_id in microbatch.released:  # raises KeyError for one that is there twice
            self._hold(self.plans.pop(request_id).blocks, -1)
        for admission in microbatch.admitted:
            assert admission.request_id in named
            self._admitted(admission)
        for chunk in microbatch.chunks:
            self._chunk(chunk, microbatch.index)
        self.outstanding.append(microbatch)
        assert len(self.outstanding) <= self.most_outstanding
        assert len(self.plans) <= self.limits.max_num_seqs
        free = self.engine.num_free_blocks
        assert self.num_held + free == self.limits.num_blocks, "leaked blocks"

    def waits(self, wait: Wait) -> None:
        assert (wait.reason == "no_requests") == (not self.engine.num_unfinished)
        if wait.reason != "no_requests":
            is_full = len(self.outstanding) >= self.most_outstanding
            assert (wait.reason == "window") == is_full
            assert wait.reason in ("window", "kv", "token")
            assert self.outstanding, "waits for nothing"

    def completed(self, index: int) -> None:
        microbatch = self.outstanding.popleft()
        assert microbatch.index == index
        for chunk in microbatch.chunks:
            if chunk.num_scored:
                known = self.num_scored.get(chunk.request_id, 0)
                self.num_scored[chunk.request_id] = known + chunk.num_scored

    def lost(self) -> None:
        """All outstanding is void, and nothing holds a block."""
        self.plans.clear()
        self.num_imported.clear()
        self.outstanding.clear()
        self.named_last.clear()
        self.num_holders = [0] * self.limits.num_blocks
        self.num_held = 0
        assert self.engine.outstanding == ()
        assert self.engine.num_free_blocks == self.limits.num_blocks

    # ---- one microbatch -------------------------------------------------------------------------

    def _hold(self, blocks: list[BlockId], change: int) -> None:
        holders = self.num_holders
        for block in blocks:
            self.num_held -= holders[block] > 0
            holders[block] += change
            self.num_held += holders[block] > 0

    def _is_outstanding(self, index: int) -> bool:
        return bool(self.outstanding) and self.outstanding[0].index <= index

    def _admitted(self, admission: Admission) -> None:
        request_id, num_known = admission.request_id, len(admission.token_ids)
        assert request_id not in self.plans, "admitted twice"
        request = self.requests[request_id]
        assert admission.num_prompt_tokens == len(request.prompt)
        assert list(admission.token_ids) == self.stories[request_id].tokens[:num_known]
        assert not self._is_outstanding(self.named_last.get(request_id, -1)), "still runs out"
        num_imported = self.num_imported.pop(request_id, 0)
        assert not (num_imported and admission.blocks), "imports and shares"
        assert not (self._num_unscored(request) and admission.blocks), "shares unscored positions"
        start = num_imported or len(admission.blocks) * self.limits.block_size
        assert start < num_known, "the last token must be computed"
        blocks = list(admission.blocks)
        assert len(set(blocks)) == len(blocks)
        self._hold(blocks, 1)
        self.plans[request_id] = Plan(start, num_known, num_known, blocks)

    def _chunk(self, chunk: Chunk, index: int) -> None:
        request_id, start, stop, new_blocks, _, num_logits, num_scored = chunk
        request, plan = self.requests[request_id], self.plans[request_id]
        if new_blocks:
            assert not any(self.num_holders[block] for block in new_blocks), "a block of another"
            self._hold(new_blocks, 1)
            plan.blocks += new_blocks
        assert start == plan.next_position < stop <= plan.num_tokens
        assert stop <= len(plan.blocks) * self.limits.block_size
        self._feedback(chunk, plan)
        if self._is_outstanding(plan.last_index):
            assert not self.traits.one_in_flight
            if not plan.sampled_by:
                assert self.traits.chunk_pipelining, "the next chunk before the last one came back"
        plan.last_index = self.named_last[request_id] = index
        plan.next_position = stop
        samples = stop == plan.num_tokens
        assert samples or not self.traits.whole_prompts, "a prompt in more than one chunk"
        assert num_logits - num_scored == samples
        if request.params.prompt_logprobs is not None or num_scored:
            self._scores(chunk, request)
        if samples:
            plan.sampled_by[stop] = index
            plan.num_tokens += 1
            limit = min(len(request.prompt) + request.params.max_tokens, self.limits.max_model_len)
            assert plan.num_tokens <= limit, "a decode that no answer can use"

    def _scores(self, chunk: Chunk, request: Request) -> None:
        """Only what was not scored before, and no further than to the prompt's last token."""
        if not self._num_unscored(request):
            assert chunk.num_scored == 0
        first = chunk.stop - chunk.num_logits
        assert chunk.num_scored >= 0 and first >= chunk.start
        assert not chunk.num_scored or first + chunk.num_scored < len(request.prompt)

    def _num_unscored(self, request: Request) -> int:
        if request.params.prompt_logprobs is None:
            return 0
        return len(request.prompt) - 1 - self.num_scored.get(request.id, 0)

    def _feedback(self, chunk: Chunk, plan: Plan) -> None:
        """`token_from` names the microbatch that samples the token at the chunk's start, exactly
        while it is awaited."""
        newest = list(plan.sampled_by.values())[-MAX_ON_WAY:]
        num_on_way = sum([self._is_outstanding(index) for index in newest])
        assert num_on_way < MAX_ON_WAY, "more than one decode in flight and one planned ahead"
        source = plan.sampled_by.get(chunk.start)
        awaited = source is not None and self._is_outstanding(source)
        assert chunk.token_from == (source if awaited else None)
        if awaited:
            assert chunk.stop == chunk.start + 1
            assert self.traits.plans_ahead
