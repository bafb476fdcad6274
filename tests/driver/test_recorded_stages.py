"""What real stages tell of their run: whole, in order, and what it says is so."""

import os
import signal
import time
from itertools import pairwise
from math import inf, isfinite

import msgspec
import pytest

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request, StageCost
from pipeserve.core.records import Arrived, Ended, Fault, Ping, Planned
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import StageError
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.recording.recording import recording_of
from pipeserve.sampling_params import SamplingParams

from checkpoints import random_prompts, tiny_llama  # isort: skip

pytestmark = pytest.mark.processes

HIDDEN, LENGTHS, MAX_TOKENS = 48, (1, 3, 17, 16, 40, 9, 33, 5, 6), 9
ABORTED = 7


class Cost:
    """A cost model that keeps what it is told."""

    def __init__(self, num_stages):
        self.num_stages = num_stages
        self.observed, self.heads = [], []

    def seconds(self, work):
        return (0.25,) * self.num_stages

    def predict(self, microbatch):
        return StageCost((*self.seconds(None)[1:], float(microbatch.index)))

    def observe(self, index, stage, seconds):
        self.observed.append((stage, index, seconds))

    def observe_head(self, index, seconds):
        self.heads.append((index, seconds))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


def serve(driver, prompts):
    """Half of the requests at once, others later, of which one is aborted; and one alone. Tokens of
    each."""
    due = list(enumerate(prompts))
    tokens = {number: [] for number, _ in due}
    for wave in (due[:5], due[5:8], due[8:]):
        for number, prompt in wave:
            params = SamplingParams(
                temperature=0,
                max_tokens=MAX_TOKENS,
                ignore_eos=True,
                seed=0,
                prompt_logprobs=0 if number == 3 else None,
            )
            driver.submit([Request(id=number, prompt=tuple(prompt), params=params)])
        while driver.engine.num_unfinished > (1 if wave[0][0] == 0 else 0):
            for output in driver.outputs(0.5):
                tokens[output.request_id].append(output.token)
            if len(tokens[ABORTED]) >= 2:
                driver.abort(ABORTED, "abort")
    driver.settle()
    return tokens


class Run:
    """One run: its records as they came, sorted out, and what the driver knew beside them."""

    def __init__(self, folder, num_stages):
        self.told = []
        self.cost = Cost(num_stages)
        config = make_config({}, {"model": folder, "dtype": "float32", "max_num_seqs": 4,
                                  "max_num_batched_tokens": 24,
                                  "pipeline_parallel_size": num_stages,
                                  "head_stages": "both",
                                  "pipeline_window": num_stages})  # fmt: skip
        with Driver(checkpoint_setup(config, cost=self.cost), record=self.told.append) as driver:
            share = driver.engine._head_share  # turns alone, whichever end is slower here
            share.took = share.headed = lambda *_: None
            keepers = driver.fleet.keepers
            keepers[1] = msgspec.structs.replace(keepers[1], boot_id="another machine")
            while not any(isinstance(entry, Ping) for entry in self.told):
                driver.outputs(0.1)  # it is asked from the start
            self.tokens = serve(driver, random_prompts(folder, lengths=LENGTHS))
            self.window = driver.engine.pipeline.window + driver.engine.policy.traits.plans_ahead
            self.num_blocks = driver.engine.limits.num_blocks
        self.recording = recording_of(self.told, num_stages, {})
        self.planned = {entry.index: entry for entry in self.recording.planned}
        self.completed = {entry.index: entry for entry in self.recording.completed}
        self.headed = {entry.index: entry for entry in self.recording.headed}
        self.sampled = {entry.index: entry for entry in self.recording.spans[-1]} | self.headed
        """Of each microbatch, what told of its head."""

    def before_s(self, span):
        """When the stage was done with what it did before that."""
        ends = [each.end_s for each in self.recording.spans[span.stage][: span.index]]
        if span.stage == 0:
            ends += [head.end_s for head in self.recording.headed if head.end_s <= span.start_s]
        return max(ends, default=-inf)

    def is_scored(self, index):
        return any(chunk.num_scored for chunk in self.planned[index].chunks)


@pytest.fixture(scope="module", params=[2, 3])
def run(folder, request):
    return Run(folder, request.param)


def test_nothing_is_missing(run):
    recording = run.recording
    indices = list(range(len(recording.planned)))
    assert len(indices) > 20
    for entries in (recording.planned, recording.completed, *recording.spans):
        assert [entry.index for entry in entries] == indices
    assert all(entry.stage == s for s, spans in enumerate(recording.spans) for entry in spans)
    assert recording.faults == []


def test_a_microbatch_goes_through_a_stage_in_order(run):
    for spans in run.recording.spans:
        last_end_s = -inf
        for span in spans:
            times = (span.start_s, span.head_s, span.end_s)
            assert max(span.plan_s, span.input_s, last_end_s) <= span.start_s
            assert list(times) == sorted(times)
            assert span.start_s < span.head_s
            if span.stage < run.recording.num_stages - 1 or span.index in run.headed:
                assert span.head_s == span.end_s <= span.sent_s
            elif run.is_scored(span.index):
                assert span.head_s < span.sent_s < span.end_s
            else:
                assert span.head_s < span.end_s <= span.sent_s
            last_end_s = span.end_s


def test_no_one_has_what_was_not_sent(run):
    """What is seen as early as the end of the microbatch before was not waited for."""
    spans = run.recording.spans
    for index, planned in run.planned.items():
        assert planned.woken_s <= planned.start_s <= planned.sent_s
        for stage, own in enumerate(spans):
            span = own[index]
            before_s = run.before_s(span)
            assert span.plan_s >= planned.sent_s or span.plan_s <= before_s
            assert span.start_s >= planned.sent_s
            if stage:
                upstream = spans[stage - 1][index]
                assert span.start_s >= upstream.sent_s
                ends = [before.end_s for before in own[:index]]
                assert span.input_s >= upstream.sent_s or span.input_s in ends
        done = run.completed[index]
        assert run.sampled[index].sent_s <= done.received_s <= done.done_s
        assert done.waiting_s <= done.received_s


def test_the_first_stage_sees_tokens_when_they_were_sampled(run):
    first = run.recording.spans[0]
    waited = 0
    for index, planned in run.planned.items():
        span = first[index]
        sources = [
            (run.sampled[source].sent_s, source)
            for chunk in planned.chunks
            if (source := sampled_by(run, chunk, index)) is not None
        ]
        if not sources:
            assert span.input_s == -inf
            continue
        before_s = run.before_s(span)
        assert span.input_s >= max(sources)[0] or span.input_s <= before_s
        assert isfinite(span.input_s)
        waited += span.input_s > before_s
    assert waited


def sampled_by(run, chunk, index):
    """The microbatch that sampled the token at the chunk's last position; None for a prompt's."""
    if chunk.stop <= LENGTHS[chunk.request_id]:
        return None
    for source in range(index - 1, -1, -1):
        for other in run.planned[source].chunks:
            if other.request_id == chunk.request_id and other.stop == chunk.start:
                return source
    raise AssertionError(chunk)


def test_composition_and_bytes(run):
    for spans in run.recording.spans:
        for span in spans:
            num_tokens = sum(chunk.num_tokens for chunk in run.planned[span.index].chunks)
            assert span.num_tokens == num_tokens
            num_bytes = 8 + 4 * HIDDEN * num_tokens
            if spans is run.recording.spans[-1]:
                rows = sum(chunk.num_logits for chunk in run.planned[span.index].chunks)
                num_bytes = 4 * HIDDEN * rows * (span.index in run.headed)
            assert span.num_bytes == num_bytes


def test_chunks_are_the_positions_of_every_request(run):
    reached = dict.fromkeys(run.tokens, 0)
    for planned in run.recording.planned:
        for chunk in planned.chunks:
            assert chunk.start == reached[chunk.request_id]
            reached[chunk.request_id] = chunk.stop
    for number, length in enumerate(LENGTHS[:ABORTED]):
        assert reached[number] == length + MAX_TOKENS - 1


def test_thread_cpu_time(run):
    """No more than the wall time, but for what lies between reading the two clocks."""
    for spans in run.recording.spans:
        for span in spans:
            assert 0 < span.cpu_s < span.end_s - span.start_s + 1e-3
        for before, span in pairwise(spans):
            assert 0 < span.between_cpu_s < span.start_s - before.end_s + 2e-4


def test_requests_come_and_end(run):
    arrived, ended = run.recording.arrived, {e.request_id: e for e in run.recording.ended}
    assert [(e.request_id, e.num_prompt_tokens) for e in arrived] == list(enumerate(LENGTHS))
    assert {entry.max_tokens for entry in arrived} == {MAX_TOKENS}
    assert {n: e.num_output_tokens for n, e in ended.items()} == {
        number: len(tokens) for number, tokens in run.tokens.items()
    }
    reasons = {number: entry.reason for number, entry in ended.items()}
    assert reasons == {**dict.fromkeys(run.tokens, "length"), ABORTED: "abort"}


def test_what_is_counted_with_a_plan(run):
    num_unfinished, most_waiting = 0, 0
    for entry in run.told:
        num_unfinished += isinstance(entry, Arrived) - isinstance(entry, Ended)
        if isinstance(entry, Planned):
            assert entry.num_waiting + entry.num_running == num_unfinished
            assert len({chunk.request_id for chunk in entry.chunks}) <= entry.num_running <= 4
            assert 0 < entry.num_free_blocks < run.num_blocks
            assert entry.predicted_s[-1] == float(entry.index)
            most_waiting = max(most_waiting, entry.num_waiting)
    assert most_waiting


def test_what_a_plan_waited_for(run):
    first, *others = run.recording.planned
    arrived_s = run.recording.arrived[0].at_s
    assert (first.waited_for, first.after, first.woken_s) == ("no_requests", -1, arrived_s)
    reasons = {entry.waited_for for entry in others}
    assert reasons <= {"", "window", "token", "kv", "no_requests"}
    assert "" in reasons and "window" in reasons
    for before, entry in pairwise(run.recording.planned):
        if not entry.waited_for:
            assert (entry.after, entry.woken_s) == (-1, before.sent_s)
        if entry.waited_for == "window":
            assert entry.after == entry.index - run.window
        if entry.after >= 0:
            assert entry.woken_s == run.completed[entry.after].received_s


def test_the_cost_model_learns_what_is_recorded(run):
    spans = [span for spans in run.recording.spans for span in spans]
    assert sorted(run.cost.observed) == [(s.stage, s.index, s.end_s - s.start_s) for s in spans]
    heads = run.recording.headed
    assert run.cost.heads == [(head.index, head.end_s - head.start_s) for head in heads]
    assert 0 < len(heads) < len(run.planned)


def test_the_first_stage_heads_what_has_left_the_last_one(run):
    first, last = run.recording.spans[0], run.recording.spans[-1]
    for head in run.recording.headed:
        assert last[head.index].sent_s <= head.start_s < head.end_s <= head.sent_s
        assert not run.is_scored(head.index)
        assert all(s.end_s <= head.start_s or head.end_s <= s.start_s for s in first)


def test_a_keeper_of_another_machine_is_pinged(run):
    pings = run.recording.pings
    assert {ping.stage for ping in pings} == {1}
    for ping in pings:  # it only looks remote: it has the same clock
        assert ping.sent_s <= ping.remote_s <= ping.received_s
    for before, after in pairwise(pings):
        assert after.sent_s - before.sent_s >= 0.5


def test_the_ledger_explains_it(run):
    ledger = explain(run.recording)
    for stage in range(run.recording.num_stages):
        idle_s = ledger.idle_s(stage)
        total_s = ledger.busy_s[stage] + sum(idle_s.values())
        assert total_s == pytest.approx(ledger.seconds, abs=1e-6)
        assert idle_s["unknown"] < 0.02 * ledger.seconds


def test_a_killed_stage_is_a_fault(folder):
    told = []
    flags = {"model": folder, "dtype": "float32", "pipeline_parallel_size": 2, "restart": False}
    with Driver(checkpoint_setup(make_config({}, flags)), record=told.append) as driver:
        driver.submit([Request(id=0, prompt=(3, 4), params=SamplingParams(max_tokens=60, seed=0))])
        start_s = time.monotonic()
        os.kill(driver.stages[1].pid, signal.SIGKILL)
        for _ in range(2):  # it is told once
            with pytest.raises(StageError, match="stage 1"):
                while True:
                    driver.outputs(0.5)
    (fault,) = [entry for entry in told if isinstance(entry, Fault)]
    assert fault is told[-1]
    assert fault.stage == 1 and "killed by SIGKILL" in fault.reason
    assert start_s < fault.at_s <= time.monotonic()
