"""vLLM's engine on a workload, as its own `LLM.generate` steps it. Runs in vLLM's environment."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from job import Ask, Engine, do_job


@contextmanager
def started(args: argparse.Namespace, asks: Sequence[Ask]) -> Iterator[Engine]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        args.model,
        pipeline_parallel_size=args.stages,
        distributed_executor_backend="mp" if args.stages > 1 else None,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.batched_tokens,
        max_num_seqs=args.running,
        enable_prefix_caching=False,  # no prompt comes twice
        skip_tokenizer_init=True,
    )
    engine, ids = llm.llm_engine, count()

    def run(asks: Sequence[Ask]) -> list[list[float]]:
        times_s: dict[str, list[float]] = {}
        for ask in asks:
            params = SamplingParams(
                temperature=0,
                max_tokens=ask.max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            request_id = str(next(ids))
            times_s[request_id] = []
            engine.add_request(request_id, {"prompt_token_ids": ask.prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.monotonic()
            for output in outputs:
                times_s[output.request_id] += [now_s] * len(output.outputs[0].token_ids)
        return list(times_s.values())

    yield run


if __name__ == "__main__":  # its workers import this file
    do_job(started)
