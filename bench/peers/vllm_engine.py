"""vLLM's engine on a workload, as its own `LLM.generate` steps it. Runs in vLLM's environment."""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from job import Ask, Engine, do_job


def imitate_avx2() -> None:
    """What vLLM and PyTorch's compiler ask the CPU itself, and not the variables of oneDNN."""
    import torch
    from torch._inductor import config

    torch.cpu._is_avx512_supported = lambda: False
    torch.cpu._is_avx512_bf16_supported = lambda: False
    torch.cpu._is_amx_tile_supported = lambda: False
    config.cpp.simdlen = 256


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


if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":  # its workers import this file
    imitate_avx2()

if __name__ == "__main__":
    do_job(started)
