"""Greedy tokens of `--device cuda` beside the CPU's, in float32, through two stages.

    python bench/gpu_check.py [--all] [--model smollm2-135m] [--max-tokens 24]

A tiny random checkpoint of every family (with --all, of every variant that the tests have), and the
model, where it is on this machine. Prints a table; the exit code is 1 where tokens differ, and 2
where there is no GPU. Float32 sums come out in another order on a GPU, so two likeliest tokens that
are that near may change places: the table has the least distance between the two over all
positions of the CPU's answers, in units of log-probability.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from report import plain_table

import pipeserve
from pipeserve import SamplingParams
from pipeserve.errors import ConfigError, PipeserveError
from pipeserve.frontend.completion import Completion
from pipeserve.stages.backends.cuda import check_gpu
from pipeserve.stages.checkpoint.sources import resolve

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from checkpoints import TINY, random_prompts, tiny

LENGTHS = (40, 3, 17, 70, 1)
"""Of the prompts, in tokens; in microbatches of at most 32, so in chunks, and beside decodes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every variant of every family")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    try:
        check_gpu()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rows = []
    for name in TINY if args.all else one_of_each_family():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compared(name, tiny(name, Path(folder)), args.max_tokens))
    try:
        rows.append(compared(args.model, str(resolve(args.model, lambda text: None)), 64))
    except PipeserveError as error:
        print(f"without {args.model}: {error}", file=sys.stderr)
    header = ["model", "tokens", "same", "two likeliest apart", "cpu s", "cuda s"]
    print(plain_table(header, rows))
    sys.exit(int(any(row[1] != row[2] for row in rows)))


def one_of_each_family() -> list[str]:
    return list({kind.family: name for name, kind in reversed(TINY.items())}.values())[::-1]


def compared(name: str, folder: str, max_tokens: int) -> list[str]:
    """A row of the table."""
    started = time.perf_counter()
    expected = answers(folder, "cpu", max_tokens)
    middle = time.perf_counter()
    got = answers(folder, "cuda", max_tokens)
    ended = time.perf_counter()
    pairs = [
        ours == theirs
        for a, b in zip(got, expected, strict=True)
        for ours, theirs in zip(a.token_ids, b.token_ids, strict=True)
    ]
    seconds = [f"{middle - started:.1f}", f"{ended - middle:.1f}"]
    return [name, str(len(pairs)), str(sum(pairs)), f"{nearest(expected):.1e}", *seconds]


def answers(folder: str, device: str, max_tokens: int) -> list[Completion]:
    with pipeserve.LLM(
        folder,
        pipeline_parallel_size=2,
        device=device,
        dtype="float32",
        max_num_batched_tokens=32,
        num_gpu_blocks_override=64,
    ) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
        return llm.generate(random_prompts(folder, LENGTHS), greedy)


def nearest(completions: list[Completion]) -> float:
    """The least distance between the two likeliest tokens, of all that were drawn."""
    found = []
    for completion in completions:
        for each in completion.logprobs:
            first, second = sorted(each.top.values(), reverse=True)[:2]
            found.append(first - second)
    return min(found)


if __name__ == "__main__":
    main()
