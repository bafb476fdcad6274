"""The stage's loop around a device that computes while the loop goes on: here one that is driven by
hand, with links that bring no messages."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from pipeserve.core.nouns import one_each
from pipeserve.stage.compute import Done
from pipeserve.stage.loop import _LULL_S, StageLoop
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.links import send_tokens, unpack_sampled
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import StartStage
from pipeserve.wire.step_messages import (
    HeadTiming,
    Registration,
    Sampled,
    Step,
    StepChunk,
    Timing,
    pack_tokens,
)

EPOCH = 3
SECONDS = 10.0
"""That the device takes for a microbatch."""


class PostedLinks:
    """Whoever asks is told what is there; and since when, as a test says."""

    def __init__(self):
        self.there = {}

    def listen(self, host, sources):
        return ""

    def connect(self, address, sources):
        raise AssertionError("there is nothing to connect")

    def close(self):
        self.there.clear()

    def ready(self, index):
        return index in self.there

    def take(self, index):
        return f"activations of {index}", self.there.pop(index)


class Device:
    """A `Compute` with a clock of its own, that a test sets; who takes an end waits until then."""

    size = control.StageSized(weight_bytes=0, block_bytes=0, memory=())
    weight_bytes = kv_bytes = 0
    num_threads = 1

    def take_memory(self, num_blocks):
        pass

    def part(self):
        pass

    def __init__(self, most_begun, is_last, log):
        self.most_begun, self.is_last, self.log = most_begun, is_last, log
        self.links = PostedLinks()
        self.now_s = self.free_s = 0.0
        self.given = []
        self.num_to_prepare = 0
        self.then = lambda: None

    def begin(self, turn):
        self.log.append(f"begin {turn.step.index}")
        self.given.append(turn)
        start_s = max(self.now_s, self.free_s)
        self.free_s = start_s + SECONDS
        return SimpleNamespace(turn=turn, start_s=start_s, end_s=self.free_s)

    def prepare(self):
        if not self.num_to_prepare:
            return False
        self.log.append("prepare")
        self.num_to_prepare -= 1
        self.then()
        return True

    def left_s(self, computing):
        return max(computing.end_s - self.now_s, 0.0)

    def end(self, computing, feed_back):
        """Samples the microbatch's index, for each chunk that samples."""
        step, end_s = computing.turn.step, computing.end_s
        self.log.append(f"end {step.index}")
        self.now_s = max(self.now_s, end_s)
        sampled = rows = None
        if self.is_last and step.head_at_first:
            rows = torch.zeros(1, 2)
        elif self.is_last:
            counts = one_each(step.chunks)
            tokens = [step.index] * sum(counts)
            feed_back(step.index, tokens, counts)
            sampled = Sampled(step.index, tokens, counts, [], [])
        times = computing.start_s, end_s, end_s, self.now_s, SECONDS, 0.0
        return Done(*times, sampled=sampled, rows=rows)

    def apply_head(self, turn, feed_back):
        """Samples as `end`."""
        index = turn.step.index
        self.log.append(f"head {index} of {bytes(turn.activations)[:-8].decode()}")
        counts = one_each(turn.step.chunks)
        feed_back(index, [index], counts)
        sampled = Sampled(index, [index], counts, [], [])
        return Done(self.now_s, self.now_s, self.now_s, self.now_s, 0.0, 0.0, sampled=sampled)


class Stage:
    """The loop of one stage in this process, and its driver's end of the connection."""

    def __init__(self, stage, num_stages, most_begun=2, shares_head=False):
        self.log = []
        self.device = Device(most_begun, stage == num_stages - 1, self.log)
        self.own, self.theirs = Sources(), Sources()
        self.told = []
        self.tokens = []
        """As they came to the other end."""
        self.rows = []
        listener = Listener("127.0.0.1", self.theirs, ("stage",))
        driver = connect(listener.address, self.own, "stage")
        while not driver.is_open:
            self._exchange()
            for source in self.own.ready(0):
                source.receive()
        job = StartStage(
            stage, num_stages, "", b"", "", "127.0.0.1", traceback=False, shares_head=shares_head
        )
        self.loop = StageLoop(job, EPOCH, self.own, driver, lambda *job: self.device, 0)
        self._listen_in(driver)
        self._exchange()

    def _listen_in(self, connection):
        """Logs what is sent on it."""
        send, purpose = connection.send, connection.carries

        def logged(*messages):
            what = [purpose]
            if purpose == "stage":
                what = [type(control.decode_from_stage(each)[1]).__name__ for each in messages]
            self.log.append(" + ".join(what))
            send(*messages)

        connection.send = logged

    def _exchange(self):
        """What has come from the stage."""
        for source in self.theirs.ready(0):
            messages = source.receive()
            if source.carries == "stage":
                self.driver = source
                self.told += [control.decode_from_stage(message)[1] for message in messages]
            elif source.carries == "tokens":
                self.tokens += map(unpack_sampled, messages)
            elif source.carries == "rows":
                self.rows += messages

    def connect_to_other_end(self):
        listener = Listener("127.0.0.1", self.theirs, ("tokens", "rows"))
        shares_rows = self.loop.job.shares_head and self.loop.job.is_last
        rows = listener.address if shares_rows else ""
        self.say(control.Connect("", listener.address, rows))
        while not any(isinstance(message, control.Connected) for message in self.told):
            self.rounds(1)
        self._listen_in(self.loop.neighbours.other_end)
        self.log.clear()

    def say(self, message, epoch=EPOCH):
        self.driver.send(control.encode(message, epoch))

    def plan(self, *steps):
        for step in steps:
            self.say(step)

    def rounds(self, number=1):
        for _ in range(number):
            self.loop.go_round(may_wait=False)
            self._exchange()

    @property
    def spans(self):
        return [message.span for message in self.told if isinstance(message, Timing)]

    def close(self):
        self.loop.close()
        self.theirs.close()


@pytest.fixture
def opened():
    stages = []

    def open_stage(*how, **options):
        stages.append(Stage(*how, **options))
        return stages[-1]

    yield open_stage
    for stage in stages:
        stage.close()


def registration(request_id, num_tokens):
    ids = pack_tokens([7] * num_tokens)
    return Registration(request_id, ids, num_tokens, [request_id], {}, [], ())


def prompt(index, length=4, head_at_first=False):
    """A step that admits request `index` and computes its prompt, and samples."""
    chunk = StepChunk(index, 0, length, (), None, 1, 0)
    return Step(index, (), [registration(index, length)], [chunk], head_at_first)


def decode(index, request_id, stop, released=()):
    """The token before `stop` of a request goes in, and one is sampled."""
    return Step(index, released, [], [StepChunk(request_id, stop - 1, stop, (), index - 1, 1, 0)])


def events(stage, *kinds):
    return [line for line in stage.log if line.split()[0] in kinds]


# ---- nothing to compute -------------------------------------------------------------------------


def has_just_done_one(stage):
    """Microbatch 0."""
    stage.plan(prompt(0))
    stage.rounds(2)
    stage.device.now_s = SECONDS
    stage.rounds(2)
    assert events(stage, "begin", "end") == ["begin 0", "end 0"]
    stage.log.clear()


def test_before_the_first_microbatch_what_can_be_done_ahead_is_done(opened):
    """At once, a moment at a time: a start that waited for half a second of it took 1.6 times as
    long as importing torch, in place of 1.3."""
    stage = opened(0, 2)
    stage.device.num_to_prepare, stage.device.then = 3, lambda: stage.plan(prompt(0))
    start_s = time.monotonic()
    stage.loop.go_round()
    assert events(stage, "prepare", "begin") == ["prepare", "begin 0"], "it waits for no other"
    assert time.monotonic() - start_s < _LULL_S


def test_later_it_is_done_in_a_lull(opened):
    stage = opened(0, 2)
    has_just_done_one(stage)
    stage.device.num_to_prepare, stage.device.then = 3, lambda: stage.plan(prompt(1))
    start_s = time.monotonic()
    stage.loop.go_round()
    assert events(stage, "prepare", "begin") == ["prepare", "begin 1"]
    assert time.monotonic() - start_s > 0.9 * _LULL_S


def test_between_microbatches_nothing_is_done_ahead(opened):
    """On a virtual machine whose host had not given it its memory yet, each 2 MiB took 5 ms. They
    came while a stage waited for its next microbatch, 4 ms away, and it ended 5 % fewer tokens."""
    stage = opened(0, 2)
    has_just_done_one(stage)
    stage.device.num_to_prepare = 3
    soon = threading.Timer(0.02, lambda: stage.plan(prompt(1)))
    soon.start()
    stage.loop.go_round()
    soon.join()
    assert events(stage, "prepare", "begin") == ["begin 1"]
    stage.plan(prompt(2), prompt(3))
    stage.loop.go_round()
    assert events(stage, "prepare", "begin")[-1] == "begin 2", "there was something to do"


def test_who_often_asks_for_a_sign_of_life_does_not_put_off_a_lull(opened):
    """Idle stages are asked four times in --heartbeat-interval: of 0.8 s or less, more often than a
    lull takes."""
    stage = opened(0, 2)
    has_just_done_one(stage)
    stage.device.num_to_prepare = 1
    for _ in range(8):
        soon = threading.Timer(0.05, lambda: stage.say(control.Heartbeat(0.0)))
        soon.start()
        stage.loop.go_round()
        soon.join()
    assert events(stage, "prepare") == ["prepare"]
    assert len(events(stage, "Heartbeat")) == 8


# ---- two halves ---------------------------------------------------------------------------------


def test_two_are_begun_at_most_and_ends_are_taken_in_order(opened):
    stage = opened(1, 3)
    stage.plan(*map(prompt, range(5)))
    stage.device.links.there = dict.fromkeys(range(5), 0.5)
    stage.rounds(8)
    assert events(stage, "begin", "end") == [
        "begin 0", "begin 1", "end 0", "begin 2", "end 1", "begin 3", "end 2", "begin 4", "end 3",
    ]  # fmt: skip
    stage.device.now_s = 5 * SECONDS
    stage.rounds()
    assert events(stage, "begin", "end")[-1] == "end 4"
    assert [turn.activations for turn in stage.device.given] == [
        f"activations of {index}" for index in range(5)
    ]


def test_a_compute_that_wants_it_has_one_at_a_time(opened):
    stage = opened(1, 3, most_begun=1)
    stage.plan(prompt(0), prompt(1))
    stage.device.links.there = {0: 0.5, 1: 0.5}
    stage.rounds(4)
    assert events(stage, "begin", "end") == ["begin 0", "end 0", "begin 1", "end 1"]


def test_the_next_is_begun_as_soon_as_it_is_there(opened):
    """While the one before is computed."""
    stage = opened(1, 3)
    stage.plan(prompt(0), prompt(1))
    stage.device.links.there = {0: 0.5}
    stage.rounds(2)
    stage.device.now_s = SECONDS / 2
    stage.rounds(2)
    assert events(stage, "begin", "end") == ["begin 0"]
    stage.device.links.there = {1: 0.5}
    stage.rounds()
    assert events(stage, "begin", "end") == ["begin 0", "begin 1", "end 0"]


def test_an_end_is_not_taken_before_it_is_due_while_another_could_come(opened):
    stage = opened(1, 3)
    stage.plan(prompt(0))
    stage.device.links.there = {0: 0.5}
    stage.rounds(3)
    assert events(stage, "end") == []
    stage.device.now_s = SECONDS
    stage.rounds()
    assert events(stage, "end") == ["end 0"]


def test_nothing_is_begun_before_its_plan_and_its_activations(opened):
    stage = opened(1, 3)
    stage.plan(prompt(0))
    stage.device.links.there = {1: 0.5}  # of one behind it
    stage.rounds(3)
    assert stage.log == []
    stage.device.links.there[0] = 0.25
    stage.rounds(3)
    assert events(stage, "begin") == ["begin 0"], "1 is there, but for its plan"
    stage.plan(prompt(1))
    stage.rounds(3)
    assert events(stage, "begin") == ["begin 0", "begin 1"]
    assert [turn.input_s for turn in stage.device.given] == [0.25, 0.5]


def test_the_first_stage_waits_for_tokens_on_their_way(opened):
    """And what is planned behind such a microbatch, for it."""
    stage = opened(0, 2)
    stage.device.most_begun = 3  # room, so that nothing but tokens is waited for
    stage.plan(prompt(0), decode(1, 0, stop=5), prompt(2))
    stage.rounds(3)
    assert events(stage, "begin") == ["begin 0"]
    last_stage = connect(stage.loop.neighbours.tokens_at, stage.theirs, "tokens")
    send_tokens(last_stage, 0, [11], b"\1")
    for _ in range(1000):
        stage.rounds()
        if len(stage.device.given) > 1:
            break
    assert events(stage, "begin") == ["begin 0", "begin 1", "begin 2"]
    assert list(stage.device.given[1].sequences[0].token_ids) == [7, 7, 7, 7, 11]


def test_a_single_stage_waits_for_its_own_tokens(opened):
    """Two of other requests go at once; one that needs what the one before samples does not."""
    stage = opened(0, 1)
    stage.plan(prompt(0), prompt(1), decode(2, 1, stop=5), decode(3, 0, stop=5))
    stage.rounds(8)
    assert events(stage, "begin", "end") == [
        "begin 0", "begin 1", "end 0",  # 2 needs the token of 1, and 3 comes behind 2
    ]  # fmt: skip
    stage.device.now_s = 2 * SECONDS
    stage.rounds(2)
    assert events(stage, "begin", "end")[3:] == ["end 1", "begin 2", "begin 3", "end 2"]
    tokens = [list(turn.sequences[0].token_ids[4:]) for turn in stage.device.given]
    assert tokens[2][0] == 1 and tokens[3][0] == 0


def test_a_request_may_be_released_while_its_microbatch_is_computed(opened):
    """By the one behind it, which is begun before the first has its tokens."""
    stage = opened(0, 1)
    behind = prompt(1)
    stage.plan(prompt(0), Step(1, (0,), behind.admitted, behind.chunks))
    stage.rounds(2)
    assert events(stage, "begin", "end") == ["begin 0", "begin 1", "end 0"]
    stage.device.now_s = 2 * SECONDS
    stage.rounds(2)
    sampled = [message for message in stage.told if isinstance(message, Sampled)]
    assert [(each.index, each.tokens) for each in sampled] == [(0, [0]), (1, [1])]
    assert len(stage.loop.sequences) == 1


# ---- what is told -------------------------------------------------------------------------------


def test_spans_are_the_device_s_and_do_not_overlap(opened):
    stage = opened(1, 3)
    stage.plan(*map(prompt, range(4)))
    stage.device.links.there = dict.fromkeys(range(4), 0.5)
    stage.rounds(4)
    stage.device.now_s = 4 * SECONDS
    stage.rounds(2)
    assert [span.index for span in stage.spans] == [0, 1, 2, 3]
    for before, after in pairwise(stage.spans):
        assert before.end_s == after.start_s, "the device stood still, or did two at once"
    assert {(span.num_tokens, span.input_s) for span in stage.spans} == {(4, 0.5)}


def test_tokens_go_to_the_first_stage_before_anything_else(opened):
    """Then to the driver, which is woken once: their times come with them."""
    stage = opened(1, 2)
    stage.connect_to_other_end()
    stage.plan(*map(prompt, range(3)))
    stage.device.links.there = dict.fromkeys(range(3), 0.5)
    stage.rounds(5)
    assert stage.log == [
        "begin 0", "begin 1", "end 0", "tokens", "Sampled + Timing",
        "begin 2", "end 1", "tokens", "Sampled + Timing",
    ]  # fmt: skip
    stage.device.now_s = 3 * SECONDS
    stage.rounds(3)
    assert stage.tokens == [(index, [index], b"\1") for index in range(3)]


def test_without_tokens_times_are_told_when_the_device_has_its_next_microbatch(opened):
    stage = opened(0, 2)
    stage.plan(*map(prompt, range(3)))
    stage.rounds(5)
    assert stage.log == [
        "begin 0", "begin 1", "end 0", "Timing", "begin 2", "end 1", "Timing",
    ]  # fmt: skip


def test_what_came_while_an_end_was_waited_for_counts_as_seen_then(opened):
    stage = opened(1, 3, most_begun=1)
    stage.plan(prompt(0))
    stage.device.links.there = {0: 0.5}
    stage.rounds()
    stage.plan(prompt(1))
    stage.device.links.there = {1: 0.5}
    stage.rounds(4)
    assert stage.device.given[1].plan_s == stage.spans[0].end_s == SECONDS


# ---- another stage was lost ---------------------------------------------------------------------


def test_a_stage_that_begins_an_epoch_has_nothing_in_hand(opened):
    """Plans, microbatches that were begun, requests and what a link brought are dropped."""
    stage = opened(1, 3)
    stage.loop.has_memory = True
    stage.device.take_memory = None  # never again
    stage.plan(*map(prompt, range(4)))
    stage.device.links.there = dict.fromkeys(range(4), 0.5)
    stage.rounds()
    assert len(stage.loop.begun) and len(stage.loop.plans) and len(stage.loop.sequences)
    stage.say(control.Renew(stage.loop.job.work), EPOCH + 1)
    stage.rounds()
    assert not (stage.loop.begun or stage.loop.plans or len(stage.loop.sequences))
    assert stage.told[-1] == stage.device.size
    stage.told.clear()
    stage.say(control.TakeMemory(9), EPOCH + 1)
    stage.say(prompt(4), EPOCH)  # of the old one
    stage.rounds()
    assert isinstance(stage.told[-1], control.StageReady) and not stage.loop.plans
    stage.device.links.there = {5: 0.5}
    stage.say(prompt(5), EPOCH + 1)
    stage.rounds()
    assert events(stage, "begin")[-1] == "begin 5"
    stage.device.now_s = 100.0
    stage.rounds(2)
    assert [span.index for span in stage.spans] == [5]


# ---- the end ------------------------------------------------------------------------------------


def test_a_stage_that_has_begun_two_ends_with_its_driver(opened):
    stage = opened(1, 3)
    stage.plan(*map(prompt, range(3)))
    stage.device.links.there = dict.fromkeys(range(3), 0.5)
    stage.rounds()
    stage.driver.close()
    with pytest.raises(SystemExit) as ended:
        stage.rounds(2)
    assert ended.value.code == 1
    assert stage.device.given[-1].step.index == 1


# ---- where both ends have the head --------------------------------------------------------------


def rounds_until(stage, line):
    for _ in range(1000):
        stage.rounds()
        if line in stage.log:
            return
    raise AssertionError(f"{line} did not come; {stage.log}")


def test_rows_that_come_back_go_first_and_the_other_end_hears_of_their_tokens(opened):
    stage = opened(0, 2, most_begun=1, shares_head=True)
    stage.connect_to_other_end()
    stage.plan(prompt(0, head_at_first=True), prompt(1))
    stage.rounds(4)
    assert events(stage, "begin", "end", "head") == ["begin 0", "end 0", "begin 1", "end 1"]
    rows = connect(stage.loop.neighbours.rows_at, stage.theirs, "rows")
    while not rows.is_open:
        stage.rounds()
    stage.plan(prompt(2))
    rows.send_large(memoryview(b"rows"), memoryview(bytes(8)))
    rounds_until(stage, "head 0 of rows")
    stage.rounds(4)
    place = stage.log.index("head 0 of rows")
    assert stage.log[place + 1 : place + 3] == ["tokens", "Sampled + HeadTiming"]
    assert stage.tokens == [(0, [0], b"\1")]
    headed = [message.headed for message in stage.told if isinstance(message, HeadTiming)]
    assert [each.index for each in headed] == [0]
    stage.plan(decode(3, 0, stop=5))
    rounds_until(stage, "end 3")
    assert list(stage.device.given[-1].sequences[0].token_ids) == [7, 7, 7, 7, 0]


def test_the_times_of_a_microbatch_are_told_before_the_head_that_follows_it(opened):
    """The driver would think else that the microbatch took no time, and the head all of it, and
    take a stage that works for one that hangs."""
    stage = opened(0, 2, most_begun=1, shares_head=True)
    stage.connect_to_other_end()
    stage.plan(prompt(0, head_at_first=True))
    stage.rounds(4)
    rows = connect(stage.loop.neighbours.rows_at, stage.theirs, "rows")
    while not rows.is_open:
        stage.rounds()
    end = stage.device.end

    def end_late(*how):
        rows.send_large(memoryview(b"rows"), memoryview(bytes(8)))  # of 0, while 1 is computed
        time.sleep(0.1)
        return end(*how)

    stage.device.end = end_late
    stage.plan(prompt(1))
    rounds_until(stage, "Sampled + HeadTiming")
    place = stage.log.index("end 1")
    assert stage.log[place:] == [
        "end 1", "Timing", "head 0 of rows", "tokens", "Sampled + HeadTiming",
    ]  # fmt: skip


def test_the_last_stage_sends_rows_back_and_waits_for_what_it_samples_by(opened):
    """Rules go by all tokens of a request, whichever end has sampled them."""
    stage = opened(1, 2, most_begun=1, shares_head=True)
    stage.connect_to_other_end()
    stage.plan(prompt(0, head_at_first=True), decode(1, 0, stop=5))
    stage.device.links.there = {0: 0.5, 1: 0.5}
    stage.rounds(4)
    assert events(stage, "begin", "end", "tokens") == ["begin 0", "end 0"]
    while not stage.rows:
        stage.rounds()
    first_stage = connect(stage.loop.neighbours.tokens_at, stage.theirs, "tokens")
    send_tokens(first_stage, 0, [11], b"\1")
    rounds_until(stage, "end 1")
    assert list(stage.device.given[1].sequences[0].token_ids)[:5] == [7, 7, 7, 7, 11]
