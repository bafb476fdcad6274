"""How long one stage takes for a microbatch, and how much of that its matrix products alone take.

    python bench/stage.py MODEL --layers 0:15 --dtype bfloat16 --prefill 480 --decodes 16

Pinned to one core (or --threads of them). "products" times the stage's linear layers by themselves
on the same rows: the floor that no attention or element-wise work could take away.
"""

import argparse
import os
import random
import time

import torch
from commands import script

from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.checkpoint.sources import resolve
from pipeserve.stages.checkpoint.weights import load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.devices import make_backend
from pipeserve.stages.layers.linear import Linear
from pipeserve.stages.stage import Stage

BLOCK_SIZE = 16


def best_ms(function, seconds: float) -> float:
    """The least of the runs that fit into `seconds`: what the machine does when left alone."""
    function()
    until, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < until:
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or an alias")
    parser.add_argument("--layers", default="0:15", metavar="FIRST:STOP")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=480, help="tokens of one prompt chunk")
    parser.add_argument("--prefix", type=int, default=0, help="tokens before the chunk")
    parser.add_argument("--decodes", type=int, default=16)
    parser.add_argument("--context", type=int, default=300, help="mean context of the decodes")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    torch.set_num_threads(args.threads)
    folder = str(resolve(args.model))
    config = read_config(folder)
    first, stop = map(int, args.layers.split(":"))
    has_head = stop == config.num_layers
    dtype = getattr(torch, args.dtype)
    stage = Stage(
        config,
        first_layer=first,
        stop_layer=stop,
        has_embedding=first == 0,
        has_head=has_head,
        backend=make_backend("cpu", args.attention),
    )
    load_weights(stage, folder, dtype)
    rng = random.Random(0)
    contexts = [max(1, int(args.context * rng.uniform(0.5, 1.5))) for _ in range(args.decodes)]
    lengths = [args.prefix + args.prefill] * bool(args.prefill) + contexts
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
    free = rng.sample(range(num_blocks), num_blocks)
    spans = []
    for length in lengths:
        table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        start = args.prefix if args.prefill and not spans else length - 1
        spans.append((start, length, table, 1))
    kv = stage.make_kv(num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype)
    ids = [[7] * length for length in lengths] if first == 0 else None
    with torch.inference_mode():
        inputs = build_inputs(spans, BLOCK_SIZE, ids)
        hidden = torch.randn(inputs.num_tokens, config.hidden_size).to(dtype)
        x = inputs.token_ids_T if first == 0 else hidden
        few = set()
        if has_head:  # behind the last keys and values rows go on whose logits are wanted
            last = stage.layers[-1]
            few = {stage.head.vocabulary, *last.modules()} - {last.attention.qkv}
        rows = {
            module: torch.randn(
                inputs.num_wanted if module in few else inputs.num_tokens, module.shape[1]
            ).to(dtype)
            for module in stage.modules()
            if isinstance(module, Linear)
        }
        whole = best_ms(lambda: stage(x, inputs, kv), args.seconds)
        products = best_ms(lambda: [module(x) for module, x in rows.items()], args.seconds)
        building = best_ms(lambda: build_inputs(spans, BLOCK_SIZE, ids), 0.5)
    print(
        f"layers {first}:{stop} {args.dtype}, {args.prefill} prefill tokens behind {args.prefix}, "
        f"{args.decodes} decodes over {args.context}: stage {whole:.1f} ms, products "
        f"{products:.1f} ms ({products / whole:.0%}), inputs {building:.2f} ms"
    )


if __name__ == "__main__":
    script(main)
