"""transformers' continuous batching on a workload: one process, which knows no stages."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from job import Ask, Engine, do_job
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

_PAGE = 32
_LOOKS_UP_S = 1.0


@contextmanager
def started(args: argparse.Namespace, asks: Sequence[Ask]) -> Iterator[Engine]:
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    longest = sorted((len(ask.prompt) + ask.max_tokens for ask in asks), reverse=True)
    batching = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=sum(-(-tokens // _PAGE) + 1 for tokens in longest[: args.running]),
        max_batch_tokens=args.batched_tokens,
        max_requests_per_batch=args.running,
        allow_block_sharing=False,  # no prompt comes twice
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=batching
    ) as manager:

        def run(asks: Sequence[Ask]) -> list[list[float]]:
            times_s: dict[str, list[float]] = {}
            for ask in asks:
                request_id = manager.add_request(
                    ask.prompt, max_new_tokens=ask.max_tokens, streaming=True, eos_token_id=-1
                )
                times_s[request_id] = []
            num_unfinished = len(asks)
            while num_unfinished:
                output = manager.get_result(timeout=_LOOKS_UP_S)
                now_s = time.monotonic()
                if output is None:
                    assert manager.is_running(), "its thread has ended"
                    continue
                assert output.error is None, output.error
                known = times_s[output.request_id]
                known += [now_s] * (len(output.generated_tokens) - len(known))
                num_unfinished -= output.is_finished()
            return list(times_s.values())

        yield run


if __name__ == "__main__":
    do_job(started)
