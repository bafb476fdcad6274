"""`pipeserve generate`: prompts through an `LLM`, with results that go to a file or are shown.

A result is one JSON object: "index" (line of the file, from 0), the prompt as it was given, then of
its first sample "text", "token_ids", "finish_reason", and "logprobs" where asked for; then
"num_prompt_tokens", "prompt_logprobs" where asked for (null for the first token), and, where `n` is
over 1, "outputs": all samples, each with its "index" and the same keys. A prompt that cannot run
has "error" instead; a sample that cannot go on has it too, beside the finish reason "error" and
what there was until then. Logprobs are {"sampled": of the token itself, "top": {token id:
logprob}}.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeserve.core.nouns import TokenLogprobs
from pipeserve.errors import PipeserveError, StageError
from pipeserve.frontend.completion import Completion, CompletionOutput, Delta, completed
from pipeserve.frontend.llm import LLM
from pipeserve.launch.inputs.jsonl import ResultFile, has_error, strict_line
from pipeserve.launch.inputs.prompts import PROMPT_KEYS, PromptLine

if TYPE_CHECKING:
    from pipeserve.driver.driver import Driver
    from pipeserve.launch.run.record import RecordedRun

# Starts a driver; its records go to files too, where the user wants that.
OpenDriver = Callable[[], AbstractContextManager[tuple["Driver", "RecordedRun"]]]


def stream_text(llm: LLM, line: PromptLine) -> int:
    """Write the text of one prompt to stdout as it comes. Returns the exit code."""
    params = line.params(llm.get_default_sampling_params(), llm.client.config.seed)
    errors: list[str] = []
    with closing(llm.stream([line.prompt], params)) as deltas:
        for text in _sample_after_sample(_noting(errors, deltas), params.n):
            sys.stdout.write(text)
            sys.stdout.flush()
    if errors:
        print(f"error: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def _noting(errors: list[str], deltas: Iterable[Delta]) -> Iterator[Delta]:
    for delta in deltas:
        if delta.error is not None:
            errors.append(delta.error)
        yield delta


def _sample_after_sample(deltas: Iterable[Delta], num_samples: int) -> Iterator[str]:
    """The text of each sample and a newline; of several, each behind its number, a blank line
    between. The first that has not ended is given as it comes, later ones are held until then."""
    held = [""]
    if num_samples > 1:
        held = ["[0] ", *(f"\n[{sample}] " for sample in range(1, num_samples))]
    shown, ended = 0, set()
    for delta in deltas:
        held[delta.sample] += delta.text
        if delta.finish_reason is not None:
            held[delta.sample] += "\n"
            ended.add(delta.sample)
        while shown in ended:
            yield held[shown]
            shown += 1
        if shown < num_samples:
            yield held[shown]
            held[shown] = ""


def write_to(
    output: Path,
    job: str,
    lines: Sequence[PromptLine],
    overwrite: bool,
    resume: bool,
    start: OpenDriver,
    live: bool,
) -> int:
    """Write the results of those `lines` that `output` does not hold yet; `job` stands for all that
    they depend on. Returns the exit code."""
    with ResultFile(output, job, overwrite=overwrite, resume=resume) as results:
        done = results.done
        if resume:
            print(f"{output}: {len(done.indices)} of {len(lines)} are done", file=sys.stderr)
        left = [line for line in lines if line.index not in done.indices]
        try:
            exit_code = run(start, left, results.write, live) if left else 0
        except StageError as error:
            raise StageError(f"{error}; --resume goes on from there") from None
    if done.num_errors:
        print(
            f"error: {done.num_errors} of the {len(done.indices)} kept could not run; "
            "their lines say why",
            file=sys.stderr,
        )
    return 1 if done.num_errors else exit_code


def run(
    start: OpenDriver,
    lines: Sequence[PromptLine],
    write: Callable[[dict[str, Any]], None],
    live: bool,
) -> int:
    """Start a driver, and `write` the result of each of `lines`. Returns the exit code."""
    with start() as (driver, records):

        def busy(start_s: float, stop_s: float) -> list[float]:
            driver.settle()
            return records.busy_shares(start_s, stop_s)

        records.start_writing()
        return write_results(LLM.on(driver), lines, write, busy, records.shown if live else None)


def write_results(
    llm: LLM,
    lines: Sequence[PromptLine],
    write: Callable[[dict[str, Any]], None],
    busy: Callable[[float, float], list[float]],
    shown: Callable[[], AbstractContextManager] | None = None,
) -> int:
    """Run all `lines`, and `write` each result as it ends, with a progress bar on stderr, or with
    what is `shown` there in its place.

    A prompt that cannot run gets a result with "error", and the others go on. Returns the exit
    code: 0, or 1 if there was any such. `busy` gives each stage's busy share between two times.
    Raises StageError, which then says how many results were written, and ConfigError for sampling
    that contradicts what the model's generation_config.json says.
    """
    errors: list[str] = []
    defaults, run_seed = llm.get_default_sampling_params(), llm.client.config.seed
    params = [line.params(defaults, run_seed) for line in lines]

    def on_error(place: int, error: PipeserveError) -> None:
        errors.append(str(error))
        write({"index": lines[place].index, **lines[place].shown, "error": str(error)})
        progress.advance()

    num_tokens = num_done = 0
    start_s = time.monotonic()
    show = shown or nullcontext
    with show(), _Progress(len(lines), hidden=shown is not None) as progress:
        priority = [line.priority for line in lines]
        prompts = [line.prompt for line in lines]
        deltas = llm.stream(prompts, params, priority=priority, on_error=on_error)
        try:
            with closing(deltas):
                for place, completion in completed(progress.counted(deltas)):
                    result = _result(lines[place], completion)
                    write(result)
                    if has_error(result):
                        errors += [out.error for out in completion.outputs if out.error][:1]
                    num_done += 1
                    num_tokens += sum(len(output.token_ids) for output in completion.outputs)
                    progress.advance()
        except StageError as error:
            message = f"{error}; {num_done} of {len(lines)} prompts are done and written"
            raise StageError(message) from None
    seconds = time.monotonic() - start_s
    shares = " ".join(f"{share:.0%}" for share in busy(start_s, start_s + seconds))
    print(
        f"{num_done} prompt{'s' * (num_done != 1)}, {num_tokens} output tokens in {seconds:.2f} s: "
        f"{num_tokens / seconds:.1f} tokens/s; stages busy {shares}",
        file=sys.stderr,
    )
    if errors:
        print(
            f"error: {len(errors)} of {len(lines)} prompts could not run, the first: {errors[0]}",
            file=sys.stderr,
        )
    return 1 if errors else 0


def print_json(result: dict[str, Any]) -> None:
    """One line of JSON, flushed; in ASCII where standard output can take no more."""
    ascii_only = sys.stdout.encoding.lower().replace("-", "") != "utf8"
    print(strict_line(result, ascii_only=ascii_only), flush=True)


def print_text(result: dict[str, Any]) -> None:
    """A result as people read it: the prompt, and what came back."""
    prompt = next(result[key] for key in PROMPT_KEYS if key in result)
    if "error" in result:
        answers = [f"error: {result['error']}"]
    elif "outputs" in result:
        answers = [f"[{sample['index']}] {sample['text'].strip()}" for sample in result["outputs"]]
    else:
        answers = [result["text"].strip()]
    texts = "".join(f"    {answer}\n" for answer in answers)
    print(f"[{result['index']}] {prompt}\n{texts}", flush=True)


class _Progress:
    """The bar on stderr: prompts done, output tokens a second. Nothing where no one looks."""

    def __init__(self, num_prompts: int, hidden: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_prompts, rate=0.0)
        self._num_tokens = 0
        self._start_s = time.monotonic()

    def counted(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """`deltas`, shown on the way."""
        for delta in deltas:
            self._num_tokens += len(delta.token_ids)
            rate = self._num_tokens / (time.monotonic() - self._start_s)
            self._progress.update(self._task, rate=rate)
            yield delta

    def advance(self) -> None:
        """One more prompt is done, or found unable to run."""
        self._progress.advance(self._task)

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()


def _result(line: PromptLine, completion: Completion) -> dict[str, Any]:
    samples = [_sample(output) for output in completion.outputs]
    result = {
        "index": line.index,
        **line.shown,
        **samples[0],
        "num_prompt_tokens": len(completion.prompt_token_ids),
    }
    if completion.prompt_logprobs is not None:
        result["prompt_logprobs"] = _as_json(completion.prompt_logprobs)
    if len(samples) > 1:
        result["outputs"] = [{"index": index, **s} for index, s in enumerate(samples)]
    return result


def _sample(output: CompletionOutput) -> dict[str, Any]:
    sample = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.error is not None:
        sample["error"] = output.error
    if output.logprobs is not None:
        sample["logprobs"] = _as_json(output.logprobs)
    return sample


def _as_json(logprobs: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    return [
        None if entry is None else {"sampled": entry.sampled, "top": dict(entry.top)}
        for entry in logprobs
    ]
