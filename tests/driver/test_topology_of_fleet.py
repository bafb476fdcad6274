"""Two ranks a stage: who joins, what each is told, and who speaks for its stage. Each rank computes
its whole stage here; how they share it, test_tensor_parallel.py has."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import pytest
import torch

from pipeserve import LLM, SamplingParams
from pipeserve.configs import RunConfig, make_config
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.records import Ping, Span
from pipeserve.core.topology import Topology
from pipeserve.driver import stillness, watching
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.events import Gone, Joined, Lost, Ready, Received, Sized
from pipeserve.driver.fleet import Fleet
from pipeserve.driver.members import Members
from pipeserve.driver.starting import StartProgress, jobs_of
from pipeserve.driver.waiting import wait_for_keepers
from pipeserve.stage.vital_signs import VitalSigns
from pipeserve.wire import control
from pipeserve.wire.connecting import connect
from pipeserve.wire.sources import Sources

from checkpoints import random_prompts, tiny_llama  # isort: skip
from local_fleet import LocalFleet, NoKeepers  # isort: skip

_DECODE = {"keeper": control.decode_for_keeper, "stage": control.decode_for_stage}
TWO_A_STAGE = Topology(((0, 1), (2, 3)))
WORKS = (b"first", b"last")


class ByHand:
    """Keepers and stages that are here, and say what the test has them say."""

    def __init__(self):
        config = RunConfig(model="any", heartbeat_interval=60.0)  # no keeper here answers any
        self.fleet = Fleet(TWO_A_STAGE, config, NoKeepers())
        self.sources = Sources(self.fleet.secret)
        self.who = {}
        self.inbox = {}

    def joins(self, rank, world_size=4, address="10.0.0.1"):
        hello = control.KeeperHello(rank, world_size, f"host{rank}", address, 0, "")
        self._comes("keeper", rank).send(control.encode(hello, 0))

    def comes(self, rank, epoch=1):
        """Its stage, which says what it will take."""
        stage = self._comes("stage", rank)
        stage.send(control.encode(control.StageHello(rank), epoch))
        self.says(rank, control.StageSized(10 + rank, 1, ()), epoch)

    def says(self, rank, message, epoch=1):
        self.who["stage", rank].send(control.encode(message, epoch))

    def keeper_says(self, rank, message):
        self.who["keeper", rank].send(control.encode(message, 1))

    def hear(self, *kinds):
        """What the fleet tells next: one of each kind."""
        events = []
        while len(events) < len(kinds):
            events += [e for e in self.goes_on() if isinstance(e.message, kinds)]
        return events

    def goes_on(self):
        """What the fleet tells; what it says is kept in `inbox`."""
        for source in self.sources.ready(0):
            messages = map(_DECODE[source.carries], source.receive())
            said = self.inbox.setdefault(source, [])
            said += [each for each in messages if not isinstance(each[1], control.Heartbeat)]
        return self.fleet.receive(0.01)

    def next_of(self, purpose, rank):
        """The next message to one of them."""
        while not (inbox := self.inbox.get(self.who[purpose, rank])):
            self.goes_on()
        return inbox.pop(0)

    def _comes(self, purpose, rank):
        address = f"{self.fleet.address}/{self.fleet.local_name}"
        self.who[purpose, rank] = connect(address, self.sources, purpose)
        return self.who[purpose, rank]

    def listens(self):
        for source in self.sources.ready(0):
            source.receive()

    def hears(self, purpose):
        """The next message to each rank; what the fleet makes of all that is said."""
        decode = _DECODE[purpose]
        heard, events = {}, []
        while len(heard) < 4:
            events += self.fleet.receive(0.01)
            self.sources.ready(0)
            for rank in range(4):
                for payload in self.who[purpose, rank].receive():
                    epoch, message = decode(payload)
                    if not isinstance(message, control.Heartbeat):
                        heard[rank] = epoch, message
        return [heard[rank] for rank in range(4)], events

    def close(self):
        self.sources.close()
        self.fleet.close()


@pytest.fixture
def hand():
    hand = ByHand()
    yield hand
    hand.close()


def joined(hand):
    for rank in (3, 0, 2, 1):
        hand.joins(rank)
    events = []
    while len(events) < 4:
        for source in hand.sources.ready(0):
            source.receive()
        events += hand.fleet.receive(0.01)
    return events


def started(hand):
    joined(hand)
    setup = SimpleNamespace(module="any", works=WORKS, plan=split_layers(6, 3))
    hand.fleet.start(jobs_of(setup, TWO_A_STAGE, "here"))
    return hand.hears("keeper")[0]


def test_every_rank_joins(hand):
    events = joined(hand)
    assert all(isinstance(event.message, Joined) for event in events)
    assert sorted(event.rank for event in events) == [0, 1, 2, 3] == sorted(hand.fleet.keepers)
    wait_for_keepers(hand.fleet, print)


def test_a_keeper_of_another_run_is_told_of_stages_and_ranks(hand):
    hand.joins(0, world_size=2)
    keeper = hand.who["keeper", 0]
    while not (payloads := keeper.receive()):
        hand.fleet.receive(0.01)
    _, message = control.decode_for_keeper(payloads[0])
    assert "is one of 2, and the pipeline has 2 stages of 2 ranks each" in message.why


def lost_rank_1(hand):
    """All stages have come, and the process of one has ended."""
    started(hand)
    for rank in range(4):
        hand.comes(rank)
    hand.hear(Sized)
    hand.keeper_says(1, control.StageExited(7, -9))
    (event,) = hand.hear(Lost)
    assert event.rank == 1 and "SIGKILL" in event.message.why
    setup = SimpleNamespace(module="any", works=WORKS, plan=split_layers(6, 3))
    hand.fleet.start(jobs_of(setup, TWO_A_STAGE, "here"))


def test_the_keepers_of_the_lost_stage_alone_start_it_and_the_others_begin_an_epoch(hand):
    lost_rank_1(hand)
    for rank in (2, 3):
        assert hand.next_of("stage", rank) == (2, control.Renew(WORKS[1]))
    for rank in (0, 1):  # who shares the stage may wait for the lost one in a way that nothing ends
        epoch, job = hand.next_of("keeper", rank)
        assert (epoch, job.stage, job.work, job.shard) == (2, 0, b"first", rank)
    assert not any(hand.inbox.get(hand.who["keeper", rank]) for rank in (2, 3))
    hand.keeper_says(1, control.StageExited(7, -9))  # of the old stage: nobody's business
    for rank in (0, 1):
        hand.comes(rank, epoch=2)
    for rank in (2, 3):
        hand.says(rank, control.StageSized(10 + rank, 1, ()), epoch=2)
    (event,) = hand.hear(Sized)
    assert [size.weight_bytes for size in event.message.stages] == [10, 11, 12, 13]


@pytest.mark.parametrize("had_loaded", [False, True])
def test_one_that_had_loaded_and_stands_still_in_the_fresh_epoch_is_lost(
    hand, monkeypatch, had_loaded
):
    """While another may wait for its disk."""
    monkeypatch.setattr(stillness, "LONGEST_S", 0.05)
    monkeypatch.setattr(watching, "LAST_WORD_S", 0.1)
    started(hand)
    for rank in range(4):
        hand.comes(rank)
    hand.hear(Sized)
    if had_loaded:
        hand.says(2, control.StageReady(100, "", "", "", 0, 0, 0, [], 1))
    hand.says(2, control.Memory(7))
    hand.hear(control.Memory)
    hand.keeper_says(1, control.StageExited(7, -9))
    hand.hear(Lost)
    setup = SimpleNamespace(module="any", works=WORKS, plan=split_layers(6, 3))
    hand.fleet.start(jobs_of(setup, TWO_A_STAGE, "here"))
    assert hand.next_of("stage", 2) == (2, control.Renew(WORKS[1]))
    found = []
    for _ in range(10):
        hand.keeper_says(2, control.HeartbeatAnswer(0.0, 0.0, *VitalSigns(state="S")))
        time.sleep(0.02)
        found += [each.rank for each in hand.goes_on() if isinstance(each.message, Lost)]
    assert found == [2] * had_loaded


def test_one_that_starts_while_another_is_lost_is_let_be(hand):
    lost_rank_1(hand)
    hand.next_of("keeper", 1)
    hand.keeper_says(2, control.StageExited(8, -9))
    hand.hear(Lost)
    setup = SimpleNamespace(module="any", works=WORKS, plan=split_layers(6, 3))
    hand.fleet.start(jobs_of(setup, TWO_A_STAGE, "here"))
    assert hand.next_of("keeper", 2)[0] == hand.next_of("keeper", 3)[0] == 3
    hand.comes(1, epoch=2)
    assert hand.next_of("stage", 1) == (3, control.Renew(WORKS[0]))
    assert not hand.inbox[hand.who["keeper", 1]]


def test_a_keeper_that_was_gone_comes_back_from_another_address(hand, monkeypatch):
    """torch#147064: one that comes back ends the job of the others."""
    monkeypatch.setattr(watching, "LAST_WORD_S", 0.1)
    started(hand)
    hand.who["keeper", 3].close()
    lost, gone = hand.hear(Lost, Gone)
    assert lost.rank == gone.rank == 3
    setup = SimpleNamespace(module="any", works=WORKS, plan=split_layers(6, 3))
    hand.fleet.start(jobs_of(setup, TWO_A_STAGE, "here"))
    hand.joins(3, address="10.9.9.9")
    (joined,) = hand.hear(Joined)
    assert joined.rank == 3 and hand.fleet.keepers[3].address == "10.9.9.9"
    epoch, job = hand.next_of("keeper", 3)
    assert (epoch, job.stage, job.work) == (2, 1, b"last")


def test_a_keeper_takes_the_place_of_one_that_has_just_hung_up(hand):
    """Before the driver has made up its mind about that one."""
    started(hand)
    hand.who["keeper", 3].close()
    for _ in range(3):
        hand.fleet.receive(0.01)
    hand.joins(3, address="10.9.9.9")
    lost, gone, joined = hand.hear(Lost, Gone, Joined)
    assert {lost.rank, gone.rank, joined.rank} == {3}
    assert hand.fleet.keepers[3].address == "10.9.9.9"


class Quiet:
    """A keeper's connection, on which nothing is said."""

    def can_wait(self):
        pass

    def close(self):
        pass


def test_ranks_share_the_cores_that_they_may_all_use():
    """And each has its own, where its launcher has bound it, as mpirun and srun do by themselves:
    a share of those was 1 in 4 (open-mpi#12900, optuna#155, covidestim#3, chapel#13719)."""
    members = Members(TWO_A_STAGE)

    def joins(rank, cpus, boot_id="here"):
        hello = control.KeeperHello(rank, 6, "h", "", 0, boot_id, cpus=tuple(cpus))
        members.keeper_joined(hello, Quiet())

    def shares():
        return [members.core_share(rank) for rank in range(4)]

    for rank in range(4):
        joins(rank, range(8))
    joins(4, range(8), "there")
    assert shares() == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert members.core_share(4) == (0, 1)
    members.keeper_is_gone(2)  # and comes again: the others keep what they have
    assert shares() == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for rank in range(4):
        joins(rank, range(8 * rank, 8 * rank + 8))
    assert shares() == [(0, 1)] * 4
    for rank in range(4):
        joins(rank, range(8) if rank % 2 else range(8, 16))
    assert shares() == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_who_waits_for_an_absent_keeper_is_not_late():
    keepers = {0: control.KeeperHello(0, 2, "here", "", 0, "")}
    config = RunConfig(model="any", load_timeout=60.0, join_timeout=300.0)
    progress = StartProgress(Topology(((0,), (1,))), keepers, config, 100.0)
    progress.sized(0, control.StageSized(1, 1, ()), 101.0)
    assert progress.late(390.0) is None
    rank, lost = progress.late(401.0)
    assert rank == 1 and lost.is_final
    assert lost.why.startswith("no keeper of stage 1 has joined again within 300 s")


def test_every_rank_starts_its_stage(hand):
    jobs = started(hand)
    assert [epoch for epoch, _ in jobs] == [1] * 4
    assert [(job.stage, job.num_stages, job.work) for _, job in jobs] == [
        *[(0, 2, b"first")] * 2,
        *[(1, 2, b"last")] * 2,
    ]
    assert [job.speaks for _, job in jobs] == [True, False, True, False]


def test_links_go_from_shard_to_shard_and_then_it_is_ready(hand):
    started(hand)
    for rank in (2, 0, 1, 3):
        hand.comes(rank)
    while not (came := hand.fleet.receive(0.01)):
        hand.listens()
    assert [size.weight_bytes for size in came[0].message.stages] == [10, 11, 12, 13]
    assert isinstance(came[0].message, Sized)
    hand.fleet.broadcast(control.TakeMemory(7))
    assert hand.hears("stage") == ([(1, control.TakeMemory(7))] * 4, [])
    for rank in (2, 0, 1, 3):
        hand.says(
            rank,
            control.StageReady(100 + rank, "", f"a{rank}", f"t{rank}" * (rank < 2), 0, 0, 0, [], 1),
        )
    links, events = hand.hears("stage")
    assert [message for _, message in links] == [
        control.Connect("a2", ""),
        control.Connect("a3", ""),
        control.Connect("", "t0"),
        control.Connect("", "t1"),
    ]
    for rank in (1, 2, 3):
        hand.says(rank, control.Connected())
    events += hand.fleet.receive(0.05)
    assert not events
    hand.says(0, control.Connected())
    while not (came := hand.fleet.receive(0.01)):
        pass
    assert isinstance(came[0].message, Ready)
    assert [stage.pid for stage in came[0].message.stages] == [100, 101, 102, 103]
    hand.fleet.broadcast(control.ReportMemory())
    assert hand.hears("stage")[0] == [(1, control.ReportMemory())] * 4


def test_one_that_is_lost_is_named_by_its_rank(hand):
    started(hand)
    hand.comes(3)
    hand.says(3, control.StageFailed("no more", False))
    while not (came := hand.fleet.receive(0.01)):
        for source in hand.sources.ready(0):
            source.receive()
    assert came[0].rank == 3
    assert came[0].message == Lost("rank 3 of stage 1: no more")


# ---- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def two_a_stage(folder):
    config = {"model": folder, "dtype": "float32", "pipeline_parallel_size": 2}
    setup = checkpoint_setup(make_config({}, config))
    stages = [
        replace(stage, ranks=ranks)
        for stage, ranks in zip(setup.plan.stages, TWO_A_STAGE.ranks, strict=True)
    ]
    return replace(setup, plan=replace(setup.plan, stages=tuple(stages)), for_ranks=None), setup


class EachComputesAll(LocalFleet):
    """Ranks that share a stage, and need nothing of each other: all of it is theirs."""

    def compute_of(self, job, tell):
        return super().compute_of(msgspec.structs.replace(job, shard=0, num_shards=1), tell)


def run(setup, prompts):
    told = []
    with Driver(setup, record=told.append, fleet=EachComputesAll) as driver, torch.inference_mode():
        llm = LLM.on(driver)
        completions = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
        driver.settle()
        driver.refresh_memory()
        return [each.token_ids for each in completions], told, driver.stages


def test_tokens_and_records_are_those_of_one_rank_a_stage(folder, one_thread):
    prompts = random_prompts(folder, (9, 3, 20))
    double, single = two_a_stage(folder)
    tokens, told, stages = run(double, prompts)
    expected_tokens, _, expected = run(single, prompts)
    assert tokens == expected_tokens
    spans = [entry for entry in told if isinstance(entry, Span)]
    assert len({(span.stage, span.index) for span in spans}) == len(spans)  # one for each stage
    assert {span.stage for span in spans} == {0, 1}
    assert [stage.rank for stage in stages] == [0, 2]
    for stage, one in zip(stages, expected, strict=True):
        assert stage.weight_bytes == 2 * one.weight_bytes
        assert stage.kv_bytes == 2 * one.kv_bytes
        assert stage.peak_bytes > stage.baseline_bytes


def test_the_clock_of_a_stage_is_that_of_the_rank_that_speaks_for_it(folder, one_thread):
    """Pings are recorded by stage."""
    told = []
    setup, _ = two_a_stage(folder)

    class Afar(EachComputesAll):
        boot_ids: ClassVar = {rank: f"machine {rank}" for rank in range(4)}

    with Driver(setup, record=told.append, fleet=Afar) as driver:
        driver.fleet.keep(
            [
                Received(
                    control.HeartbeatAnswer(1.0 + rank, 2.0, *VitalSigns()),
                    rank,
                    3.0,
                    driver.fleet.epoch,
                )
                for rank in range(4)
            ]
        )
        driver.outputs(0.0)
    pings = [ping for ping in told if isinstance(ping, Ping) and ping.remote_s == 2.0]
    assert [(ping.stage, ping.sent_s) for ping in pings] == [(0, 1.0), (1, 3.0)]
