"""Microbatches of what a test says, without an engine."""

from pipeserve.core.nouns import Chunk, Microbatch, RequestId


def microbatch(index=0, prefills=(), decodes=()) -> Microbatch:
    """`prefills` as (start, tokens), `decodes` as positions in the KV cache."""
    spans = [(start, start + tokens) for start, tokens in prefills]
    spans += [(start, start + 1) for start in decodes]
    chunks = [
        Chunk(RequestId(n), start, stop, (), None, 1) for n, (start, stop) in enumerate(spans)
    ]
    return Microbatch(index, tuple(chunks))
