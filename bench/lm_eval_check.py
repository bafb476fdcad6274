"""lm_eval's `local-completions` on our server against its own `hf` backend: the same scores?

    python -m venv VENV && VENV/bin/pip install "lm_eval[api]" torch transformers
    python bench/lm_eval_check.py MODEL --lm-eval VENV/bin/lm_eval [--items 200]

Two tasks from a local JSON file of so many questions (what follows a number, a letter, a day, a
month; what is the opposite of a word): multiple choice by likelihood, and the same questions
answered in free text. Both sides compute in float32. Compared are the accuracies, each choice's
log-likelihood, whether it is the greedy one, and each text.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bounded import started
from commands import script
from server_streams import address

from pipeserve.stages.checkpoint.sources import resolve

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September")
_OPPOSITES = "hot cold big small up down left right black white day night open closed good bad"
_OPPOSITES += " fast slow high low rich poor old young wet dry hard soft happy sad light dark"
_NUM_CHOICES = 4
_CHOICE = """task: pipeserve_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_TEXT = """task: pipeserve_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
target_delimiter: " "
generation_kwargs: {until: [",", ".", "\\n"], max_gen_toks: 8, do_sample: false}
filter_list:
  - name: word
    filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]
metric_list: [{metric: exact_match, ignore_case: true}]
"""
TASKS = {"pipeserve_choice": _CHOICE, "pipeserve_text": _TEXT}


def main() -> int:
    args = _arguments()
    model = str(resolve(args.model))
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as name:
        folder = Path(name)
        _write_tasks(folder, args.items)
        own = f"pretrained={model},dtype=float32"
        theirs = _run(args, folder, "hf", own, ["--device", "cpu", "--batch_size", "8"])
        command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", model, "-pp", "2"]
        command += ["--dtype", "float32", "--port", "0"]
        log = folder / "serve.log"
        with started(command, log) as server:
            url = address(server, str(log))
            own = f"model={model},tokenizer={model},base_url={url}/v1/completions"
            own += ",tokenizer_backend=huggingface,num_concurrent=4,max_length=2048"
            ours = _run(args, folder, "local-completions", own, ["--batch_size", "4"])
    return _compare(theirs, ours)


def questions(num: int) -> Iterator[dict]:
    draw = random.Random(0)
    words = _OPPOSITES.split()
    for number in range(num):
        kind = number % 5
        if kind == 0:
            first = draw.randrange(1, 90)
            texts = [str(first + place) for place in range(20)]
        elif kind == 1:
            texts = [chr(ord("A") + place) for place in range(26)]
        elif kind == 2:
            texts = _DAYS
        elif kind == 3:
            texts = _MONTHS
        else:
            place = draw.randrange(len(words))
            question, answer = f"The opposite of {words[place]} is", words[place ^ 1]
            yield _item(draw, question, answer, words)
            continue
        place = draw.randrange(len(texts) - 3)
        yield _item(draw, f"{', '.join(texts[place : place + 3])},", texts[place + 3], texts)


def _item(draw: random.Random, question: str, answer: str, others: Sequence[str]) -> dict:
    wrong = [text for text in others if text != answer and f"{text}," not in question]
    choices = [answer, *draw.sample(wrong, min(_NUM_CHOICES - 1, len(wrong)))]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(answer)}


def _write_tasks(folder: Path, num_items: int) -> None:
    data = folder / "items.json"
    data.write_text("".join(json.dumps(item) + "\n" for item in questions(num_items)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))


def _run(args: argparse.Namespace, folder: Path, kind: str, own: str, more: list[str]) -> dict:
    """What lm_eval says by task: the scores, and each item's answers."""
    out = folder / kind
    command = [str(args.lm_eval), "--model", kind, "--model_args", own, *more, "--log_samples"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)  # it has its own packages
    command += ["--output_path", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    (results,) = out.rglob("results_*.json")
    found = {}
    for task in TASKS:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda x: x["doc_id"])
        scores = json.loads(results.read_text())["results"][task]
        found[task] = (scores, [line["resps"] for line in lines])
    return found


def _compare(theirs: dict, ours: dict) -> int:
    is_same = True
    for task in TASKS:
        (their_scores, their_answers), (our_scores, our_answers) = theirs[task], ours[task]
        for name, value in their_scores.items():
            if isinstance(value, float) and "stderr" not in name:
                print(f"{task}, {name}: hf {value:.4f}, server {our_scores[name]:.4f}")
                is_same = is_same and value == our_scores[name]
        if task == "pipeserve_text":
            pairs = list(zip(their_answers, our_answers, strict=True))
            same = sum(a[0][0] == b[0][0] for a, b in pairs)
            print(f"{task}: {same} of {len(pairs)} texts are the same")
            continue
        pairs = [
            (theirs_of, ours_of)
            for each in zip(their_answers, our_answers, strict=True)
            for (theirs_of,), (ours_of,) in zip(*each, strict=True)
        ]
        furthest = max(abs(float(a[0]) - float(b[0])) for a, b in pairs)
        same = sum(str(a[1]) == str(b[1]) for a, b in pairs)
        print(f"{task}: log-likelihoods within {furthest:.1e}, {same} of {len(pairs)} greedy alike")
        is_same = is_same and same == len(pairs)
    return 0 if is_same else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lm-eval", type=Path, required=True, help="its command")
    parser.add_argument("--items", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    script(main)
