"""Model stages that check every position of a made-up KV cache, and the rules of planning.

`ModelStage` replays microbatches as a real stage would and knows nothing of the engine. What it
keeps in each KV slot is the very prefix that the slot was computed from, so a block that was
shared wrongly, freed too early or overwritten shows as a wrong prefix. The tokens are a function of
the prefix alone, so each request's tokens are known beforehand and must come out the same under
every policy, number of stages, budget, cache size and sequence of faults. Imported KV is put into
the blocks of a request's first admission, in the order of the microbatches, as a host has to do it.
"""

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

from pipeserve.core.engine import Engine, Limits
from pipeserve.core.nouns import (
    Chunk,
    Microbatch,
    Request,
    RequestId,
    StepResult,
    TokenLogprobs,
    Wait,
)
from pipeserve.core.partition import split_layers
from pipeserve.core.view import Policy

VOCAB = 6
MAX_STEPS = 20_000


def next_token(prefix: tuple) -> int:
    """The made-up model: a token is a function of what precedes it. `prefix[0]` is the salt."""
    return blake2b(repr(prefix).encode(), digest_size=2).digest()[0] % VOCAB


def prompt_score(prefix: tuple) -> TokenLogprobs:
    """The made-up log-probability of the last token of a prefix: of this prefix alone."""
    return TokenLogprobs(-float(blake2b(repr(prefix).encode(), digest_size=4).digest()[0]))


def expected(request: Request, max_model_len: int) -> tuple[list[int], str]:
    """The output tokens and finish reason of a request that nobody interrupts."""
    prefix = (request.cache_salt, *request.prompt)
    outputs: list[int] = []
    while True:
        outputs.append(next_token(prefix))
        prefix += (outputs[-1],)
        if outputs[-1] in request.stop_ids and len(outputs) > request.params.min_tokens:
            return outputs, "stop"
        if len(outputs) == request.params.max_tokens or len(prefix) - 1 == max_model_len:
            return outputs, "length"


class ModelStage:
    """One stage: block tables, and for each KV slot the prefix that it was computed from."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.tables: dict[RequestId, list[int]] = {}
        self.kv: dict[tuple[int, int], tuple] = {}
        self.num_run = 0

    def slot(self, request_id: RequestId, position: int) -> tuple[int, int]:
        block = self.tables[request_id][position // self.block_size]
        return block, position % self.block_size

    def run(self, microbatch: Microbatch, prefixes: list[tuple]) -> None:
        """`prefixes`: for each chunk the salt and the tokens up to its stop, as they arrive."""
        for request_id in microbatch.released:
            del self.tables[request_id]
        for admission in microbatch.admitted:
            assert admission.request_id not in self.tables, "admitted twice"
            self.tables[admission.request_id] = list(admission.blocks)
        num_shared = {a.request_id: len(a.blocks) * self.block_size for a in microbatch.admitted}
        for chunk, prefix in zip(microbatch.chunks, prefixes, strict=True):
            self.tables[chunk.request_id].extend(chunk.new_blocks)
            # An admitted request that starts after what it shares starts after what it imports.
            self.fill(
                chunk.request_id, num_shared.get(chunk.request_id, chunk.start), chunk.start, prefix
            )
        # What was there before this microbatch is read first: sharing within one is not allowed.
        for chunk, prefix in zip(microbatch.chunks, prefixes, strict=True):
            for position in range(chunk.start):
                held = self.kv.get(self.slot(chunk.request_id, position))
                assert held == prefix[: position + 2], "attention would read another's KV"
        for chunk, prefix in zip(microbatch.chunks, prefixes, strict=True):
            self.fill(chunk.request_id, chunk.start, chunk.stop, prefix)
        self.num_run += 1

    def fill(self, request_id: RequestId, start: int, stop: int, prefix: tuple) -> None:
        for position in range(start, stop):
            block, offset = self.slot(request_id, position)
            holders = [r for r, table in self.tables.items() if block in table]
            assert holders == [request_id], "writes into a shared block"
            self.kv[block, offset] = prefix[: position + 2]


@dataclass
class Plan:
    """What the checker derived of a request from the microbatches alone, as planned so far."""

    next_position: int
    num_tokens: int
    """Known or on their way."""
    blocks: list[int]
    sampled_by: dict[int, int] = field(default_factory=dict)
    """Position of a token -> index of the microbatch that samples it."""


class PlanChecker:
    """The rules that hold when a microbatch is planned."""

    def __init__(self, engine: Engine, limits: Limits, window: int):
        self.engine, self.limits, self.window = engine, limits, window
        self.traits = engine.policy.traits
        self.plans: dict[RequestId, Plan] = {}
        self.num_imported: dict[RequestId, int] = {}
        """Positions that a request may still import: none after its first admission, or a fault."""
        self.outstanding: deque[Microbatch] = deque()
        self.num_scored: dict[RequestId, int] = {}
        """Prompt positions whose scores came back."""
        self.last_index = -1

    def planned(self, microbatch: Microbatch, requests: dict[RequestId, Request]) -> None:
        assert microbatch.index == self.last_index + 1
        self.last_index = microbatch.index
        assert microbatch.chunks
        assert microbatch.num_tokens <= self.limits.max_num_batched_tokens
        named = [chunk.request_id for chunk in microbatch.chunks]
        assert len(named) == len(set(named)), "a request twice in a microbatch"
        assert len(microbatch.released) == len(set(microbatch.released))
        for request_id in microbatch.released:
            del self.plans[request_id]
        for admission in microbatch.admitted:
            self.admitted(admission, requests[admission.request_id])
        for chunk in microbatch.chunks:
            self.chunk(chunk, microbatch.index, requests[chunk.request_id])
        self.outstanding.append(microbatch)
        assert len(self.outstanding) <= self.window + self.traits.plans_ahead
        if self.traits.whole_prompts:
            ended = {c.request_id for c in microbatch.chunks if c.num_logits}
            assert ended == set(named), "a prompt in more than one chunk"
        assert len(self.plans) <= self.limits.max_num_seqs
        held = {block for plan in self.plans.values() for block in plan.blocks}
        assert len(held) + self.engine.num_free_blocks == self.limits.num_blocks, "leaked blocks"

    def admitted(self, admission, request: Request) -> None:
        request_id = admission.request_id
        assert request_id not in self.plans, "admitted twice"
        assert admission.num_prompt_tokens == len(request.prompt)
        outputs = expected(request, self.limits.max_model_len)[0]
        full = (*request.prompt, *outputs)
        assert tuple(admission.token_ids) == full[: len(admission.token_ids)]
        assert not any(request_id in self.named(mb) for mb in self.outstanding), "still runs out"
        num_imported = self.num_imported.pop(request_id, 0)
        assert not (num_imported and admission.blocks), "imports and shares"
        assert not (self.num_unscored(request) and admission.blocks), "shares unscored positions"
        start = num_imported or len(admission.blocks) * self.limits.block_size
        assert start < len(admission.token_ids), "the last token must be computed"
        self.plans[request_id] = Plan(start, len(admission.token_ids), list(admission.blocks))

    def chunk(self, chunk, index: int, request: Request) -> None:
        plan = self.plans[chunk.request_id]
        others = {
            block for r, p in self.plans.items() if r != chunk.request_id for block in p.blocks
        }
        assert not others & set(chunk.new_blocks), "a new block belongs to another request"
        assert not set(plan.blocks) & set(chunk.new_blocks), "a new block is in the table already"
        plan.blocks.extend(chunk.new_blocks)
        assert chunk.start == plan.next_position < chunk.stop <= plan.num_tokens
        assert chunk.stop <= len(plan.blocks) * self.limits.block_size
        self.feedback(chunk, plan)
        involved = [mb for mb in self.outstanding if chunk.request_id in self.named(mb)]
        if self.traits.one_in_flight:
            assert not involved
        if not self.traits.chunk_pipelining and not plan.sampled_by:
            assert not involved, "the next chunk of a prompt before the last one came back"
        plan.next_position = chunk.stop
        samples = chunk.stop == plan.num_tokens
        assert chunk.num_logits - chunk.num_scored == samples
        self.scores(chunk, request)
        if samples:
            plan.sampled_by[chunk.stop] = index
            plan.num_tokens += 1
            limit = min(len(request.prompt) + request.params.max_tokens, self.limits.max_model_len)
            assert plan.num_tokens <= limit, "a decode that no answer can use"

    def scores(self, chunk: Chunk, request: Request) -> None:
        """Only what was not scored before, and no further than to the prompt's last token."""
        if not self.num_unscored(request):
            assert chunk.num_scored == 0
        first = chunk.stop - chunk.num_logits
        assert chunk.num_scored >= 0 and first >= chunk.start
        assert not chunk.num_scored or first + chunk.num_scored < len(request.prompt)

    def num_unscored(self, request: Request) -> int:
        if request.params.prompt_logprobs is None:
            return 0
        return len(request.prompt) - 1 - self.num_scored.get(request.id, 0)

    def completed(self, index: int) -> None:
        microbatch = self.outstanding.popleft()
        assert microbatch.index == index
        for chunk in microbatch.chunks:
            known = self.num_scored.get(chunk.request_id, 0)
            self.num_scored[chunk.request_id] = known + chunk.num_scored

    def feedback(self, chunk, plan: Plan) -> None:
        """`token_from` names the microbatch that samples the token, exactly while it is awaited."""
        waiting_for = {mb.index for mb in self.outstanding}
        on_way = [index for index in plan.sampled_by.values() if index in waiting_for]
        assert len(on_way) <= 1, "more than one decode in flight and one planned ahead"
        source = plan.sampled_by.get(chunk.start)
        assert chunk.token_from == (source if source in waiting_for else None)
        if chunk.token_from is not None:
            assert chunk.num_tokens == 1

    @staticmethod
    def named(microbatch: Microbatch) -> set[RequestId]:
        return {chunk.request_id for chunk in microbatch.chunks}


class Pipeline:
    """An engine over model stages; `step` does one thing that could happen next."""

    def __init__(self, policy: Policy, num_stages: int, limits: Limits):
        self.limits = limits
        self.engine = Engine(split_layers(num_stages, num_stages), policy, limits)
        self.checker = PlanChecker(self.engine, limits, window=num_stages)
        self.num_stages = num_stages
        self.requests: dict[RequestId, Request] = {}
        self.outputs: dict[RequestId, list[int]] = {}
        self.reasons: dict[RequestId, str] = {}
        self.scores: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        self.reset_stages()

    def reset_stages(self) -> None:
        self.stages = [ModelStage(self.limits.block_size) for _ in range(self.num_stages)]
        self.crossing: list[Microbatch] = []  # every microbatch since the last fault
        self.prefixes: list[list[tuple]] = []  # parallel: what its activations carry
        self.first_stage_tokens: dict[RequestId, tuple] = {}
        self.results: deque[StepResult] = deque()

    # ---- what can happen ------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.outputs[request.id] = []
        self.checker.num_imported[request.id] = request.num_imported
        self.engine.add(request, 0.0)

    def plan(self) -> bool:
        planned = self.engine.plan(0.0)
        if isinstance(planned, Wait):
            self.check_wait(planned)
            return False
        self.checker.planned(planned, self.requests)
        self.crossing.append(planned)
        return True

    def run_stage(self, stage: int) -> bool:
        """The stage's next microbatch, if its inputs are there."""
        number = self.stages[stage].num_run
        if stage == 0:
            if number == len(self.crossing) or not self.start(self.crossing[number]):
                return False
        elif number == self.stages[stage - 1].num_run:
            return False
        self.stages[stage].run(self.crossing[number], self.prefixes[number])
        if stage == self.num_stages - 1:
            self.sample(number)
        return True

    def start(self, microbatch: Microbatch) -> bool:
        """Stage 0 looks up the tokens; False while one is still on its way."""
        tokens = dict(self.first_stage_tokens)
        for request_id in microbatch.released:
            tokens.pop(request_id, None)
        for admission in microbatch.admitted:
            salt = self.requests[admission.request_id].cache_salt
            tokens[admission.request_id] = (salt, *admission.token_ids)
        for chunk in microbatch.chunks:
            if len(tokens[chunk.request_id]) - 1 < chunk.stop:
                assert chunk.token_from is not None, "a token that nobody announced"
                return False
        self.first_stage_tokens = tokens
        self.prefixes.append(
            [tokens[chunk.request_id][: chunk.stop + 1] for chunk in microbatch.chunks]
        )
        return True

    def sample(self, number: int) -> None:
        """The last stage: tokens straight to stage 0, and to the engine's letter box."""
        microbatch = self.crossing[number]
        sampled, scored = [], []
        for chunk, prefix in zip(microbatch.chunks, self.prefixes[number], strict=True):
            salted = (prefix[0], *self.requests[chunk.request_id].prompt)
            first = chunk.stop - chunk.num_logits
            scored += [prompt_score(salted[: first + i + 3]) for i in range(chunk.num_scored)]
            if chunk.num_logits == chunk.num_scored:
                continue
            sampled.append(next_token(prefix))
            known = self.first_stage_tokens.get(chunk.request_id, ())
            if known == prefix:  # else stage 0 was told to release it, or admitted it anew
                self.first_stage_tokens[chunk.request_id] = (*known, sampled[-1])
        self.results.append(
            StepResult(microbatch.index, tuple(sampled), prompt_logprobs=tuple(scored))
        )

    def deliver(self) -> bool:
        if not self.results:
            return False
        result = self.results.popleft()
        self.checker.completed(result.index)
        for output in self.engine.complete(result, 0.0):
            assert output.request_id not in self.reasons, "output after the end"
            self.outputs[output.request_id].append(output.token)
            if output.prompt_logprobs is not None:
                assert output.request_id not in self.scores, "told twice"
                self.scores[output.request_id] = output.prompt_logprobs
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
        return True

    def finish(self, request_id: RequestId) -> None:
        ended = self.engine.finish(request_id, "abort", 0.0)
        assert (ended is None) == (request_id in self.reasons)
        if ended is not None:
            self.reasons[request_id] = ended.finish_reason

    def lose(self) -> None:
        self.engine.lost(0.0)
        self.checker.plans.clear()
        self.checker.num_imported.clear()
        self.checker.outstanding.clear()
        assert self.engine.outstanding == ()
        assert self.engine.num_free_blocks == self.limits.num_blocks
        self.reset_stages()

    # ---- checks ---------------------------------------------------------------------------------

    def check_wait(self, wait: Wait) -> None:
        assert (wait.reason == "no_requests") == (self.engine.num_unfinished == 0)
        if wait.reason == "no_requests":
            return
        is_full = len(self.engine.outstanding) == self.checker.window + (
            self.checker.traits.plans_ahead
        )
        assert (wait.reason == "window") == is_full
        assert wait.reason in ("window", "kv", "token")
        assert self.engine.outstanding, "waits for nothing"

    def drain(self) -> None:
        """Everything in turn, last stage first so that the pipe fills, until nothing is left."""
        for _ in range(MAX_STEPS):
            moved = self.deliver()
            for stage in reversed(range(self.num_stages)):
                moved |= self.run_stage(stage)
            while self.plan():
                moved = True
            if not moved:
                return
        raise AssertionError("no end")

    def check_end(self) -> None:
        assert not self.engine.has_work
        assert self.engine.num_unfinished == 0
        assert self.engine.outstanding == ()
        assert self.engine.num_free_blocks == self.limits.num_blocks, "leaked blocks"
        for request_id, request in self.requests.items():
            tokens, reason = expected(request, self.limits.max_model_len)
            got = self.outputs[request_id]
            assert self.scores.get(request_id) == self.expected_scores(request)
            if self.reasons[request_id] == "abort":
                assert got == tokens[: len(got)]
            else:
                assert (got, self.reasons[request_id]) == (tokens, reason)

    def expected_scores(self, request: Request) -> tuple[TokenLogprobs, ...] | None:
        """Of each prompt token but the first, once there is an output."""
        if request.params.prompt_logprobs is None or not self.outputs[request.id]:
            return None
        salted = (request.cache_salt, *request.prompt)
        return tuple(prompt_score(salted[: i + 2]) for i in range(1, len(request.prompt)))
