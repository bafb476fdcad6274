"""How far SmolLM2's layers in bf16 are from float32, beside transformers', and what the head does.

    python bench/accuracy.py [--model smollm2-135m] [--prompts 16] [--repeat 4]

Prompts are those of the quickstart, each repeated; positions of all of them count. Takes a minute.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from commands import script
from report import plain_table
from transformers import AutoTokenizer

from pipeserve.stages.checkpoint.sources import resolve
from pipeserve.stages.config.families import read_config

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from cut_model import Stages
from half_precision import Errors, hidden_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as a stage on a core of its own, which the C kernels are for
    folder = str(resolve(args.model, lambda text: None))
    num_layers = read_config(folder).num_layers
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = Path("configs/quickstart.jsonl").read_text().splitlines()[: args.prompts]
    texts = [json.loads(line)["prompt"] * args.repeat for line in lines]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    rows = []
    for cut in ((num_layers,), (num_layers // 2, num_layers - num_layers // 2)):
        errors = hidden_errors(folder, prompts, cut)
        rows.append(error_row("+".join(map(str, cut)), errors))
    print("final hidden states in bf16 through one float32 head, error of logits:\n")
    print(plain_table(["layers", "ours", "transformers", "ratio", "of medians"], rows))
    print(f"\n{ties(folder, num_layers, prompts)}")


def error_row(cut: str, errors: Errors) -> list[str]:
    ours, theirs = (f"{part.pow(2).mean().sqrt():.4f}" for part in errors)
    return [cut, ours, theirs, f"{errors.ratio:.2f}", f"{errors.median_ratio:.2f}"]


@torch.inference_mode()
def ties(folder: str, num_layers: int, prompts: list[list[int]]) -> str:
    """At how many positions two likeliest tokens come out alike, from the head and rounded."""
    exact = Stages(folder, (num_layers,))
    half = Stages(folder, (num_layers,), dtype=torch.bfloat16)
    positions = equal = tied = rounded = 0
    for prompt in prompts:
        ours, wanted = half.logits(prompt, 64), exact.logits(prompt, 64)
        positions += len(prompt)
        equal += int((ours.argmax(-1) == wanted.argmax(-1)).sum())
        tied += num_tied(ours)
        rounded += num_tied(ours.bfloat16())
    return (
        f"{positions} positions: the likeliest token is float32's at {equal / positions:.1%}; "
        f"{tied} ties, {rounded} where the logits are rounded to bf16"
    )


def num_tied(logits: torch.Tensor) -> int:
    first, second = logits.topk(2, -1).values.unbind(-1)
    return int((first == second).sum())


if __name__ == "__main__":
    script(main)
