"""Does advice hold on real stages? Runs with a known mistake are recorded, advised on, and run
again with what was advised.

    python bench/advice.py [--model smollm2-135m] [--stages 2] [--prompts 32] [--mistakes NAME,...]
                           [--times 1]

Each mistake is run `--times` times with and without, in turn, and the runs of median throughput are
compared; the advice is that of the first. Use an idle machine: what others take of a core in one
run is not there in the next.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from commands import LIMITS, result, some_of
from report import plain_table

from pipeserve.profiling.advice.advice import Advice, advise
from pipeserve.profiling.recording.reader import read_recording

MISTAKES = {
    "uneven": ("layers", ["--pipeline-layers", "22,8"]),
    "lockstep": ("policy", ["--policy", "request_level", "--max-num-batched-tokens", "2048"]),
    "prefill-apart": ("policy", ["--policy", "chunked_only"]),
}
"""Name -> the kind of change that mends it, and the flags that make it. `uneven` is for two stages
of 30 layers."""


def bench(folder: Path, *arguments: str) -> float:
    """Output tokens/s."""
    return result(folder / "bench.json", "bench", *arguments)["output_tokens_per_s"]


def without(flags: Sequence[str], given: Sequence[str]) -> list[str]:
    """`flags` but for those that are `given` anew."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in given for part in pair]


def row(name: str, kind: str, mistake: Sequence[str], common: Sequence[str], times: int):
    """One line of the table; also prints what was advised."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        before = [bench(path, *common, *mistake, "--record", str(path / "record"))]
        advice = advise(read_recording(path / "record"))
        print_advice(name, advice)
        if not advice.suggestions:
            return [name, "", f"{advice.tokens_error:+.1%}", "", "", "", "none"]
        first = advice.suggestions[0]
        fix = shlex.split(first.change.how)
        if not fix[0].startswith("--"):
            return [name, first.change.how, "", "", "", "", "no flag"]
        mended = [*without(mistake, fix), *fix]
        after = [bench(path, *common, *mended)]
        for _ in range(times - 1):
            before.append(bench(path, *common, *mistake))
            after.append(bench(path, *common, *mended))
    gain = median(after) / median(before) - 1
    return [
        name,
        first.change.how,
        f"{advice.tokens_error:+.1%}",
        f"{first.tokens_gain:+.1%}",
        f"{gain:+.1%}",
        f"{100 * (first.tokens_gain - gain):+.1f} points",
        "yes" if first.change.kind == kind else f"no, {kind}",
    ]


def print_advice(name: str, advice: Advice) -> None:
    for prediction in advice.suggestions:
        gain = f"{prediction.tokens_gain:+.1%} tokens/s"
        print(f"{name}: {gain} {prediction.change.how}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stages", default="2")
    parser.add_argument("--prompts", default="32")
    parser.add_argument("--mistakes", type=some_of(MISTAKES), default=[*MISTAKES])
    parser.add_argument("--times", type=int, default=1)
    args = parser.parse_args()
    workload = ["--workload", "sharegpt", "--scale", "8", "--num-prompts", args.prompts]
    common = [args.model, "-pp", args.stages, *workload, *LIMITS]
    rows = [row(name, *MISTAKES[name], common, args.times) for name in args.mistakes]
    names = ["mistake", "first advice", "replay off by", "predicted", "came", "apart", "the fix?"]
    print(plain_table(names, rows))


if __name__ == "__main__":
    main()
