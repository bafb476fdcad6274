"""A client without a pipeline behind it, and small tokenizers, for tests of what users touch.

Each request gets one token at each look at the outputs: the next of what `reply(prompt)` says, or
else a pure function of the prompt and the position.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeserve.configs import RunConfig
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.partition import plan_pipeline
from pipeserve.core.nouns import Begun, Chunk, Output, TokenLogprobs
from pipeserve.core.records import Arrived, Completed, Ended, Planned, Span, ignore
from pipeserve.core.request_state import check_fits
from pipeserve.core.view import Limits
from pipeserve.errors import StageError

EOS = 256
VOCAB_SIZE = 258
_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(folder: Path, chat_template: str | None = _CHAT) -> Path:
    """A tokenizer whose id n is the byte n, and 256 is eos: characters span tokens."""
    vocab = {letter: number for number, letter in _gpt2_bytes()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def _gpt2_bytes():
    """GPT-2's reversible table: printable Latin-1 stands for itself, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((byte, chr(byte)) for byte in printable)
    yield from ((byte, chr(256 + place)) for place, byte in enumerate(others))


class FakeClient:
    """As pipeserve.frontend.client.Client."""

    def __init__(
        self, folder: Path, *, reply=None, max_model_len=64, dies_at_look=None, seed=0, order="fcfs"
    ) -> None:
        self.config = RunConfig(model=str(folder), pipeline_parallel_size=2, seed=seed)
        self.limits = Limits(num_blocks=100, block_size=16, max_num_seqs=8,
                             max_num_batched_tokens=512, max_model_len=max_model_len,
                             order=order)  # fmt: skip
        self.model_folder = folder
        self.vocab_size, self.eos_token_ids = VOCAB_SIZE, (EOS,)
        self.record = ignore
        self.added, self.aborted, self.closed = [], [], False
        self.num_looks = 0
        self.dies_at_look = dies_at_look
        self.reply = reply or (lambda prompt: [])
        self.running = {}

    def submit(self, requests):
        for request in requests:
            check_fits(request, self.limits)
        for request in requests:
            self.added.append(request)
            num_prompt, max_tokens = len(request.prompt), request.params.max_tokens
            self.record(Arrived(request.id, time.monotonic(), num_prompt, max_tokens))
            self.running[request.id] = (request, iter(self._tokens(request)))

    def abort(self, request_id, reason="abort"):
        self.aborted.append((request_id, reason))
        self.running.pop(request_id, None)

    @property
    def num_unfinished(self):
        return len(self.running)

    def outputs(self, timeout_s):
        self.num_looks += 1
        if self.num_looks == self.dies_at_look:
            raise StageError("stage 1 (pid 7) died: killed by SIGKILL")
        if not self.running:
            return []
        index, now_s = self.num_looks, time.monotonic()
        chunks = tuple(Chunk(request_id, 0, 1, (), None, 1) for request_id in self.running)
        self.record(Planned(index, "", -1, now_s, now_s, now_s, chunks, 0, len(chunks), 90, ()))
        outputs = []
        for request, tokens in list(self.running.values()):
            output = next(tokens)
            outputs.append(output)
            if output.finish_reason is not None:
                self.running.pop(request.id, None)
                self.record(Ended(request.id, time.monotonic(), output.finish_reason, 1))
        for stage in range(2):
            start_s, end_s = now_s + stage * 1e-6, now_s + (stage + 1) * 1e-6
            self.record(
                Span(stage, index, len(chunks), now_s, start_s, start_s, end_s, end_s, end_s, 1e-6,
                     0.0, 8)
            )  # fmt: skip
        done_s = time.monotonic()
        self.record(Completed(index, now_s, done_s, done_s, (1,) * len(chunks)))
        return outputs

    def _tokens(self, request):
        known = dict(enumerate(self.reply(request.prompt)))
        for place in range(request.params.max_tokens):
            token = known.get(place, 97 + (sum(request.prompt) + place) % 26)
            reason = None
            if token in request.stop_ids:
                reason = "stop"
            elif place == request.params.max_tokens - 1:
                reason = "length"
            logprobs = None
            if request.params.logprobs is not None:
                logprobs = TokenLogprobs(sampled=-0.5, top={token: -0.5})
            scores = None
            if place == 0 and request.params.prompt_logprobs is not None:
                scores = tuple(TokenLogprobs(-float(token)) for token in request.prompt[1:])
            begun = None if place else Begun(num_cached=0, queued_s=0.01, prefill_s=0.02)
            yield Output(request.id, token, reason, logprobs, scores, begun=begun)
            if reason is not None:
                return

    def close(self):
        self.closed = True


class FakeDriver(FakeClient):
    """And what the verbs ask of the driver that they started, of two stages."""

    def __init__(self, folder: Path, **keywords) -> None:
        super().__init__(folder, **keywords)
        self.setup = SimpleNamespace(kind="real")
        self.shape = replace(load_shape("llama2-7b"), vocab_size=VOCAB_SIZE)
        self.plan = plan_pipeline(self.shape, 2, None, 512)
        self.dtype = "float32"
        self.engine = SimpleNamespace(limits=self.limits)
        self.fleet = SimpleNamespace(keepers=[SimpleNamespace(boot_id="here")] * 2)
        self.stages = tuple(
            SimpleNamespace(
                stage=stage, host="here", boot_id="of here", num_layers=2 - stage,
                weight_bytes=1000, kv_bytes=500, baseline_bytes=2000, peak_bytes=None,
            )
            for stage in range(2)
        )  # fmt: skip

    def settle(self):
        pass

    def refresh_memory(self):
        self.stages = tuple(
            SimpleNamespace(**{**vars(stage), "peak_bytes": 3600}) for stage in self.stages
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def write_jsonl(path: Path, *lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
