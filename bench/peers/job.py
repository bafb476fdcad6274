"""What a peer's script here is asked, and what it answers. `versus.py` starts it with the peer's
own interpreter, so this has the standard library alone.

The answer is JSON: for each run, when it began and when each token of each request became known to
whoever asked, in seconds of one clock.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

_WARMUP_REQUESTS = 8
_WARMUP_TOKENS = 8
_REST_S = 1.0
"""As `pipeserve bench` warms up, and rests."""


class Ask(NamedTuple):
    """One request: greedy, and of exactly so many tokens."""

    prompt: list[int]
    max_tokens: int


Engine = Callable[[Sequence[Ask]], list[list[float]]]
"""Does all of them at once; for each, when its tokens became known (`time.monotonic`)."""


Start = Callable[[argparse.Namespace, Sequence[Ask]], AbstractContextManager[Engine]]
"""An engine, which is ended with it, that can hold these requests."""


def do_job(start: Start) -> None:
    """Start the peer's engine, warm it up, run the workload as often as is asked."""
    args = _arguments()
    lines = [json.loads(line) for line in args.workload.read_text().splitlines()]
    asks = [Ask(line["prompt_token_ids"], line["max_tokens"]) for line in lines]
    with start(args, asks) as engine:
        engine(_warmup(asks))
        time.sleep(_REST_S)
        runs = [_run(engine, asks) for _ in range(args.repeat)]
    args.out.write_text(json.dumps({"runs": runs}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--running", type=int, required=True, help="requests at the same time")
    parser.add_argument("--batched-tokens", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=1)
    return parser.parse_args()


def _run(engine: Engine, asks: Sequence[Ask]) -> dict:
    start_s = time.monotonic()
    token_times_s = engine(asks)
    for ask, times_s in zip(asks, token_times_s, strict=True):
        assert len(times_s) == ask.max_tokens, f"{len(times_s)} tokens, not {ask.max_tokens}"
    return {
        "start_s": start_s,
        "prompt_tokens": [len(ask.prompt) for ask in asks],
        "token_times_s": token_times_s,
    }


def _warmup(asks: Sequence[Ask]) -> list[Ask]:
    """A few requests of the workload's own prompt lengths, of other tokens."""
    rng = random.Random("warm-up")
    return [
        Ask([rng.randrange(1000) for _ in ask.prompt], min(ask.max_tokens, _WARMUP_TOKENS))
        for ask in asks[:_WARMUP_REQUESTS]
    ]
