"""Emulated stages: real processes that wait as long as the simulator says they would compute."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import msgspec
import pytest

from pipeserve import LLM
from pipeserve.configs import load_recipe, make_config
from pipeserve.core.nouns import Request, RequestId, Wait
from pipeserve.driver import waiting
from pipeserve.driver.driver import Driver
from pipeserve.driver.fleet import Fleet
from pipeserve.errors import ConfigError, StageError
from pipeserve.launch import cli
from pipeserve.launch.emulated import stage as emulated_stage
from pipeserve.launch.emulated.stage import (
    EmulatedCompute,
    EmulatedWork,
    HeaderLinks,
    wait_until,
)
from pipeserve.launch.run import starting
from pipeserve.launch.run.emulated import check_one_clock, emulated_setup
from pipeserve.launch.run.record import meta_of_driver
from pipeserve.launch.run.simulated import simulated_run
from pipeserve.launch.show.plan import plan_lines
from pipeserve.launch.verbs.bench import run_items
from pipeserve.profiling.ledger.ledger import explain
from pipeserve.profiling.recording.reader import read_recording
from pipeserve.profiling.recording.recording import Ring, recording_of
from pipeserve.profiling.simulation.simulator import Simulation, arrivals_in_order
from pipeserve.profiling.simulation.workloads import WorkItem
from pipeserve.sampling_params import SamplingParams
from pipeserve.stage.compute import Turn
from pipeserve.stage.last_spans import LastSpans
from pipeserve.wire import connecting
from pipeserve.wire.control import (
    StageHello,
    StageReady,
    StageSized,
    TakeMemory,
    decode_from_stage,
    decode_stage_hello,
    encode,
)
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources
from pipeserve.wire.stage_job import Launch, StartStage, encode_job
from pipeserve.wire.step_messages import Step, StepChunk

pytestmark = pytest.mark.processes

MODEL = {"model": "llama2-7b", "device_profile": "a100-80gb-dgx", "max_model_len": 1024}
RUN = [
    "llama2-7b", "--device-profile", "a100-80gb-dgx", "--max-model-len", "1024", "-pp", "3",
    "--device", "emulated",
]  # fmt: skip
ITEMS = [WorkItem(prompt=(7,) * (40 + 90 * k), max_tokens=2 + k) for k in range(6)]


def config_of(num_stages=3, **flags):
    """Stages that take a few milliseconds."""
    flags = {**MODEL, "pipeline_parallel_size": num_stages, "device": "emulated", **flags}
    return make_config({}, flags)


def record(config, items):
    """Records of a run, and what the requests gave."""
    ring = Ring()
    with Driver(emulated_setup(config), record=ring.record) as driver:
        served = run_items(driver, items, "", map(RequestId, count()))
        driver.settle()
        return recording_of(ring, len(driver.stages), meta_of_driver(driver)), served


@pytest.fixture(scope="module")
def run():
    return record(config_of(), ITEMS)[0]


@pytest.fixture(scope="module")
def times():
    return simulated_run(config_of()).times


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(driver):
    return [of.pid for of in (*driver.stages, *driver.fleet.keepers.values())]


def wait_until_gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"processes left behind: {left}"


# ---- the run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sarathi_serve", "vllm", "orca"])
def test_the_schedule_is_the_simulator_s(policy):
    """Where nothing depends on when: all requests are there at once, and the window is fixed."""
    config = config_of(policy=policy, max_num_batched_tokens=1024, pipeline_window=3)
    emulated, _ = record(config, ITEMS)
    ring, setup = Ring(), simulated_run(config)
    lengths = [(len(item.prompt), item.max_tokens) for item in ITEMS]
    arrivals = arrivals_in_order([0.0] * len(lengths), lengths)
    Simulation(setup.make_pipeline(ring.record), arrivals).run_until()
    simulated = recording_of(ring, 3, setup.meta())
    assert [p.chunks for p in emulated.planned] == [p.chunks for p in simulated.planned]
    assert emulated.meta["limits"] == simulated.meta["limits"]
    assert emulated.meta["plan"] == simulated.meta["plan"]


def test_stages_are_told_the_simulator_s_truth():
    """Of the flags' seed, which draws what a profile's formulae are off by."""
    config = config_of(seed=3)
    step = Step(0, (), [], [StepChunk(0, 0, 40, (), None, 1, 0)])
    told = [msgspec.msgpack.decode(w, type=EmulatedWork) for w in emulated_setup(config).works]
    assert len(told) == 3
    for work in told:
        assert work.times().compute_s(step) == simulated_run(config).times.compute_s(step)
    assert told[0].times().compute_s(step) != simulated_run(config_of()).times.compute_s(step)


def test_limits_are_those_of_the_flags():
    assert emulated_setup(config_of(slo_tbt=0.5)).limits_for([]).max_tbt_s == 0.5


def test_every_token_comes(run):
    assert [end.num_output_tokens for end in run.ended if end.reason == "length"] == sorted(
        item.max_tokens for item in ITEMS
    )
    assert run.meta["kind"] == "emulated"


def test_stages_compute_as_long_as_the_profile_says_and_in_order(run, times):
    planned = {plan.index: plan for plan in run.planned}
    for stage, spans in enumerate(run.spans):
        assert [span.index for span in spans] == sorted(planned)
        assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
        for span in spans:
            seconds = times.compute_s(planned[span.index])[stage]
            assert span.cpu_s == seconds
            assert span.end_s == pytest.approx(span.start_s + seconds, abs=1e-9)
            assert span.sent_s >= span.end_s
            assert span.num_tokens == sum(c.num_tokens for c in planned[span.index].chunks)
    for span in run.spans[-1]:
        head_s = times.head_s(planned[span.index])
        assert span.end_s - span.head_s == pytest.approx(head_s, abs=1e-9)
        assert head_s > 0


def test_activations_take_as_long_as_the_profile_says(run, times):
    """A link carries one microbatch at a time."""
    for stage in (1, 2):
        free_s = 0.0
        for plan, sender, receiver in zip(
            run.planned, run.spans[stage - 1], run.spans[stage], strict=True
        ):
            free_s = max(sender.sent_s, free_s) + times.hop_s(plan)[stage - 1]
            assert receiver.start_s >= receiver.input_s >= free_s
            assert sender.num_bytes == 16, "more than an index and a time was sent"


def test_what_is_there_in_time_is_begun_without_a_pause(run):
    """The device goes from one microbatch to the next by itself."""
    pairs = [pair for spans in run.spans for pair in pairwise(spans)]
    assert any(after.start_s == before.end_s for before, after in pairs)


def test_what_came_while_a_stage_computed_was_not_waited_for(run):
    """However late the stage looks: it was there when the microbatch before ended."""
    pairs = [pair for spans in run.spans[1:] for pair in pairwise(spans)]
    assert any(after.input_s <= before.end_s for before, after in pairs)


@pytest.fixture
def sent(monkeypatch):
    """What is sent to a next stage that nobody listens for."""
    messages = []
    next_stage = SimpleNamespace(send=messages.append)
    monkeypatch.setattr(connecting, "connect", lambda *where: next_stage)
    return messages


def test_a_slow_link_carries_one_microbatch_at_a_time(sent):
    sender, receiver = HeaderLinks(), HeaderLinks()
    sender.connect("", None)
    for index in range(2):
        sender.send(index, 10.0 + index, 5.0)
    sender.send(2, 40.0, 5.0)
    assert not receiver.ready(0)
    receiver.came(sent, 12.0)
    assert receiver.ready(0)
    assert [receiver.take(index)[1] for index in range(3)] == [15.0, 20.0, 45.0]
    sender.send(3, 41.0, 0.0)
    receiver.came(sent[3:], 50.0)
    assert receiver.take(3)[1] == 50.0, "nobody has it before it is seen"


def test_the_latency_of_a_link_does_not_occupy_it(sent):
    sender = HeaderLinks(latency_s=2.0)
    sender.connect("", None)
    for index in (1, 2):
        sender.send(index, 100.0, 3.0)
    receiver = HeaderLinks()
    receiver.came(sent, 0.0)
    assert [receiver.take(index)[1] for index in (1, 2)] == [103.0, 104.0]


def test_a_link_out_of_step_is_noticed(sent):
    sender, receiver = HeaderLinks(), HeaderLinks()
    sender.connect("", None)
    sender.send(4, 0.0, 0.0)
    receiver.came(sent, 0.0)
    with pytest.raises(RuntimeError, match="expected microbatch 5, got 4"):
        receiver.take(5)


@pytest.fixture
def no_waiting(monkeypatch):
    """Devices whose time passes at once."""
    monkeypatch.setattr(emulated_stage, "wait_until", lambda time_s: None)


def one_rank(times, shard=0, num_shards=1, control=""):
    """Of the last of two stages."""
    job = StartStage(1, 2, "", b"", control, "", False, shard, num_shards)
    return EmulatedCompute(times, job, 100)


def turn(index, given_s):
    return Turn(Step(index, (), [], []), [], None, 0.0, given_s)


THIRTY_S = SimpleNamespace(
    compute_s=lambda step: (0.0, 30.0),
    head_s=lambda step: 4.0,
    all_reduce_s=lambda step: (0.0, 7.0),
)


def test_the_device_takes_one_microbatch_after_the_other(no_waiting):
    """From when it is there, and when the one before is done; whenever it was begun."""
    compute, now = one_rank(THIRTY_S), time.monotonic()
    begun = [
        compute.begin(turn(index, now + there_s)) for index, there_s in enumerate((100, 110, 200))
    ]
    assert compute.left_s(begun[0]) > 120.0
    done = [compute.end(one, lambda *sampled: None) for one in begun]
    assert [one.start_s - now for one in done] == pytest.approx([100.0, 130.0, 200.0])
    assert [one.end_s - now for one in done] == pytest.approx([130.0, 160.0, 230.0])
    for one in done:
        assert one.end_s - one.head_s == pytest.approx(4.0)
        assert (one.cpu_s, one.all_reduce_s, one.rank_wait_s) == (30.0, 0.0, 0.0)


def test_ranks_of_a_stage_begin_when_the_last_of_them_can(no_waiting):
    """The others wait for it: on each of them the microbatch ends at the same time."""
    name = f"127.0.0.1:1/{secrets.token_hex(8)}"
    ranks = [one_rank(THIRTY_S, shard, 3, name) for shard in range(3)]
    now = time.monotonic()
    begun = [rank.begin(turn(0, now + 100 + shard)) for shard, rank in enumerate(ranks)]
    begun += [rank.begin(turn(1, now + 120)) for rank in ranks]
    done = [ranks[n % 3].end(one, lambda *sampled: None) for n, one in enumerate(begun)]
    assert [one.end_s - now for one in done] == pytest.approx([132.0] * 3 + [162.0] * 3)
    assert [one.rank_wait_s for one in done] == pytest.approx([2.0, 1.0, 0.0] + [0.0] * 3)
    assert {one.all_reduce_s for one in done} == {7.0}
    assert [one.start_s - now for one in done] == pytest.approx([100, 101, 102] + [132] * 3)
    assert not list(Path("/dev/shm").glob(f"pipeserve-{name.partition('/')[2]}*"))


def two_ranks(seconds):
    """Of a stage, whose microbatches take so long."""
    times = SimpleNamespace(
        compute_s=lambda step: (0.0, seconds),
        head_s=lambda step: 0.0,
        all_reduce_s=lambda step: (0.0, 0.0),
    )
    name = f"127.0.0.1:1/{secrets.token_hex(8)}"
    return [one_rank(times, shard, 2, name) for shard in range(2)]


def test_a_rank_that_waits_is_freed_when_another_hears_that_the_epoch_is_over(no_waiting):
    """One before them was lost, and its input never comes to the other."""
    early, late = two_ranks(1e-3)
    assert early.meet("") and late.meet("")
    begun = early.begin(turn(0, 0.0))
    timer = Timer(0.1, late.part)
    timer.start()
    assert early.end(begun, lambda *sampled: None) is None
    early.part()
    early.part()  # when it stands still, and when it hears itself that the epoch is over
    assert early.meet("") and late.meet("")
    after = [rank.begin(turn(1, 0.0)) for rank in (early, late)]
    assert early.end(after[0], lambda *sampled: None).rank_wait_s < 1.0
    timer.join()


def test_a_rank_waits_for_one_that_was_not_given_the_microbatch_yet(no_waiting):
    early, late = two_ranks(1e-3)
    begun = early.begin(turn(0, 0.0))
    timer = Timer(0.1, lambda: late.begin(turn(0, 0.0)))
    timer.start()
    done = early.end(begun, lambda *sampled: None)
    assert done.rank_wait_s >= 0.09
    assert done.end_s == pytest.approx(done.start_s + done.rank_wait_s + 1e-3)
    timer.join()


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-4, 0.003])
def test_a_wait_is_never_short(seconds):
    time_s = time.monotonic() + seconds
    wait_until(time_s)
    assert time.monotonic() >= time_s


def test_the_ledger_explains_it(run):
    ledger = explain(run)
    for stage, busy_s in enumerate(ledger.busy_s):
        idle_s = ledger.idle_s(stage)
        assert busy_s + sum(idle_s.values()) == pytest.approx(ledger.seconds)
        assert idle_s["unknown"] < 0.02 * ledger.seconds


def test_tokens_follow_from_the_seed_and_the_place():
    def tokens_of(seeds):
        tokens = {number: [] for number in range(len(seeds))}
        with Driver(emulated_setup(config_of(2))) as driver:
            for number, seed in enumerate(seeds):
                params = SamplingParams(max_tokens=6, seed=seed, ignore_eos=True)
                prompt = (1,) * (20 + 30 * number)
                driver.submit([Request(id=RequestId(number), prompt=prompt, params=params)])
            while driver.engine.num_unfinished:
                for output in driver.outputs(0.1):
                    tokens[output.request_id].append(output.token)
            vocab_size = driver.shape.vocab_size
        assert all(0 <= token < vocab_size for of in tokens.values() for token in of)
        return list(tokens.values())

    first, second, third = tokens_of([5, 5, 6])
    assert len(first) == 6
    assert first == second != third
    assert len({*first}) > 1
    assert tokens_of([5]) == [first]


@pytest.mark.parametrize("victim", ["stage", "keeper"])
def test_a_killed_process_is_one_error_and_leaves_nothing_behind(victim):
    with Driver(emulated_setup(config_of(restart=False))) as driver:
        pids = processes_of(driver)
        pid = driver.stages[1].pid if victim == "stage" else driver.fleet.keepers[1].pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StageError, match="stage 1") as caught:
            run_items(driver, ITEMS, "", map(RequestId, count()))
        assert "\n" not in str(caught.value)
        wait_until_gone(pids)


def test_what_can_be_planned_is_planned_before_outputs_are_handed_on():
    """Stages do not wait for what the caller does with them."""
    with Driver(emulated_setup(config_of(2, policy="sarathi_serve"))) as driver:
        for number in range(4):
            params = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
            driver.submit([Request(id=RequestId(number), prompt=(1,) * 20, params=params)])
        while driver.engine.num_unfinished:
            driver.outputs(0.1)
            assert isinstance(driver.engine.plan(time.monotonic()), Wait)


def test_what_an_abort_frees_is_given_to_who_waits_for_it():
    """At the next look, not when something else completes."""
    params = SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    config = config_of(2, policy="sarathi_serve", num_gpu_blocks_override=8)
    with Driver(emulated_setup(config)) as driver:
        driver.submit([Request(id=RequestId(0), prompt=(1,) * 60, params=params)])
        while not driver.outputs(0.1):
            pass
        driver.submit([Request(id=RequestId(1), prompt=(1,) * 100, params=params)])
        driver.outputs(0.0)
        assert (driver.engine.num_running, driver.engine.num_waiting) == (1, 1)
        driver.abort(RequestId(0), "abort")
        driver.outputs(0.0)
        assert (driver.engine.num_running, driver.engine.num_waiting) == (1, 0)


def test_ctrl_c_in_a_terminal_is_the_driver_s_to_handle():
    """Under a launcher of the user's it reaches the stages too."""
    with Driver(emulated_setup(config_of(2))) as driver:
        for stage in driver.stages:
            os.kill(stage.pid, signal.SIGINT)
        served = run_items(driver, ITEMS[:1], "", map(RequestId, count()))
    assert len(served[0].token_times_s) == ITEMS[0].max_tokens


@pytest.mark.parametrize(
    ("work", "error", "reason"),
    [
        ({"tensor_parallel_size": 64}, ConfigError, r"stage \d: .*64"),
        ({"plan": None}, StageError, r"stage \d: ValidationError: .*PIPESERVE_TRACEBACK=1"),
    ],
)
def test_a_stage_that_cannot_start_says_why(work, error, reason):
    """And whether what it was given is at fault."""
    setup = emulated_setup(config_of(2))
    given = {**msgspec.msgpack.decode(setup.works[0]), **work}
    with pytest.raises(error, match=reason):
        Driver(replace(setup, works=(msgspec.msgpack.encode(given),) * 2))


BROKEN_STAGE = """
from pipeserve.launch.emulated.stage import EmulatedCompute
from pipeserve.stage.serve import serve

class Broken(EmulatedCompute):
    def end(self, computing, feed_back):
        if self._stage == 1 and computing.index == 2:
            raise RuntimeError("the device is gone")
        return super().end(computing, feed_back)

serve(Broken.load)
"""


def test_a_stage_that_cannot_take_an_end_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_stage.py").write_text(BROKEN_STAGE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with (
        Driver(replace(emulated_setup(config_of(restart=False)), module="broken_stage")) as driver,
        pytest.raises(StageError, match=r"^stage 1\b.*RuntimeError: the device is gone"),
    ):
        run_items(driver, ITEMS, "", map(RequestId, count()))


def test_nothing_is_left_of_a_closed_one():
    with Driver(emulated_setup(config_of(8))) as driver:
        pids = processes_of(driver)
        assert len({*pids}) == 16 and all(map(is_running, pids))
    wait_until_gone(pids)


def test_a_closed_driver_leaves_no_file_open():
    def closed():
        with Driver(emulated_setup(config_of(2))) as driver:
            run_items(driver, ITEMS, "", map(RequestId, count()))

    closed()  # what is opened once
    before = len(os.listdir("/proc/self/fd"))
    closed()
    assert len(os.listdir("/proc/self/fd")) == before


def start_stage(address):
    """A stage as its keeper would start it, whose driver is at `address`."""
    setup = emulated_setup(config_of(1))
    job = StartStage(0, 1, setup.module, setup.works[0], address, "127.0.0.1", traceback=False)
    spans = LastSpans.make()
    launch = Launch(job, 0, 1, b"secret", spans.descriptor)
    stage = subprocess.Popen(
        [sys.executable, "-m", setup.module],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[spans.descriptor],
    )
    spans.close()
    stage.stdin.write(encode_job(launch))
    stage.stdin.close()
    stage.stdin = None
    return stage


def test_a_stage_without_a_driver_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
    stage = start_stage(address)
    _, stderr = stage.communicate(timeout=30)
    assert stage.returncode == 1
    assert stderr.decode().startswith(f"error: stage 0: the driver at {address} cannot be reached")
    assert stderr.count(b"\n") == 1


@pytest.mark.parametrize("is_told", [False, True])
def test_a_stage_ends_with_its_driver(is_told):
    """Before it is told how much memory to take, and after."""
    sources = Sources(b"secret")
    stage = start_stage(Listener("127.0.0.1", sources, ("stage",)).address)
    said = []
    while len(said) < 2 + is_told:
        for source in sources.ready(30_000):
            said += source.receive()
            if is_told and len(said) == 2:
                source.send(encode(TakeMemory(1), 1))
    assert decode_stage_hello(said[0]) == (1, StageHello(0))
    told = [type(decode_from_stage(each)[1]) for each in said[1:]]
    assert told == [StageSized, StageReady][: 1 + is_told]
    assert stage.poll() is None
    sources.close()
    _, stderr = stage.communicate(timeout=30)
    assert (stage.returncode, stderr) == (1, b"")


@pytest.fixture(scope="module")
def shared():
    """Falcon-180B on two stages of four ranks, what its processes were, and by what name they knew
    their driver."""
    flags = {"device": "emulated", "max_num_batched_tokens": 64, "pipeline_window": 2}
    config = make_config(load_recipe("falcon-180b-2x4xa100"), flags)
    ring = Ring()
    with Driver(emulated_setup(config), record=ring.record) as driver:
        run_items(driver, ITEMS[:3], "", map(RequestId, count()))
        driver.settle()
        recording = recording_of(ring, len(driver.stages), meta_of_driver(driver))
        num_ranks, name = driver.topology.num_ranks, driver.fleet.local_name
        return config, recording, num_ranks, list(plan_lines(driver)), name


def test_ranks_of_a_stage_take_the_time_of_their_group(shared):
    """Each is a process; the first one alone tells of it, once for all."""
    config, recording, num_ranks, *_ = shared
    assert (recording.num_stages, num_ranks) == (2, 8)
    times = simulated_run(config).times
    for stage, spans in enumerate(recording.spans):
        for plan, span in zip(recording.planned, spans, strict=True):
            assert span.cpu_s == times.compute_s(plan)[stage]
            assert span.all_reduce_s == times.all_reduce_s(plan)[stage] > 0
            together_s = span.start_s + span.rank_wait_s
            assert span.end_s == pytest.approx(together_s + span.cpu_s, abs=1e-9)


def test_the_schedule_of_tensor_parallel_stages_is_the_simulator_s(shared):
    """All requests are there at once, and the window is fixed."""
    config, emulated, *_ = shared
    ring, setup = Ring(), simulated_run(config)
    lengths = [(len(item.prompt), item.max_tokens) for item in ITEMS[:3]]
    arrivals = arrivals_in_order([0.0] * len(lengths), lengths)
    Simulation(setup.make_pipeline(ring.record), arrivals).run_until()
    simulated = recording_of(ring, 2, setup.meta())
    assert [p.chunks for p in emulated.planned] == [p.chunks for p in simulated.planned]
    assert emulated.meta["plan"] == simulated.meta["plan"]
    assert [stage["ranks"] for stage in emulated.meta["plan"]["stages"]] == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]
    summed = [[span.all_reduce_s for span in spans] for spans in emulated.spans]
    assert summed == [[span.all_reduce_s for span in spans] for spans in simulated.spans]


def stage_process(keeper_pid):
    """That a keeper has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == keeper_pid:
                return int(folder.name)
    raise AssertionError("it has none")


def test_a_rank_that_is_killed_is_started_again_with_its_stage():
    """Who waited for it waits no more, on its stage and on the other one."""
    ring = Ring()
    setup = emulated_setup(config_of(2, tensor_parallel_size=2))
    with Driver(setup, record=ring.record) as driver:
        others = [stage_process(driver.fleet.keepers[rank].pid) for rank in (0, 1)]
        victim = stage_process(driver.fleet.keepers[3].pid)
        timer = Timer(0.5, os.kill, (victim, signal.SIGKILL))
        timer.start()
        items = [WorkItem(prompt=(7,) * 200, max_tokens=100)] * 4
        served = run_items(driver, items, "", map(RequestId, count()))
        timer.join()
        assert [stage_process(driver.fleet.keepers[rank].pid) for rank in (0, 1)] == others
    assert [len(one.token_times_s) for one in served] == [100] * 4
    (fault, *_) = recording_of(ring, 2, {}).faults
    assert fault.stage == 1 and fault.reason.startswith("rank 3 of stage 1 (pid")


def test_the_plan_names_the_ranks_of_a_stage(shared):
    assert [line.partition(" on ")[0].strip() for line in shared[3][1:]] == [
        "stage 0: ranks 0, 1, 2, 3",
        "stage 1: ranks 4, 5, 6, 7",
    ]


def test_what_the_ranks_share_leaves_no_file(shared):
    """However they end: it is gone before the first of them loads (vllm-project/vllm#51317)."""
    *_, name = shared  # other drivers may be starting on this machine
    assert not list(Path("/dev/shm").glob(f"pipeserve-{name}-*"))


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "work.jsonl"
    lines = [{"prompt_token_ids": [5] * 30, "max_tokens": 4, "arrival_s": 0.01 * k} for k in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_bench_runs_records_and_reports(tmp_path, capsys, workload):
    folder, result = tmp_path / "run", tmp_path / "result.json"
    command = ["bench", *RUN, "--workload", workload, "--record", str(folder)]
    command += ["--max-model-len", "8192"]
    assert cli.main([*command, "--json", str(result)]) == 0
    said = capsys.readouterr()
    assert "llama2-7b emulated on a100-80gb-dgx: 3 stages of" in said.err
    assert "memory in MiB" not in said.out
    assert "note: llama2-7b was trained to 4,096 positions" in said.out
    report = json.loads(result.read_text())
    assert report["kind"] == "emulated"
    assert (report["requests"], report["output_tokens"]) == (2, 8)
    assert json.loads((folder / "run.json").read_text())["kind"] == "emulated"
    assert read_recording(folder).planned[0].index == 0, "a warm-up was run"
    assert cli.main(["report", str(folder), "--json", str(result)]) == 0
    assert len(json.loads(result.read_text())["stages"]) == 3


def test_a_recipe_without_a_profile(capsys, workload):
    command = ["bench", "llama2-7b", "--device", "emulated", "--workload", workload]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no device profile: give --device-profile")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", *RUN, "--prompt", "x"], "no tokens to give; use pipeserve bench"),
        (["bench", *RUN, "--workload", "TEXT"], "there is no tokenizer; give prompt_token_ids"),
        (["bench", *RUN, "--num-prompts", "3"], "the context holds 1024; use --scale"),
        (["bench", *RUN, "--tensor-parallel-size", "5"], "give one of 1, 2, 4, 8, 16, 32"),
    ],
)
def test_what_cannot_be_emulated_is_one_line(capsys, tmp_path, arguments, message):
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "x", "max_tokens": 2}\n')
    assert cli.main([str(text) if word == "TEXT" else word for word in arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_there_is_no_text_to_give():
    with pytest.raises(ConfigError, match="device is emulated"):
        LLM("llama2-7b", device="emulated")


def test_stages_of_two_machines_have_no_clock_in_common():
    keepers = {rank: SimpleNamespace(boot_id=boot, host=boot) for rank, boot in enumerate("ab")}
    driver = SimpleNamespace(fleet=SimpleNamespace(keepers=keepers), close=lambda: None)
    with pytest.raises(ConfigError, match="on one machine"):
        check_one_clock(driver)
    keepers[1] = keepers[0]
    check_one_clock(driver)


def test_a_command_with_stages_on_two_machines_leaves_nothing_behind(monkeypatch, capsys, workload):
    hellos, welcome = [], Fleet._welcome

    def from_two_machines(fleet, hello, *how):
        hellos.append(msgspec.structs.replace(hello, boot_id=f"machine {hello.rank % 2}"))
        welcome(fleet, hellos[-1], *how)

    monkeypatch.setattr(Fleet, "_welcome", from_two_machines)
    monkeypatch.setattr(waiting, "check_addresses", lambda *where: None)  # they are on one
    assert cli.main(["bench", *RUN, "--workload", workload]) == 2
    assert "start all of them on one machine" in capsys.readouterr().err.splitlines()[-1]
    assert len(hellos) == 3
    wait_until_gone([hello.pid for hello in hellos])


@pytest.mark.parametrize(
    ("before", "after"),
    [(signal.SIG_DFL, starting._exit_on_signal), (signal.SIG_IGN, signal.SIG_IGN)],
)
def test_a_command_under_nohup_outlives_its_terminal(before, after):
    found = {ending: signal.getsignal(ending) for ending in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, before)
        starting.exit_on_signals()
        assert signal.getsignal(signal.SIGHUP) == after
    finally:
        for ending, handler in found.items():
            signal.signal(ending, handler)


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
import pipeserve.driver.driver
import pipeserve.launch.run.emulated
sys.modules["numpy"] = None
for name in [name for name in sys.modules if name.startswith("pipeserve")]:
    del sys.modules[name]
import pipeserve.launch.emulated.stage
"""


def test_neither_driver_nor_stages_need_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
