"""Logits that are not finite end their request, and only theirs.

The checkpoint's values leave float16's range where a prompt has one certain token, as weights made
for bfloat16 do (vllm#14126, transformers#39686). Stages are real, in this process.
"""

import re
from itertools import count

import pytest
from checkpoints import random_prompts, tiny_llama
from local_fleet import LocalFleet
from safetensors.torch import load_file, save_file

from pipeserve.configs import RunConfig
from pipeserve.core.nouns import Request, RequestId
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.errors import ConfigError
from pipeserve.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = 200
"""The token."""
M4 = (53, 200, 101, 12)
IDS = map(RequestId, count())
"""Of requests; drivers that are asked in turn need not have their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One number of a value sees the bad token alone, and is 240,000 of it."""
    path = tmp_path_factory.mktemp("overflows")
    tiny_llama(path)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0.0
    embedding[BAD] = 0.01 * embedding[BAD]
    embedding[BAD, 0] = 1.0
    for part in ("q", "k", "v"):
        tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:, 0] = 0.0
    value = tensors["model.layers.0.self_attn.v_proj.weight"]
    value[0] = 0.0
    value[0, 0] = 30000.0
    save_file(tensors, path / "model.safetensors")
    return str(path)


@pytest.fixture(scope="module")
def start(folder):
    """-> a driver of two local stages; the same for the same options."""
    drivers = {}

    def start(dtype="float16", **options):
        key = (dtype, *options.items())
        if key not in drivers:
            drivers[key] = make(dtype, options)
        return drivers[key]

    def make(dtype, options):
        config = RunConfig(
            model=folder,
            dtype=dtype,
            pipeline_parallel_size=2,
            **{"num_gpu_blocks_override": 24, **options},
        )
        return Driver(checkpoint_setup(config), fleet=LocalFleet)

    yield start
    for driver in drivers.values():
        driver.close()


def ask(driver, prompts, **params):
    """The outputs of each, all at once; params of the first alone where there are `params`."""
    outputs = {}
    for place, prompt in enumerate(prompts):
        own = params if place == 0 else {"temperature": 0}
        own = SamplingParams(max_tokens=6, seed=1, ignore_eos=True, **own)
        request = Request(id=next(IDS), prompt=tuple(prompt), params=own)
        outputs[request.id] = []
        driver.submit([request])
    while driver.engine.num_unfinished:
        for output in driver.outputs(1.0):
            outputs[output.request_id].append(output)
    driver.settle()
    return list(outputs.values())


def tokens(outputs):
    return [output.token for output in outputs]


PATHS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "top-k and min-p": {"temperature": 1.0, "top_k": 5, "min_p": 0.01},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "prompt logprobs": {"temperature": 0, "prompt_logprobs": 1},
    "rules": {"temperature": 0, "repetition_penalty": 1.2, "allowed_token_ids": (5, 6, 7)},
    "min tokens": {"temperature": 0, "min_tokens": 3, "logit_bias": {5: 3.0}},
}


@pytest.mark.parametrize("path", PATHS)
def test_only_their_request_ends(start, folder, path):
    driver = start()
    others = random_prompts(folder, (20, 9, 33), seed=5)
    others = [[token for token in prompt if token != BAD] for prompt in others]
    alone = [tokens(ask(driver, [prompt], temperature=0)[0]) for prompt in others]
    failed, *rest = ask(driver, [M4, *others], **PATHS[path])
    assert [(o.token, o.finish_reason, o.logprobs, o.prompt_logprobs) for o in failed] == [
        (None, "error", None, None)
    ]
    assert "not finite" in failed[0].error and "float16" in failed[0].error
    assert "--dtype bfloat16 or float32" in failed[0].error
    assert [tokens(outputs) for outputs in rest] == alone
    assert all(outputs[-1].finish_reason == "length" for outputs in rest)
    assert driver.engine.num_free_blocks == driver.engine.limits.num_blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_remedy_helps(start, dtype):
    (outputs,) = ask(start(dtype), [M4], temperature=0)
    assert len(outputs) == 6 and outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("where", [0, 20, 58])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0, "prompt_logprobs": 0}])
def test_anywhere_in_a_prompt_of_many_chunks(start, folder, where, params):
    driver = start(max_num_batched_tokens=16)
    (prompt,) = random_prompts(folder, (60,), seed=1)
    prompt[where] = BAD
    (failed,) = ask(driver, [prompt], **params)
    assert [output.finish_reason for output in failed] == ["error"]
    (at,) = map(int, re.findall(r"the logits of token (\d+) are not finite", failed[0].error))
    # One that is scored ends within the chunk that has the token, another when it would sample.
    assert where - 16 < at <= where + 1 if "prompt_logprobs" in params else at == 60
    assert driver.engine.num_free_blocks == driver.engine.limits.num_blocks


def test_nothing_of_it_reaches_those_who_use_its_blocks_later(start, folder):
    """Every block of a small pool has held NaN when the others come."""
    driver = start(num_gpu_blocks_override=6, max_num_batched_tokens=32)
    others = [
        [token for token in prompt if token != BAD]
        for prompt in random_prompts(folder, (3, 17, 40, 60), seed=2)
    ]
    before = [tokens(ask(driver, [prompt], temperature=0)[0]) for prompt in others]
    for token in range(60, 66):
        (failed,) = ask(driver, [[token, *[BAD] * 79]], temperature=0)
        assert failed[-1].finish_reason == "error"
    after = [tokens(ask(driver, [prompt], temperature=0)[0]) for prompt in others]
    assert after == before


def test_an_equal_prompt_is_computed_anew(start):
    driver = start()
    cached = driver.engine.stats.cached_prefix_tokens
    prompt = [*range(5, 40), BAD, *range(50, 60)]
    for _ in range(2):
        (failed,) = ask(driver, [prompt], temperature=0)
        assert failed[-1].finish_reason == "error"
    assert driver.engine.stats.cached_prefix_tokens == cached


@pytest.mark.parametrize("length", [17, 40, 90])
def test_what_comes_before_it_is_clean(start, length, monkeypatch):
    """A prompt that begins alike shares those blocks, whatever became of the one that failed: here
    nobody waited to hear of it."""
    prompt = [length, *range(100, 99 + length)]
    whole = {"policy": "sarathi_serve", "max_num_batched_tokens": 128}  # cuts by no times
    without_cache = start(enable_prefix_caching=False, **whole)
    alone = tokens(ask(without_cache, [[*prompt, 5]], temperature=0)[0])
    driver = start(**whole)
    failing = Request(
        id=next(IDS),
        prompt=(*prompt, BAD, 6),
        params=SamplingParams(temperature=0, max_tokens=2, seed=0),
    )
    driver.submit([failing])
    with monkeypatch.context() as deaf:
        deaf.setattr(driver.fleet, "receive", lambda timeout_s, for_result=False: [])
        driver.step(0.0)
    driver.abort(failing.id)
    cached = driver.engine.stats.cached_prefix_tokens
    assert tokens(ask(driver, [[*prompt, 5]], temperature=0)[0]) == alone
    assert driver.engine.stats.cached_prefix_tokens == cached + length // 16 * 16


def test_while_it_generates(start, folder):
    """The bad token is allowed alone, so it comes second, with the next one under way."""
    driver = start(block_size=4)
    ok, other = [5, 6, 7], [8, 9, 10, 11]
    alone = tokens(ask(driver, [other], temperature=0)[0])
    failed, rest = ask(driver, [ok, other], temperature=0, allowed_token_ids=(BAD,))
    assert tokens(failed) == [BAD, None]
    assert [output.finish_reason for output in failed] == [None, "error"]
    assert tokens(rest) == alone
    assert driver.engine.num_free_blocks == driver.engine.limits.num_blocks


def test_more_logprobs_than_there_are_tokens(start):
    """They were an error of the stage, and ended the run."""
    driver = start("float32")
    (outputs,) = ask(driver, [[5, 6]], temperature=0, logprobs=300, prompt_logprobs=300)
    assert len(outputs[0].logprobs.top) == len(outputs[0].prompt_logprobs[0].top) == 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": (5, 256)},
        {"prompt": (-1, 5)},
        {"prompt": (5, 2**40)},
        {"bad_word_ids": ((5, 300),)},
        {"params": SamplingParams(seed=0, allowed_token_ids=(5, 256))},
        {"params": SamplingParams(seed=0, logit_bias={-1: 1.0})},
    ],
)
def test_ids_of_no_token_are_refused_before_they_reach_a_stage(start, wrong):
    driver = start("float32")
    fields = {"prompt": (5, 6), "params": SamplingParams(seed=0), **wrong}
    with pytest.raises(ConfigError, match="is no token id; this model's are 0 to 255"):
        driver.submit([Request(id=RequestId(10**6), **fields)])
    assert not driver.engine.num_unfinished


def test_a_stop_id_that_is_no_token(start):
    """Such as an eos beyond the vocabulary, before min_tokens: it ended the run."""
    driver = start("float32")
    request = Request(
        id=next(IDS),
        prompt=(5, 6),
        params=SamplingParams(temperature=0, max_tokens=3, min_tokens=2, seed=0),
        stop_ids=frozenset({2, 300}),
    )
    driver.submit([request])
    outputs = []
    while driver.engine.num_unfinished:
        outputs += driver.outputs(1.0)
    assert outputs[-1].finish_reason in ("length", "stop")
