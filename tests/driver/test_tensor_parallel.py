"""Stages that several ranks share: tokens and draws are those of transformers, and of one rank.

Importing megatron-core takes seconds of CPU in each process, so here ranks are forks of one that
has it (forked_fleet.py). `bench/tensor_parallel.py` takes every family through the whole matrix by
this file; the loss of a rank is in test_shared_stage_lost.py.
"""

import os
import signal
import socket
import statistics
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeserve import LLM, SamplingParams
from pipeserve.configs import make_config
from pipeserve.core.records import Span, ignore
from pipeserve.core.topology import Topology, ranks_of
from pipeserve.core.work import Work
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError
from pipeserve.profiling.recording.recording import Ring
from pipeserve.stages.tensor_parallel.shard import Shard

from checkpoints import (  # isort: skip
    TINY, greedy_tokens, random_prompts, tiny, transformers_model,
)  # fmt: skip
from forked_fleet import ForkedFleet  # isort: skip
from local_fleet import local_llm  # isort: skip

MAX_TOKENS = 8
LATE_S = 0.05
LONG_S = 30
SMALL_GAP = 1e-4
"""Between two logits: sums that come in another order may swap them."""
FAMILIES = list({kind.family: name for name, kind in reversed(TINY.items())}.values())
"""One model of each."""
ALL = bool(os.environ.get("PIPESERVE_TENSOR_PARALLEL_ALL"))
SIZES = (
    [(tp, pp) for tp in (1, 2, 3, 4) for pp in (1, 2, 3)]
    if ALL
    else [(2, 1), (2, 2), (3, 1), (4, 1)]
)
RUNS = (
    [(name, *sizes) for name in TINY for sizes in SIZES]
    if ALL
    else [(name, *sizes) for place, name in enumerate(FAMILIES) for sizes in SIZES[place % 2 :: 2]]
)
"""Of the tests, each family at two of the four sizes."""
KV_HEADS = (1, 2, 4, 6)
LIMITS = {"max_num_batched_tokens": 13, "block_size": 4, "num_gpu_blocks_override": 64}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.processes]


def shared(name, folder):
    """A tiny model of 12 heads over 1, 2, 4 or 6, an MLP of 96 or 80, and an odd vocabulary."""
    place = list(TINY).index(name)
    options, width, num_kv = TINY[name].options, (96, 80)[place % 2], KV_HEADS[place % 4]
    changed = {"hidden_size": 96, "num_attention_heads": 12, "vocab_size": 255 + 2 * place}
    for key, value in {
        "num_key_value_heads": num_kv,
        "num_kv_heads": num_kv,
        "intermediate_size": width,
        "moe_intermediate_size": width // 4,
        "ffn_dim": width,
    }.items():
        if key in options:
            changed[key] = value
    if name.startswith("falcon"):
        changed["ffn_hidden_size"] = width
    return tiny(name, folder, **changed)


def params():
    """Greedy, twice with rules that need every logit; draws from all, from few, and from a nucleus;
    log-probabilities."""
    more = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    return [
        *[SamplingParams(temperature=0, **more)] * 3,
        SamplingParams(temperature=0, presence_penalty=0.5, logit_bias={7: 2.0}, **more),
        SamplingParams(temperature=1.0, seed=1, **more),
        SamplingParams(temperature=0.9, seed=2, top_k=5, **more),
        SamplingParams(temperature=0.9, seed=3, top_k=300, top_p=0.8, **more),
        SamplingParams(temperature=0.7, seed=4, top_p=0.7, min_p=0.01, logprobs=2, **more),
        SamplingParams(temperature=0, prompt_logprobs=1, **more),
    ]


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    """In this process, before it forks."""
    import pipeserve.stages.tensor_parallel.layers  # noqa: F401


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """name -> (folder, prompts, transformers' greedy answers, what one rank answers)."""
    made = {}

    def make(name):
        if name not in made:
            folder = shared(name, tmp_path_factory.mktemp(name))
            prompts = random_prompts(folder, (30, 3, 17, 5, 6, 7, 8, 9, 10))
            greedy = greedy_tokens(folder, prompts[:3], MAX_TOKENS)
            with local_llm(folder, (TINY_LAYERS,), **LIMITS) as llm:
                made[name] = folder, prompts, greedy, llm.generate(prompts, params())
        return made[name]

    return make


TINY_LAYERS = 4


def run(folder, tp, pp, prompts, params, fleet=ForkedFleet, record=ignore, **more):
    config = {
        "model": folder,
        "dtype": "float32",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "heartbeat_interval": 60.0,  # a keeper answers no heartbeat while its stage computes
        "restart": False,
        **LIMITS,
        **more,
    }
    setup = checkpoint_setup(make_config({}, config))
    with LLM.on(Driver(setup, record=record, fleet=fleet)) as llm:
        return llm.generate(prompts, params)


@pytest.mark.parametrize(("name", "tp", "pp"), RUNS)
def test_every_family_has_the_tokens_of_transformers_and_of_one_rank(model, name, tp, pp):
    folder, prompts, greedy, single = model(name)
    got = run(folder, tp, pp, prompts, params())
    close = []
    for number, (one, other) in enumerate(zip(got, single, strict=True)):
        expected = greedy[number] if number < 3 else list(other.token_ids)
        if list(one.token_ids) != expected:
            close.append(gap_at_first_difference(folder, prompts[number], one, expected))
        elif one.logprobs:
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert mine.sampled == pytest.approx(theirs.sampled, abs=1e-4)
    if close:
        print(f"{name} tp {tp} pp {pp}: {len(close)} texts part at gaps of {close}")
    assert all(gap < SMALL_GAP for gap in close), close


@torch.inference_mode()
def gap_at_first_difference(folder, prompt, completion, expected):
    """Between transformers' logits of the two tokens."""
    got = list(completion.token_ids)
    at = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    logits_V = transformers_model(folder)(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    return float((logits_V[got[at]] - logits_V[expected[at]]).abs())


def test_the_likeliest_token_and_the_highest_few_need_no_gathered_logits(model, monkeypatch):
    """And the other ranks draw nothing (gpt-oss#270: each drew its own)."""
    from pipeserve.stages.tensor_parallel.head import VocabParallelHead

    def gathers(self, x_RD):
        raise AssertionError("all logits are gathered")

    folder, prompts, _, single = model("llama")
    monkeypatch.setattr(VocabParallelHead, "forward", gathers)
    few = [0, 1, 2, 5, 6]
    got = run(folder, 3, 1, [prompts[i] for i in few], [params()[i] for i in few])
    assert [one.token_ids for one in got] == [single[i].token_ids for i in few]


def test_many_activations_go_to_another_machine_once(model, monkeypatch):
    """And not once for each rank: each sends a third of them, filled up by at most two numbers. A
    few go whole."""
    from pipeserve.stages.tensor_parallel import parts

    monkeypatch.setattr(parts, "WORTH_BYTES", 10 * 96 * 4)

    class Apart(ForkedFleet):
        def machine_of(self, rank):
            return f"machine {rank // 3}"

    folder, prompts, _, single = model("llama")
    told = []
    got = run(folder, 3, 2, prompts, params(), Apart, told.append)
    assert [one.token_ids for one in got] == [one.token_ids for one in single]
    spans = [span for span in told if isinstance(span, Span) and span.stage == 0]
    assert {span.num_tokens >= 10 for span in spans} == {True, False}
    for span in spans:
        num = span.num_tokens * 96
        num = -(-num // 3) if span.num_tokens >= 10 else num
        assert span.num_bytes == num * 4 + 8  # and its index


def in_forks(number_of, work, ends_after=None):
    """What `work(number)` gives in so many processes at once; each gives a short text. With that of
    number `ends_after`, all are ended."""
    read, pids = [], []
    for number in range(number_of):
        mine, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(theirs, work(number).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        read.append(mine)
        pids.append(pid)
    if ends_after is not None:
        early = os.read(read[ends_after], 1000).decode()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    said = [os.read(each, 1000).decode() for each in read]
    if ends_after is not None:
        said[ends_after] = early
    for each, pid in zip(read, pids, strict=True):
        os.close(each)
        os.waitpid(pid, 0)
    return said


def test_one_that_parts_frees_those_who_wait_and_they_meet_again():
    """A process inside gloo's wait is freed by nothing but the end of a connection of its peer's;
    elsewhere such a rank waits for minutes (vllm#6370, gpt-fast#55)."""
    import torch.distributed as dist

    from pipeserve.stages.tensor_parallel import group

    cpu, of = torch.device("cpu"), 3
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [each.getsockname()[1] for each in listeners]

    def work(number):
        told = []
        for listener, port in zip(listeners, ports, strict=True):
            own = listener if number == 0 else None
            met = group.meet(Shard(number, of), "127.0.0.1", port, cpu, own, {})
            numbers = torch.full((1000,), float(number))
            dist.all_reduce(numbers, group=met)
            told.append(str(int(numbers[0])))
            if number != 1:
                try:
                    dist.all_reduce(numbers, group=met)
                except RuntimeError as error:
                    told.append("freed" if group.is_of_peers(error) else str(error))
            else:
                time.sleep(0.2)  # until they wait
            met = None
            group.part()
        return " ".join(told)

    assert in_forks(of, work) == ["3 freed 3 freed", "3 3", "3 freed 3 freed"]


def test_one_that_is_left_alone_when_they_meet_does_not_wait_for_long(monkeypatch):
    """Another has failed, and lives: gloo would wait for half an hour (marin#8534: one that did not
    come held up the others for hours)."""
    from pipeserve.stages.tensor_parallel import group

    monkeypatch.setattr(group, "_TIMEOUT", timedelta(seconds=0.5))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def work(number):
        signal.alarm(LONG_S)
        try:
            group.meet(Shard(0, 2), "127.0.0.1", port, torch.device("cpu"), listener, {})
        except RuntimeError:
            return "alone"
        return ""

    assert in_forks(1, work) == ["alone"]


def test_ranks_that_compute_in_other_ways_do_not_come_together():
    from pipeserve.stages.tensor_parallel import group

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def work(number):
        own, ways = (None, listener)[number == 0], {"computes by": ("this", "that")[number]}
        try:
            group.meet(Shard(number, 2), "127.0.0.1", port, torch.device("cpu"), own, ways)
        except ConfigError as error:
            return str(error)
        return ""

    _, said = in_forks(2, work, ends_after=1)
    assert said.startswith("it computes by that, and the first rank of its stage computes by this;")
    assert "\n" not in said


def test_ranks_are_megatrons():
    from megatron.core.parallel_state import RankGenerator

    for tp, pp in ((1, 3), (2, 1), (2, 2), (4, 2), (3, 5)):
        theirs = RankGenerator(tp=tp, ep=1, dp=1, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        topology = Topology(tuple(ranks_of(stage, tp) for stage in range(pp)))
        assert [list(ranks) for ranks in topology.ranks] == theirs.get_ranks("tp")
        for first in range(tp):
            way, rank = [], first
            while rank is not None:
                way.append(rank)
                rank = topology.next_of(rank)
            assert way == theirs.get_ranks("pp")[first]


def test_the_vocabulary_is_cut_as_megatrons():
    from megatron.core.tensor_parallel.utils import VocabUtility

    for of in (2, 3, 4):
        for number in range(of):
            shard = Shard(number, of)
            theirs = VocabUtility.vocab_range_from_global_vocab_size(shard.padded(257), number, of)
            own = shard.part_of_vocabulary(257)
            assert (own.start, own.stop) == (theirs[0], min(theirs[1], 257))


@pytest.mark.parametrize("tp", [5, 8])
def test_heads_have_to_come_out_even(model, tp):
    folder, *_ = model("llama")
    config = make_config({}, {"model": folder, "tensor_parallel_size": tp})
    with pytest.raises(ConfigError, match=r"12 attention heads.*give one of 1, 2, 3, 4, 6, 12$"):
        checkpoint_setup(config)


def test_a_stage_that_is_asked_what_it_takes_counts_its_sums(model):
    """As `pipeserve doctor` asks it; all of its ranks make them together, and say the same of them.
    A layer has two, the embedding one."""
    folder, *_ = model("llama")
    config = {"model": folder, "tensor_parallel_size": 3, "heartbeat_interval": 60.0, **LIMITS}
    setup = checkpoint_setup(make_config({}, config))
    works = (Work(4, 4, (), 4, 40), Work(12, 1, ((0, 12),), 0, 0))
    with Driver(setup, fleet=ForkedFleet) as driver:
        examined = driver.examine(works, 0.01)
    for number in range(len(works)):
        parts = [each.parts[number] for each in examined]
        assert len({each.all_reduce for each in parts}) == 1
        for each in parts:
            assert 0 < each.all_reduce < min(each.layers)
            assert each.embedding > each.all_reduce / 2 > 0


def test_what_the_sums_take_and_what_waits_for_a_rank_are_told(model, monkeypatch):
    """The second rank of each stage is late with its part of each sum; the first tells of it."""
    from pipeserve.stages.tensor_parallel.sums import Sums

    folder, prompts, _, _ = model("llama")
    began = Sums.begin

    def begin(self):
        time.sleep(LATE_S * dist.get_rank())
        began(self)

    monkeypatch.setattr(Sums, "begin", begin)
    ring = Ring()
    run(folder, 2, 2, prompts[:1], params()[:1], record=ring.record)
    spans = [span for span in ring if isinstance(span, Span)]
    late_s = 2 * TINY_LAYERS // 2 * LATE_S
    assert {span.stage for span in spans} == {0, 1}
    assert statistics.median([span.rank_wait_s for span in spans]) > late_s / 2
    assert statistics.median([span.all_reduce_s for span in spans]) < late_s / 2
    for span in spans:
        assert span.all_reduce_s > 0
        assert span.all_reduce_s + span.rank_wait_s < span.head_s - span.start_s
