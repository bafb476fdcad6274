"""Stages that several ranks share, under all sorts of requests at once: with beginnings in common,
in a pool too small for all, with every sampling option, some aborted. Tokens are those of one rank.

Ranks that decide anything by themselves part here, and hang or mix up texts: by clocks of their own
(sglang#27221, sglang#25887), by free blocks as each sees them (TensorRT-LLM#14020), by seeds
(FasterTransformer#390).
"""

import random

import pytest
from checkpoints import tiny
from forked_fleet import ForkedFleet
from local_fleet import LocalFleet
from test_restarts import Taken

from pipeserve import SamplingParams
from pipeserve.configs import make_config
from pipeserve.core.nouns import Request
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.processes]

VOCAB, NUM_REQUESTS = 257, 24
FEW = 20
"""Blocks: as many as the longest request needs, and two."""
WAYS = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0, "min_tokens": 6, "stop_token_ids": tuple(range(3, 60))},
    {"temperature": 0, "prompt_logprobs": 1},
    {},
    {"top_k": 5},
    {"top_k": 7, "top_p": 0.8, "logprobs": 1},
    {"top_p": 0.9, "min_p": 0.02},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": {250: 5.0, 3: -5.0}},
    {"allowed_token_ids": tuple(range(100, 180))},
)


class Requests:
    """A load, by its seed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        beginnings = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in (8, 30)] + [[]]
        self.all, self.aborted_after = [], {}
        for number in range(NUM_REQUESTS):
            own = [draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 2, 7, 20)))]
            params = SamplingParams(
                max_tokens=draw.choice((1, 5, 20)),
                seed=number,
                ignore_eos=True,
                **draw.choice(WAYS),
            )
            self.all.append(
                Request(
                    id=number,
                    prompt=tuple(draw.choice(beginnings) + own),
                    params=params,
                    stop_ids=frozenset(params.stop_token_ids),
                    bad_word_ids=((7, 9), (11,)) if number % 6 == 1 else (),
                )
            )
            if draw.random() < 0.2:
                self.aborted_after[number] = draw.randrange(3)

    def run(self, driver: Driver, *, may_abort: bool) -> Taken:
        """They come a few at a time."""
        taken, due = Taken(driver), list(self.all)
        while due or driver.engine.num_unfinished:
            if due and driver.engine.num_unfinished < 9:
                driver.submit([due.pop(0) for _ in range(min(4, len(due)))])
            taken.look()
            for number, num_tokens in self.aborted_after.items() if may_abort else ():
                if number not in taken.reasons and len(taken.tokens.get(number, [])) > num_tokens:
                    driver.abort(number)
        return taken


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    """In this process, before it forks."""
    import pipeserve.stages.tensor_parallel.layers  # noqa: F401


def setup_of(folder, tp, pp, **more):
    flags = {
        "model": folder,
        "dtype": "float32",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "heartbeat_interval": 60.0,
        "max_num_batched_tokens": 19,
        "block_size": 4,
        "max_num_seqs": 8,
        "policy": "sarathi_serve",
        "restart": False,
        **more,
    }
    return checkpoint_setup(make_config({}, flags))


@pytest.mark.parametrize(("tp", "pp", "seed"), [(2, 1, 0), (2, 2, 1), (3, 1, 2)])
def test_tokens_are_those_of_one_rank(tmp_path, tp, pp, seed):
    folder = tiny(
        "llama",
        tmp_path,
        hidden_size=96,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=VOCAB,
    )
    load = Requests(seed)
    with Driver(setup_of(folder, 1, 1, num_gpu_blocks_override=400), fleet=LocalFleet) as driver:
        expected = load.run(driver, may_abort=False)
    few = setup_of(folder, tp, pp, num_gpu_blocks_override=FEW)
    with Driver(few, fleet=ForkedFleet) as driver:
        taken = load.run(driver, may_abort=True)
        assert driver.engine.num_free_blocks == FEW
        stats = driver.engine.stats
        assert stats.preemptions and stats.cached_prefix_tokens
    for number in range(NUM_REQUESTS):
        got, wanted = taken.tokens.get(number, []), expected.tokens[number]
        assert got == wanted[: len(got)]
        assert len(got) == len(wanted) or number in load.aborted_after
