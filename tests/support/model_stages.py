"""A made-up model, and stages that check every position of its KV cache.

What a KV slot holds is a digest of the very prefix that it was computed from, so a block that was
shared wrongly, freed too early or overwritten shows as another digest. A token is a function of
the prefix and the request's seed alone, so each request's tokens are known beforehand and must come
out the same under every policy, number of stages, budget, cache size and sequence of faults.

`ModelStage` replays microbatches as a real stage would and knows nothing of the engine.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from zlib import crc32

from pipeserve.core.nouns import BlockId, Microbatch, Request, RequestId, TokenLogprobs
from pipeserve.core.view import Limits

VOCAB = 6


def states_of(salt: str, tokens: Iterable[int]) -> list[int]:
    """What the KV of each position holds: a digest of the salt and the tokens up to it. (Python's
    hash of numbers is the same in every process.)"""
    state, states = crc32(salt.encode()), []
    for token in tokens:
        states.append(state := hash((state, token)))
    return states


def next_token(state: int, request: Request) -> int:
    """The token behind the position whose KV is `state`."""
    return (hash((state, request.params.seed or 0, -7)) >> 8) % VOCAB


def prompt_score(state: int) -> TokenLogprobs:
    """The log-probability of the token whose position has `state`."""
    return TokenLogprobs(-float(state % 251))


class Story:
    """What becomes of a request that nobody interrupts."""

    def __init__(self, request: Request, max_model_len: int):
        self.tokens = list(request.prompt)
        self.states = states_of(request.cache_salt, request.prompt)
        """Of each token's position."""
        self.reason = "length"
        """Why it ends."""
        num_prompt, params = len(request.prompt), request.params
        state = self.states[-1]
        while len(self.tokens) < min(num_prompt + params.max_tokens, max_model_len):
            token = next_token(state, request)
            self.tokens.append(token)
            self.states.append(state := hash((state, token)))
            if token in request.stop_ids and len(self.tokens) - num_prompt > params.min_tokens:
                self.reason = "stop"
                break
        self.outputs = self.tokens[num_prompt:]
        self.scores = None
        """Of each prompt token but the first, where they are asked for."""
        if params.prompt_logprobs is not None:
            self.scores = tuple(map(prompt_score, self.states[1:num_prompt]))


class ModelStage:
    """One stage: block tables, who holds which block, and what each KV slot holds."""

    def __init__(self, limits: Limits):
        self.block_size = limits.block_size
        self.tables: dict[RequestId, list[BlockId]] = {}
        self.num_holders = [0] * limits.num_blocks
        self.kv: list[list[int | None]] = [
            [None] * limits.block_size for _ in range(limits.num_blocks)
        ]
        self.num_run = 0

    def run(self, microbatch: Microbatch, states: Sequence[list[int]]) -> None:
        """`states`: for each chunk those of its request's positions, at least up to its stop.

        Imported KV is put into the blocks of a request's first admission, in the order of the
        microbatches, as a host has to do it."""
        for request_id in microbatch.released:
            for block in self.tables.pop(request_id):
                self.num_holders[block] -= 1
        num_shared = {}
        for admission in microbatch.admitted:
            assert admission.request_id not in self.tables, "admitted twice"
            self.tables[admission.request_id] = list(admission.blocks)
            num_shared[admission.request_id] = len(admission.blocks) * self.block_size
            for block in admission.blocks:
                self.num_holders[block] += 1
        chunks = list(zip(microbatch.chunks, states, strict=True))
        for (request_id, start, _, new_blocks, *_), known in chunks:
            for block in new_blocks:
                assert not self.num_holders[block], "a new block belongs to a request already"
                self.num_holders[block] = 1
            self.tables[request_id] += new_blocks
            # An admitted request that starts after what it shares starts after what it imports.
            if num_shared.get(request_id, start) < start:
                self.write(request_id, num_shared[request_id], start, known)
        # All chunks read before any writes: sharing within one microbatch is not allowed.
        for chunk, known in chunks:
            self.read(chunk.request_id, chunk.start, known)
        for chunk, known in chunks:
            self.write(chunk.request_id, chunk.start, chunk.stop, known)
        self.num_run += 1

    def read(self, request_id: RequestId, stop: int, known: list[int]) -> None:
        """What attention does with all positions before a chunk."""
        blocks = self.tables[request_id][: -(-stop // self.block_size)]
        held = list(chain.from_iterable([self.kv[block] for block in blocks]))
        assert held[:stop] == known[:stop], f"request {request_id} would read another's KV"

    def write(self, request_id: RequestId, start: int, stop: int, known: list[int]) -> None:
        table, size = self.tables[request_id], self.block_size
        for block in table[start // size : -(-stop // size)]:
            assert self.num_holders[block] == 1, "writes into a shared block"
        for position in range(start, stop):
            self.kv[table[position // size]][position % size] = known[position]
