"""The engine's private record of one unfinished request.

What is here, and in queues.py, runs twice for each decode, when it is planned and when its token is
known. Both are kept to a few attribute and dictionary operations: at a thousand running requests
they are most of what planning costs.

A garbage collection visits whatever a list, a set or an object refers to, and stops the run for it.
So what a request has many of (tokens, blocks, keys) is kept in arrays and in tuples of plain
values, whose contents it does not visit.
"""

from array import array
from collections.abc import Iterable

from pipeserve.core.blocks import BlockPool, BlockTable, new_keys
from pipeserve.core.nouns import Begun, BlockId, Request, TokenLogprobs
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError

_MAX_TOKEN_ID = 2**31 - 1  # as wide as messages carry them


class RequestState:
    """Progress of one request. What policies may read of it is declared by `RequestView`."""

    __slots__ = (
        "_caches",
        "admitted_s",
        "arrived",
        "backlog",
        "context",
        "finished",
        "held",
        "id",
        "is_decoding",
        "keys",
        "last_token_s",
        "limits",
        "num_cached",
        "num_imported",
        "num_known",
        "num_longest",
        "num_on_way",
        "num_outstanding",
        "num_planned",
        "num_prompt",
        "num_slots",
        "number",
        "precedence",
        "prefilling",
        "prompt_logprobs",
        "request",
        "running",
        "table",
        "token_from",
        "tokens",
        "was_admitted",
    )

    def __init__(
        self,
        request: Request,
        number: int,
        precedence: float,
        arrived: float,
        limits: Limits,
        pool: BlockPool,
    ):
        self.id = request.id
        self.request = request
        self.number = number  # order of arrival
        self.precedence = precedence
        self.arrived = arrived
        self.admitted_s = arrived  # for the first time
        self.limits = limits
        self._caches = limits.enable_prefix_caching
        self.num_longest = longest(request, limits)
        self.num_imported = request.num_imported  # until it is preempted
        self.tokens = array("i", request.prompt)  # known ids, prompt and outputs
        self.num_known = self.num_prompt = len(self.tokens)
        self.table = BlockTable(pool)
        self.num_slots = 0
        self.num_cached = 0  # of the prompt, when it was admitted first
        self.keys: tuple[bytes, ...] = ()  # prefix key of each full block of `tokens`
        self.num_planned = 0
        self.num_on_way = 0  # tokens planned and not known yet
        self.token_from: int | None = None
        self.last_token_s = arrived
        self.num_outstanding = 0
        self.running = False
        self.was_admitted = False  # once, whatever came after
        self.prefilling = True  # until a chunk reaches the end of the known tokens
        self.finished = False
        self.is_decoding = False  # as `Queues` last counted it
        self.backlog = 0  # likewise
        self.context = 0  # likewise
        self.held: tuple[RequestState, ...] = ()
        """They wait until the prompt of this one is planned, to share it."""
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        """Of its tokens from the second on; None where nobody asked for them."""
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = []
        self.update_keys()

    @property
    def num_unplanned(self) -> int:
        return self.num_known - self.num_planned

    @property
    def num_outputs(self) -> int:
        return self.num_known - self.num_prompt

    @property
    def reads_cache(self) -> bool:
        """Not a prompt whose positions are still to be scored, or that is not to be shared."""
        skips = self.request.params.skip_reading_prefix_cache
        return self._caches and not self.num_unscored and not skips

    @property
    def matchable_keys(self) -> tuple[bytes, ...]:
        """Keys of the blocks that may be shared: never all, the last token must be computed."""
        if not self.reads_cache:
            return ()
        return self.keys[: (self.num_known - 1) // self.limits.block_size]

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose logprobs are wanted and not known."""
        if self.prompt_logprobs is None:
            return 0
        return self.num_prompt - 1 - len(self.prompt_logprobs)

    def num_scored_by(self, start: int, stop: int) -> int:
        """How many of the positions `[start, stop)` score the prompt token that comes next. They
        are the last ones, but for one that samples: a prompt that began to be computed anew after
        a preemption is scored from where it stood."""
        last = self.num_prompt - 1
        first = last - self.num_unscored
        return max(0, min(stop, last) - max(start, first))

    def score(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """The logprobs of its next prompt tokens became known."""
        assert self.prompt_logprobs is not None  # or nothing of it would be scored
        self.prompt_logprobs += logprobs

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """All of them, for the output of the first token; there are none after that."""
        taken = tuple(self.prompt_logprobs or ())
        self.prompt_logprobs = None
        return taken

    def update_keys(self) -> None:
        if self._caches:
            salt = self.request.cache_salt
            self.keys += new_keys(self.keys, self.tokens, self.limits.block_size, salt)

    def append(self, token: int, now: float) -> str | None:
        """A sampled token became known, and a block may thereby be full of known tokens; the reason
        if it ends the request."""
        self.tokens.append(token)
        self.num_known += 1
        self.last_token_s = now
        self.num_on_way -= 1
        if not self.num_on_way:
            self.token_from = None
        if self._caches and self.num_known % self.limits.block_size == 0:
            self.update_keys()
            self.table.publish(self.keys, self.num_planned)
        request = self.request
        if token in request.stop_ids and self.num_outputs > request.params.min_tokens:
            return "stop"
        return "length" if self.num_known == self.num_longest else None

    def start(self, shared: list[BlockId], now: float) -> None:
        """Admitted: goes on after what was imported, or else after the blocks that it shares."""
        self.table.share(shared)
        self.num_slots = self.table.num_slots
        if not self.was_admitted:
            self.was_admitted = True
            self.admitted_s, self.num_cached = now, self.num_slots
        self.num_planned = self.num_imported or self.num_slots

    def begun(self, now: float) -> Begun:
        """Its first token is known."""
        return Begun(self.num_cached, self.admitted_s - self.arrived, now - self.admitted_s)

    def grow(self, num_positions: int) -> tuple[BlockId, ...]:
        """Makes room for `num_positions` positions; the new blocks. The caller checked the pool."""
        new_blocks = self.table.grow(num_positions)
        self.num_slots = self.table.num_slots
        return new_blocks

    def rewind(self) -> None:
        """Back to waiting: no KV, all known tokens to prefill. The blocks are the caller's."""
        self.num_planned = 0
        self.num_slots = 0
        self.num_imported = 0
        self.running = False
        self.prefilling = True

    def forget_outstanding(self) -> None:
        """After a fault: what is outstanding will have no result."""
        self.num_outstanding = 0
        self.num_on_way = 0
        self.token_from = None


def longest(request: Request, limits: Limits) -> int:
    """Most tokens that a request can reach, prompt and output."""
    return min(len(request.prompt) + request.max_tokens, limits.max_model_len)


def check_fits(request: Request, limits: Limits) -> None:
    """Raises CapacityError for a request that could never run to its end, even alone."""
    num_prompt = len(request.prompt)
    if num_prompt == 0:
        raise CapacityError(f"the prompt of request {request.id} is empty: give it a token")
    for token in (min(request.prompt), max(request.prompt)):
        if not 0 <= token <= _MAX_TOKEN_ID:
            raise CapacityError(
                f"request {request.id} has the token id {token}, ids are 0 to {_MAX_TOKEN_ID}: "
                "give the ids of the model's own tokenizer"
            )
    if request.max_tokens < 1:
        raise CapacityError(f"max_tokens is {request.max_tokens}: ask for at least 1")
    if num_prompt >= limits.max_model_len:
        raise CapacityError(
            f"the prompt has {num_prompt} tokens and the context {limits.max_model_len}, one of "
            "them for the output: shorten the prompt or raise max_model_len"
        )
    positions = longest(request, limits) - 1  # the last token's KV is never computed
    num_slots = limits.num_blocks * limits.block_size
    if positions > num_slots:
        raise CapacityError(
            f"the request can reach {positions} positions and the KV cache holds {num_slots}: "
            "lower max_tokens or give the KV cache more memory"
        )
