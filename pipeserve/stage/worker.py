"""The stage process that computes: the model's layers on this machine, inside the stage's loop.

Started by its keeper, which says what it is to do on standard input (`Launch`, wire/stage_job.py).
"""

import math
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import torch

from pipeserve.core.nouns import one_each
from pipeserve.core.work import Work
from pipeserve.stage.compute import Done, FeedBack, Tell, Turn
from pipeserve.stage.facts import facts_of
from pipeserve.stage.memory import device_memory
from pipeserve.stage.peers import Peers
from pipeserve.stage.sequences import Sequence
from pipeserve.stage.serve import serve
from pipeserve.stages.attention.inputs import StageInputs, build_inputs
from pipeserve.stages.checkpoint.weights import check_checkpoint, load_weights
from pipeserve.stages.config.families import read_config
from pipeserve.stages.devices import best_num_threads, make_backend
from pipeserve.stages.drawing import draw
from pipeserve.stages.sampling import Logprobs, SampleRow, score
from pipeserve.stages.stage import Stage
from pipeserve.stages.timing import part_bytes, time_parts
from pipeserve.wire import control, links
from pipeserve.wire.stage_job import StartStage, decode_share
from pipeserve.wire.step_messages import Sampled, StepChunk

_SCORED_ROWS = 64  # whose logits over the whole vocabulary are held at a time
_LOADING_REPORT_S = 0.25


class Stamps(NamedTuple):
    """As `Span` has them, and this thread's CPU time at the end."""

    head_s: float
    end_s: float
    sent_s: float
    end_cpu_s: float


class ModelCompute:
    """This stage's layers and their KV: the `Compute` of a checkpoint."""

    most_begun = 1

    def __init__(self, job: StartStage, tell: Tell) -> None:
        """By its configuration alone: no weight is read."""
        self._job = job
        self._tell = tell
        self._next_report_s = 0.0
        self._share = share = decode_share(job.work)
        self.block_size = share.block_size
        self.config = read_config(share.model_folder)
        if job.is_first:  # one for all
            check_checkpoint(share.model_folder, self.config)
        self.dtype = getattr(torch, share.dtype)
        self.kv_dtype = getattr(torch, share.kv_dtype)
        most_threads = torch.get_num_threads()
        torch.set_num_threads(best_num_threads(share.device, share.attention, most_threads))
        self._peers = Peers(job)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.model = Stage(
            self.config,
            first_layer=share.first_layer,
            stop_layer=share.stop_layer,
            has_embedding=share.has_embedding,
            has_head=share.has_head,
            gives_rows=job.is_last,
            backend=make_backend(share.device, share.attention, local_rank),
            shard=self._peers.shard,
        )
        layer_bytes, *end_bytes = part_bytes(
            self.config, self.model.backend, self.dtype, self._peers.shard
        )
        self.size = control.StageSized(
            weight_bytes=self.model.bytes_in(self.dtype),
            block_bytes=self.model.kv_block_bytes(block_size=share.block_size, dtype=self.kv_dtype),
            memory=device_memory(self.model.backend.device),
            layer_bytes=layer_bytes,
            end_bytes=tuple(end_bytes),
            meets_at=self._peers.meets_at(),
        )
        self.num_threads = torch.get_num_threads()
        self.links = links.TensorLinks()
        self._last_cpu_s = time.thread_time()
        """Of this thread at the end of the microbatch before."""

    def examine(self, works: tuple[Work, ...], seconds: float) -> control.Examined:
        """As `Compute`."""
        timed = time_parts(
            self.config,
            self.model.backend,
            works,
            seconds,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            has_embedding=self._job.is_first,
            has_head=self._job.is_last,
            shard=self._peers.shard,
        )
        facts = facts_of(str(torch.__version__), self.model.backend.name, self.num_threads)
        parts = self._peers.with_sums(timed.parts, works, self.model)
        return control.Examined(facts, parts, timed.cpu_share)

    def take_memory(self, num_blocks: int) -> None:
        """As `Compute`. Tells how far the weights are."""
        share = self._share
        load_weights(self.model, share.model_folder, self.dtype, self._report_loading)
        self.weight_bytes = self.model.num_bytes
        self._peers.share(self.model)
        # Taken from the model, so that a prompt that is scored may have it a few rows at a time.
        self.head, self.model.head = self.model.head, None
        self.kv = self.model.make_kv(
            num_blocks=num_blocks, block_size=share.block_size, dtype=self.kv_dtype
        )
        self.kv_bytes = self.kv.num_bytes

    def meet(self, address: str) -> bool:
        """As `Compute`."""
        self._peers.meet(address, self.model)
        return True

    def part(self) -> None:
        """As `Compute`."""
        self._peers.part()
        self.size = msgspec.structs.replace(self.size, meets_at=self._peers.meets_at())

    def _report_loading(self, num_read: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next_report_s or num_read == num_bytes:
            self._next_report_s = now + _LOADING_REPORT_S
            self._tell(control.Loading(num_read, num_bytes))

    def prepare(self) -> bool:
        """As `Compute`."""
        return self.model.backend.prepare()

    def begin(self, turn: Turn) -> Turn:
        """Nothing: this thread computes, and does so in `end`."""
        return turn

    def left_s(self, turn: Turn) -> float:
        return 0.0

    def end(self, turn: Turn, feed_back: FeedBack) -> Done | None:
        """As `Compute`."""
        try:
            return self._end(turn, feed_back)
        except RuntimeError as error:
            if not self._peers.are_lost(error):
                raise
        return None

    def _end(self, turn: Turn, feed_back: FeedBack) -> Done:
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        between_cpu_s = start_cpu_s - self._last_cpu_s
        inputs = self._build_inputs(turn)
        given = inputs.token_ids_T if self._job.is_first else self._unpack(turn, inputs)
        hidden = self.model(given, inputs, self.kv)
        in_sums = self._peers.sums_of(inputs.num_tokens)
        sampled, rows, num_bytes = None, None, 0
        if not self._job.is_last:
            hidden = hidden.cpu()  # where a GPU computes, this waits for it
            stamps = _stamps_now()
            if self.links.sends_part:
                hidden = self._peers.part_of(hidden)
            num_bytes = self.links.send(turn.step.index, hidden)
        elif turn.step.head_at_first:
            rows = hidden.cpu()
            stamps, num_bytes = _stamps_now(), rows.nbytes
        else:
            sampled, stamps = self._answer(turn, hidden, feed_back)
        self._last_cpu_s = stamps.end_cpu_s
        cpu_s = stamps.end_cpu_s - start_cpu_s
        times = start_s, *stamps[:3], cpu_s, between_cpu_s
        return Done(*times, num_bytes, sampled, *in_sums, rows)

    def apply_head(self, turn: Turn, feed_back: FeedBack) -> Done:
        """As `Compute`."""
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        num_rows = sum([chunk.num_logits for chunk in turn.step.chunks])
        shape = (num_rows, self.config.hidden_size)
        rows_RD = links.unpack_tensor(turn.activations, turn.step.index, shape, torch.float32)
        rows_RD = self.model.backend.place(rows_RD)
        sampled, stamps = self._answer(turn, rows_RD, feed_back)
        cpu_s, between_cpu_s = stamps.end_cpu_s - start_cpu_s, start_cpu_s - self._last_cpu_s
        self._last_cpu_s = stamps.end_cpu_s
        return Done(start_s, *stamps[:3], cpu_s, between_cpu_s, 0, sampled)

    def _build_inputs(self, turn: Turn) -> StageInputs:
        return build_inputs(
            [
                (chunk.start, chunk.stop, sequence.block_table, chunk.num_logits)
                for chunk, sequence in zip(turn.step.chunks, turn.sequences, strict=True)
            ],
            self.block_size,
            token_ids=[s.token_ids for s in turn.sequences] if self._job.is_first else None,
        )

    def _unpack(self, turn: Turn, inputs: StageInputs) -> torch.Tensor:
        shape = (inputs.num_tokens, self.config.hidden_size)
        size = self._peers.size_of_part(shape, torch.float32) if self.links.gets_part else None
        come = shape if size is None else (size,)
        tensor = links.unpack_tensor(turn.activations, turn.step.index, come, torch.float32)
        if size is not None:
            tensor = self._peers.joined(self.model.backend.place(tensor), shape)
        return tensor

    def _answer(
        self, turn: Turn, hidden_RD: torch.Tensor, feed_back: FeedBack
    ) -> tuple[Sampled, Stamps]:
        """Sample, then score what prompt tokens there are to score."""
        head_s = time.monotonic()
        places, rows, owners, scored, failed = [], [], [], [], {}
        stop = 0  # of a chunk's rows
        for place, (chunk, sequence) in enumerate(
            zip(turn.step.chunks, turn.sequences, strict=True)
        ):
            start, stop = stop, stop + chunk.num_logits
            if chunk.num_scored:
                scored.append((place, start, chunk, sequence))
            if chunk.samples:
                places.append(stop - 1)
                rows.append(_sample_row(sequence, chunk.stop))
                owners.append(place)
        sampled_RD = hidden_RD[torch.tensor(places, dtype=torch.int64)] if scored else hidden_RD
        drawn = draw(self.head, sampled_RD, rows)
        for place, (token, _) in zip(owners, drawn, strict=True):
            if token is None:
                failed[place] = self._not_finite(turn.step.chunks[place].stop)
        # A request that failed goes on until the driver has heard of it, with a token that exists.
        tokens = [0 if token is None else token for token, _ in drawn]
        end_s = sent_s = time.monotonic()
        counts = one_each(turn.step.chunks)
        feed_back(turn.step.index, tokens, counts)
        end_cpu_s = time.thread_time()  # a system call: not before the tokens are on their way
        wants_logprobs = any(row.params.logprobs is not None for row in rows)
        logprobs = [entry for _, entry in drawn] if wants_logprobs else []
        prompt_logprobs = []
        for place, *span in scored:
            entries = list(self._score(hidden_RD, *span))
            prompt_logprobs += entries
            is_nan = [math.isnan(own) for own, _ in entries]
            if any(is_nan):
                chunk = turn.step.chunks[place]
                first = chunk.stop - chunk.num_logits + 1  # token that is scored first
                failed[place] = self._not_finite(first + is_nan.index(True))
        if scored:
            end_s, end_cpu_s = time.monotonic(), time.thread_time()
        index = turn.step.index
        sampled = Sampled(index, tokens, counts, logprobs, prompt_logprobs, failed)
        return sampled, Stamps(head_s, end_s, sent_s, end_cpu_s)

    def _score(
        self, hidden_RD: torch.Tensor, first_row: int, chunk: StepChunk, sequence: Sequence
    ) -> Iterator[Logprobs]:
        """Of the prompt tokens that a chunk scores; its rows begin at `first_row`."""
        following = chunk.stop - chunk.num_logits + 1
        for start in range(0, chunk.num_scored, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, chunk.num_scored)
            yield from score(
                self.head(hidden_RD[first_row + start : first_row + stop]),
                sequence.token_ids[following + start : following + stop],
                sequence.params.prompt_logprobs,
            )

    def _not_finite(self, position: int) -> str:
        """What its user is told of a request whose logits for the token at `position` are not."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.kv_dtype == torch.float16 != self.dtype:
            return (
                f"the logits of token {position} are not finite: keys or values may leave the "
                "range of a float16 KV pool; leave --kv-cache-dtype out"
            )
        remedy = {
            "float16": "use --dtype bfloat16 or float32, whose range is larger",
            "bfloat16": "use --dtype float32",
            "float32": "ask who made the checkpoint",
        }[dtype]
        return (
            f"the logits of token {position} are not finite: the model's numbers leave the range "
            f"of {dtype}; {remedy}"
        )


def _stamps_now() -> Stamps:
    """Of a microbatch without a head here."""
    now = time.monotonic()
    return Stamps(now, now, now, time.thread_time())


def _sample_row(sequence: Sequence, position: int) -> SampleRow:
    """What the token at `position` is drawn by: the request and the position alone."""
    assert len(sequence.token_ids) == position, "rules need every token before theirs"
    registration = sequence.registration
    return SampleRow(
        sequence.params,
        position - registration.num_prompt_tokens,
        sequence.token_ids,
        registration.num_prompt_tokens,
        registration.stop_ids,
        registration.bad_word_ids,
    )


def main() -> None:
    """Run the stage whose job comes on standard input."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.inference_mode():
        serve(ModelCompute)


if __name__ == "__main__":
    main()
