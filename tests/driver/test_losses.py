"""What becomes of a run when stages are lost: with a fleet that starts them again it goes on, with
today's it ends, after the outputs that came before."""

import random
import time

import pytest

from pipeserve.configs import make_config
from pipeserve.core.nouns import Request
from pipeserve.core.records import Ended, Fault
from pipeserve.driver import recovery
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.events import Lost, Received
from pipeserve.driver.fleet import Fleet
from pipeserve.errors import StageError
from pipeserve.machine import MemoryLimit
from pipeserve.sampling_params import SamplingParams
from pipeserve.wire.step_messages import Sampled, Timing

from checkpoints import random_prompts, tiny_llama  # isort: skip
from local_fleet import Dies, LocalFleet  # isort: skip

LENGTHS = (40, 3, 17, 33, 1, 25)
MAX_TOKENS = 10
STAGES = 3
POISON = 255

pytestmark = pytest.mark.usefixtures("one_thread")


class MortalFleet(LocalFleet):
    """Whose stages are lost now and then, once `draw` is set, and started again. What the others
    said behind a loss comes all the same: some with it, and all of it once more, later."""

    draw = None
    num_left = 0
    num_late = 0

    def receive(self, timeout_s, for_result=False):
        late, self._late = getattr(self, "_late", []), []
        self.num_late += sum(isinstance(each.message, Sampled | Timing) for each in late)
        came = super().receive(0.0 if late else timeout_s)
        if self.draw is None or not (self.num_left and came) or self.draw.random() > 0.5:
            return late + came
        self.num_left -= 1
        cut = self.draw.randrange(len(came) + 1)
        for rank in self.draw.sample(range(STAGES), self.draw.choice([1, 2])):
            self.give_up(rank, f"stage {rank} was lost")
        more = Fleet.receive(self, 0.0)
        lost = [each for each in more if isinstance(each.message, Lost)]
        came += [each for each in more if each not in lost]
        self._late = came[cut:]
        return late + came[:cut] + lost + came[cut:]


class PoisonedFleet(LocalFleet):
    """Whose second stage dies of a microbatch with a certain token."""

    def compute_of(self, job, tell):
        compute = super().compute_of(job, tell)
        end = compute.end

        def dies(turn, feed_back):
            if any(POISON in sequence.token_ids for sequence in turn.sequences):
                raise Dies
            return end(turn, feed_back)

        if job.stage == 1:
            compute.end = dies
        return compute


class DoomedFleet(LocalFleet):
    """That loses stages in the same breath in which it hands on a result, and for good."""

    is_doomed = False

    def receive(self, timeout_s, for_result=False):
        came = super().receive(timeout_s)
        if self.is_doomed and any(isinstance(each.message, Sampled) for each in came):
            now = time.monotonic()
            for rank in (1, 2):
                came.append(Received(Lost(f"stage {rank} died"), rank, now, self.epoch))
        return came


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def start(folder, fleet, told, **options):
    wanted = {
        "model": folder,
        "dtype": "float32",
        "pipeline_parallel_size": STAGES,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_gpu_blocks_override": 24,
        "max_num_seqs": 4,
        "max_restarts": 99,
        "head_stages": "both",
        **options,
    }
    return Driver(checkpoint_setup(make_config({}, wanted)), record=told.append, fleet=fleet)


def test_after_a_loss_stages_have_as_many_blocks_as_before(folder, monkeypatch):
    """The engine goes on with its own, whatever is free by then."""
    free = [MemoryLimit("it", "here", 64 << 20, 64 << 20)]
    monkeypatch.setattr("pipeserve.stage.worker.device_memory", lambda device: tuple(free))

    def pools():
        return {worker.compute.kv.keys_LKBPH.shape[2] for worker in driver.fleet.workers}

    with start(folder, MortalFleet, [], num_gpu_blocks_override=None) as driver:
        num_blocks = driver.limits.num_blocks
        assert pools() == {num_blocks}
        free[0] = free[0]._replace(free_bytes=16 << 20)
        driver.fleet.draw, driver.fleet.num_left = random.Random(0), 1
        add_all(driver, folder)
        take_all(driver)
        assert driver.fleet.epoch == 2
        assert driver.limits.num_blocks == num_blocks and pools() == {num_blocks}


def add_all(driver, folder):
    for number, prompt in enumerate(random_prompts(folder, LENGTHS)):
        temperature = 0.0 if number % 2 else 1.0
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=temperature, seed=number, ignore_eos=True
        )
        driver.submit([Request(id=number, prompt=tuple(prompt), params=params)])


def take_all(driver):
    """The tokens of each request, as they come."""
    tokens = {}
    while driver.engine.num_unfinished:
        for output in driver.outputs(1.0):
            tokens.setdefault(output.request_id, []).append(output.token)
    return tokens


@pytest.fixture(scope="module")
def expected(folder):
    with start(folder, LocalFleet, []) as driver:
        add_all(driver, folder)
        return take_all(driver)


@pytest.mark.parametrize("seed", range(8))
def test_every_request_gets_its_tokens_whenever_stages_are_lost(
    folder, expected, seed, monkeypatch
):
    monkeypatch.setattr(recovery, "MOST_KILLS", 99)  # nobody is to blame here
    told = []
    with start(folder, MortalFleet, told) as driver:
        driver.fleet.draw, driver.fleet.num_left = random.Random(seed), 24
        add_all(driver, folder)
        assert take_all(driver) == expected
        num_epochs, num_late = driver.fleet.epoch, driver.fleet.num_late
        driver.fleet.num_left = 0
        driver.settle()
        add_all(driver, folder)  # and it is as good as new
        assert take_all(driver) == expected
        assert driver.engine.num_free_blocks == driver.engine.limits.num_blocks
    faults = [entry for entry in told if isinstance(entry, Fault)]
    assert len(faults) == num_epochs - 1 >= 3  # two of one epoch are one
    assert num_late
    assert len([entry for entry in told if isinstance(entry, Ended)]) == 2 * len(LENGTHS)


def test_a_request_that_a_stage_dies_of_ends_alone(folder):
    """The others come to the tokens that they come to without it (DeepSpeed-MII#299: one request
    crashes, and no other can be posted; sglang#514: all end, or else all would hang)."""
    prompts = [[3, 4, 5], [6, POISON, 7], [8, 9, 10]]

    def run(fleet, numbers):
        reasons = {}
        with start(folder, fleet, []) as driver:
            for number in numbers:
                params = SamplingParams(
                    max_tokens=MAX_TOKENS,
                    temperature=0.0,
                    seed=0,
                    ignore_eos=True,
                    logit_bias={POISON: -100.0},
                )
                driver.submit([Request(id=number, prompt=tuple(prompts[number]), params=params)])
            tokens = {}
            while driver.engine.num_unfinished:
                for output in driver.outputs(1.0):
                    tokens.setdefault(output.request_id, []).append(output.token)
                    if output.finish_reason is not None:
                        reasons[output.request_id] = output.finish_reason, output.error
            assert driver.engine.num_free_blocks == driver.limits.num_blocks
            return tokens, reasons, driver.losses.counts

    tokens, reasons, num_losses = run(PoisonedFleet, [0, 1, 2])
    reason, error = reasons.pop(1)
    assert reason == "error" and "a stage was lost at this request 3 times" in error
    assert num_losses == [0, 3, 0] and tokens.pop(1) == [None]
    assert (tokens, reasons) == run(LocalFleet, [0, 2])[:2]


def test_a_run_that_ends_by_a_loss_hands_on_what_came_before(folder, expected):
    told = []
    with start(folder, DoomedFleet, told, restart=False, head_stages="last") as driver:
        add_all(driver, folder)
        first = None
        driver.fleet.is_doomed = True
        while not first:
            first = driver.outputs(1.0)
        assert all(output.token == expected[output.request_id][0] for output in first)
        for _ in range(2):
            with pytest.raises(StageError, match="stage 1 died"):
                driver.outputs(1.0)
        with pytest.raises(StageError, match=r"has ended \(stage 1 died\)"):
            add_all(driver, folder)
    (fault,) = [entry for entry in told if isinstance(entry, Fault)]
    assert (fault.stage, fault.reason) == (1, "stage 1 died")
