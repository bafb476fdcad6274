"""Attention alone: the C kernels, products over gathered blocks, and PyTorch's own.

    python bench/attention.py                                      (minutes, one core, 3 GB)

SmolLM2's 9 heads of 64 over 3 kv heads, 15 layers, each with its own pool, so that caches are as
cold as in a stage. All ways take turns; what counts is this thread's CPU time, of which the table
has the least, because other processes share the machine. "read" is the share of the core's read
bandwidth, measured in the same turns, that the kernels come to: bytes of K and V by their time.
PIPESERVE_KERNELS=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 imitates a CPU without
AVX512.
"""

import argparse
import os
import random
import time
from functools import partial

import torch
import torch.nn.functional as F

from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.attention.kv import KVCache
from pipeserve.stages.attention.scoring import Scoring
from pipeserve.stages.backends.cpu import library
from pipeserve.stages.backends.cpu.blocked_attention import BlockedAttention
from pipeserve.stages.backends.cpu.kernel_attention import KernelAttention
from pipeserve.stages.config.model_config import ModelConfig

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
BLOCK_SIZE = 16
DTYPES = ("float32", "float16", "bfloat16")
WAYS = ("kernels", "cpu", "torch")
NUM_LAYERS = 15
SCORING = Scoring(HEAD_DIM**-0.5)
DECODES = {
    "16 decodes over 300-450": [300 + 10 * i for i in range(16)],
    "32 decodes over 300-450": [300 + 5 * i for i in range(32)],
    "16 decodes over 1,024": [1024] * 16,
    "4 decodes over 8,192": [8192] * 4,
}
CHUNKS = {f"a 256-token chunk behind {prefix}": (prefix, prefix + 256) for prefix in (0, 256, 2048)}


class Case:
    """Spans, and pools of every layer filled with what came before them."""

    def __init__(self, spans: list[tuple[int, int]], dtype: torch.dtype, turned: bool) -> None:
        counts = [-(-stop // BLOCK_SIZE) for _, stop in spans]
        blocks = random.Random(0).sample(range(sum(counts)), sum(counts))
        chunks = []
        for (start, stop), count in zip(spans, counts, strict=True):
            chunks.append((start, stop, [blocks.pop() for _ in range(count)], 0))
        self.inputs = build_inputs(chunks, BLOCK_SIZE, None)
        sizes = {
            "num_blocks": sum(counts),
            "block_size": BLOCK_SIZE,
            "dtype": dtype,
            "device": torch.device("cpu"),
            "turned": turned,
        }
        self.kv = KVCache(config(), num_layers=NUM_LAYERS, **sizes)
        for side in (self.kv.keys_LKBPH, self.kv.values_LKBPH):
            side[:] = torch.randn(side[0].shape)
        num_tokens = sum(stop - start for start, stop in spans)
        self.q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM)
        self.read_bytes = NUM_LAYERS * sum(stop for _, stop in spans) * NUM_KV_HEADS * HEAD_DIM
        self.read_bytes *= 2 * dtype.itemsize

    def run(self, attention) -> None:
        plan = attention.prepare(self.inputs, self.kv, {None})
        for layer in range(NUM_LAYERS):
            attention(self.q, self.kv.layer(layer), plan, SCORING)


class TorchAttention:
    """scaled_dot_product_attention, request by request."""

    def prepare(self, inputs, kv, windows):
        return inputs

    def __call__(self, q_TNH, pool, plan, scoring):
        out_TNH = torch.empty_like(q_TNH)
        row = 0
        for start, context, blocks, _ in plan.chunks:
            queries = context - start
            k, v = (side[:, blocks].flatten(1, 2)[:, :context] for side in pool)
            q = q_TNH[row : row + queries].transpose(0, 1).to(k.dtype)
            seen = torch.ones(queries, context, dtype=torch.bool).tril_(context - queries)
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], seen, scale=scoring.scale, enable_gqa=True
            )
            out_TNH[row : row + queries] = out[0].transpose(0, 1)
            row += queries
        return out_TNH


def config() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=NUM_LAYERS,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=1,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=1,
        max_position_embeddings=1,
        norm_eps=1.0,
        activation="silu",
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(),
    )


def least_seconds(ways: dict, turns: int) -> dict[str, float]:
    """CPU seconds of each, the least of its turns."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for name, way in ways.items():
            started = time.thread_time()
            way()
            least[name] = min(least[name], time.thread_time() - started)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only", default="", help="cases that have this in their names")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    kernels = library.kernels()
    memory = torch.ones(2**26)  # 256 MB, written: more than any cache holds
    workloads = {name: [(n - 1, n) for n in contexts] for name, contexts in DECODES.items()}
    workloads |= {name: [span] for name, span in CHUNKS.items()}
    print(
        f"{'':<32}{'kernels ms':>11}{'blocks':>9}{'torch':>9}{'read':>7}{'GB/s':>7}{'GFLOP/s':>9}"
    )
    for dtype in arguments.dtypes:
        print(dtype)
        for name, spans in workloads.items():
            if arguments.only not in name:
                continue
            with torch.inference_mode():
                case = Case(spans, getattr(torch, dtype), turned=True)
                plain = Case(spans, getattr(torch, dtype), turned=False)
                cases = {"kernels": case, "cpu": plain, "torch": plain}
                attentions = {
                    "kernels": KernelAttention(),
                    "cpu": BlockedAttention(),
                    "torch": TorchAttention(),
                }
                ways = {way: partial(cases[way].run, attentions[way]) for way in arguments.ways}
                ways["read"] = lambda: kernels.read_all(memory.data_ptr(), memory.nbytes)
                least = least_seconds(ways, arguments.turns)
            own_s = least[arguments.ways[0]]  # of which the rates are
            bandwidth = memory.nbytes / least["read"]
            times = "".join(f"{least.get(way, 0) * 1e3:>10.1f}" for way in WAYS)
            pairs = sum(sum(range(start + 1, stop + 1)) for start, stop in spans)
            rate = 4 * NUM_LAYERS * NUM_HEADS * HEAD_DIM * pairs / own_s / 1e9
            share = case.read_bytes / own_s / bandwidth
            print(f"  {name:<30}{times}{share:>7.0%}{bandwidth / 1e9:>7.1f}{rate:>9.0f}")


if __name__ == "__main__":
    main()
