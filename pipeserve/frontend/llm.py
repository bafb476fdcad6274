"""`LLM`: the Python API. Text in and out around one pipeline.

    with LLM("smollm2-135m", pipeline_parallel_size=2) as llm:
        completions = llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=16))

A prompt is text, a list of token ids, or a conversation (a list of dicts of `role` and `content`);
`prompt_forms.py` has all forms.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeserve.configs import make_config
from pipeserve.core.nouns import Output, RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.gathering import gathering
from pipeserve.errors import ConfigError, PipeserveError, StageError
from pipeserve.frontend.client import Client
from pipeserve.frontend.completion import Completion, Delta, Generation, completed
from pipeserve.frontend.params import check_priority
from pipeserve.frontend.prompt_forms import Prompt, as_conversations, as_prompts
from pipeserve.frontend.request_maker import RequestMaker
from pipeserve.sampling_params import SamplingParams

OnError = Callable[[int, PipeserveError], None]

_WAIT_S = 0.5  # how long one wait lasts while nothing becomes known; no token waits for it
_TEXTS_AT_ONCE = 16
"""Outputs of which text is made between two looks at what the stages say: some 0.2 ms."""


@dataclass(slots=True)
class _Call:
    """One call of `stream`: its requests that still run, and deltas not yet handed out."""

    running: dict[RequestId, Generation] = field(default_factory=dict)
    inbox: deque[Delta] = field(default_factory=deque)


class LLM:
    """One model over its pipeline, for offline use. Several threads may call it: they take turns,
    and their requests run together.

    The driver works while a stream waits for outputs, and at least once between the texts of 16
    tokens or of two prompts: making text keeps no result waiting for long.
    """

    def __init__(self, model: str, **keywords: Any) -> None:
        """Start the stages; returns when all are ready. Keywords are RunConfig's fields.

        Raises ConfigError (unknown keyword, wrong value, wrong model) and StageError.
        """
        config = make_config({}, {"model": model, **keywords})
        with gathering(config) as fleet:
            setup = checkpoint_setup(config)
        driver = Driver(setup, fleet=fleet)
        try:
            self._serve(driver)
        except BaseException:
            driver.close()
            raise

    @classmethod
    def on(cls, client: Client) -> "LLM":
        """An LLM on a pipeline that runs already, and that `close` closes."""
        llm = cls.__new__(cls)
        llm._serve(client)
        return llm

    def _serve(self, client: Client) -> None:
        self.client = client
        self._maker = RequestMaker(client)
        self.tokenizer = self._maker.tokenizer
        self._calls: dict[RequestId, _Call] = {}
        self._busy = threading.Lock()
        """Held by who calls the client, and until what it said is in the inboxes."""
        self._outputs: deque[Output] = deque()
        """Of which no text is made yet."""
        self._ended: StageError | None = None
        """Why none follows them; raised when they are through."""

    # ---- what users call ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Mapping[str, Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[Completion]:
        """The completions of one or many prompts, in the order of the prompts, each with its
        `SamplingParams.n` samples.

        `sampling_params` is one for all or one for each; None is the model's own
        (`get_default_sampling_params`). `priority`, one for all or one for each, says who goes
        first, the lowest number, where the LLM has `order="priority"`; None is 0. A sample that
        cannot go on, because no text can be made of its tokens, say, has the finish reason
        "error". All or nothing: an empty or too long prompt is a CapacityError that names its
        index, and nothing of the call is run. Raises
        ConfigError for wrong parameters, StageError when a stage dies.
        """
        done = dict(completed(self.stream(prompts, sampling_params, priority=priority)))
        return [done[index] for index in range(len(done))]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[Completion]:
        """`generate` for one or many conversations, through the model's own chat template.

        Raises ConfigError for what is no conversation, such as text, which would get no template.
        """
        return self.generate(as_conversations(messages), sampling_params, priority=priority)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | Mapping[str, Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        on_error: OnError | None = None,
    ) -> Iterator[Delta]:
        """Deltas of all prompts as they come; several streams may be read in turn.

        Nothing is submitted before the first delta is asked for. A prompt that cannot run raises,
        as in `generate`; or is told to `on_error(index, error)` and left out, where that is given.
        A stream that is closed or dropped half-way ends its requests.
        """
        call = _Call()
        try:
            self._submit(call, prompts, sampling_params, priority, on_error)
            while call.inbox or call.running:
                while call.inbox:
                    yield call.inbox.popleft()
                if call.running:
                    self._go_on(call)
        finally:  # on whatever thread, and within whatever call, a dropped stream is collected
            for request_id in tuple(call.running):
                self._calls.pop(request_id, None)
                self.client.abort(request_id)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` goes by without any: of the model's generation_config.json, unless
        `generation_config` says otherwise."""
        return self._maker.default_params

    def close(self) -> None:
        """End every process of the pipeline. Safe to call twice."""
        self.client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- submitting -----------------------------------------------------------------------------

    def _submit(
        self, call: _Call, prompts: Any, params: Any, priority: Any, on_error: OnError | None
    ) -> None:
        """All prompts at once, when every one of them is known to be able to run."""
        prompts = as_prompts(prompts)
        parts = zip(
            prompts,
            self._as_params(params, len(prompts)),
            self._as_priorities(priority, len(prompts)),
            strict=True,
        )
        generations: list[Generation] = []
        for index, (prompt, own, number) in enumerate(parts):
            try:
                first = self._maker.first(prompt, own, number)
            except PipeserveError as error:
                if on_error is None:
                    raise type(error)(f"prompt {index}: {error}") from None
                on_error(index, error)
            else:
                unfinished = set(range(first.params.n))
                generations += [
                    Generation(index, sample, unfinished, request, self.tokenizer)
                    for sample, request in enumerate(self._maker.samples(first))
                ]
            if self._calls:
                with self._busy:
                    self._look(0)  # other streams go on meanwhile
        running = {generation.request.id: generation for generation in generations}
        with self._busy:
            self.client.submit([generation.request for generation in generations])
            call.running = running
            self._calls.update(dict.fromkeys(running, call))

    def _as_params(self, params: Any, num_prompts: int) -> list[SamplingParams]:
        """One for all prompts or one for each, as one for each; None is the model's own."""
        given = list(params) if isinstance(params, (list, tuple)) else [params] * num_prompts
        if len(given) != num_prompts:
            raise ConfigError(
                f"{len(given)} sampling_params for {num_prompts} prompts; give one, or one for each"
            )
        for own in given:
            if own is not None and not isinstance(own, SamplingParams):
                raise ConfigError(
                    f"sampling_params are of type {type(own).__name__}; give "
                    "pipeserve.SamplingParams, one or a list"
                )
        return [self._maker.default_params if own is None else own for own in given]

    def _as_priorities(self, priority: Any, num_prompts: int) -> list[int]:
        """Likewise."""
        priority = 0 if priority is None else priority
        given = list(priority) if isinstance(priority, (list, tuple)) else [priority] * num_prompts
        if len(given) != num_prompts:
            raise ConfigError(
                f"{len(given)} priorities for {num_prompts} prompts; give one, or one for each"
            )
        return [check_priority(each, self.client.limits.order) for each in given]

    # ---- running --------------------------------------------------------------------------------

    def _go_on(self, call: _Call) -> None:
        """Let the driver work, and make text of what became known; unless another thread has put
        something into the inbox of `call` meanwhile."""
        with self._busy:
            if call.inbox:
                return
            self._look(0 if self._outputs else _WAIT_S)
            self._make_text()

    def _look(self, timeout_s: float) -> None:
        """Let the driver work, and take what became known."""
        if self._ended is None:
            try:
                self._outputs += self.client.outputs(timeout_s)
            except StageError as error:
                self._ended = error
        if self._ended is not None and not self._outputs:
            raise self._ended

    def _make_text(self) -> None:
        """Put the deltas of some outputs into the inboxes of their calls."""
        for _ in range(min(len(self._outputs), _TEXTS_AT_ONCE)):
            output = self._outputs.popleft()
            call = self._calls.get(output.request_id)
            if call is None:
                continue  # its text ended it before, or its stream was dropped
            delta = call.running[output.request_id].take(output)
            call.inbox.append(delta)
            if delta.finish_reason is not None:
                call.running.pop(output.request_id, None)
                self._calls.pop(output.request_id, None)
                if output.finish_reason is None:
                    self.client.abort(output.request_id, delta.finish_reason)
