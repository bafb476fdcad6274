"""Stages on a device other than the host's: all that meets there lies there, and what comes out is
the same. So `--device cuda` is held where there is no GPU; bench/gpu_check.py runs one."""

import pytest
import torch
from checkpoints import TINY, random_prompts, tiny
from cut_model import Stages, run_mixed
from elsewhere import ELSEWHERE, Elsewhere
from local_fleet import local_llm

import pipeserve.stage.worker
from pipeserve import SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.stages.backends.backend import Backend
from pipeserve.stages.devices import make_backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", TINY)
def test_every_family_computes_all_of_it_there(tmp_path, name):
    """Random chunks of several requests, decodes among them; hidden states cross by the host."""
    folder = tiny(name, tmp_path)
    prompts = random_prompts(folder, (26, 9, 2), seed=1)
    here = Stages(folder, (4,), backend=make_backend("cpu"))
    expected = [here.logits(prompt, len(prompt)) for prompt in prompts]
    with torch.inference_mode(), Elsewhere():
        stages = Stages(folder, backend=Backend(ELSEWHERE), block_size=4)
        held = [leaf.weight for stage in stages.stages for leaf in stage.leaves()]
        pools = [side for pool in stages.pools for side in (pool.keys_LKBPH, pool.values_LKBPH)]
        assert {tensor.device for tensor in (*held, *pools)} == {ELSEWHERE}
        run_mixed(stages, prompts, expected, seed=7)


SAMPLED = [
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.01, "seed": 2, "logit_bias": {7: 3.0}},
    {"temperature": 1.0, "seed": 3, "allowed_token_ids": [4, 9, 70], "frequency_penalty": 0.5},
    {"temperature": 0, "min_tokens": 6, "stop_token_ids": [5, 8], "presence_penalty": 0.5},
]


def test_the_whole_pipeline_with_every_way_to_sample(tmp_path, monkeypatch):
    folder = tiny("llama", tmp_path)
    prompts = random_prompts(folder, (30, 9, 2, 17, 5))
    params = [SamplingParams(max_tokens=8, **options) for options in SAMPLED]
    with local_llm(folder, (1, 3)) as llm:
        expected = llm.generate(prompts, params)
    backend = Backend(ELSEWHERE)
    monkeypatch.setattr(pipeserve.stage.worker, "make_backend", lambda *_: backend)
    with Elsewhere(), local_llm(folder, (1, 3)) as llm:
        got = llm.generate(prompts, params)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
    for ours, theirs in zip(got[0].logprobs, expected[0].logprobs, strict=True):
        assert ours.sampled == pytest.approx(theirs.sampled, abs=1e-4)
        assert list(ours.top) == list(theirs.top)
    assert len(got[0].prompt_logprobs) == len(prompts[0])


def test_what_lies_on_the_wrong_side_is_found():
    """Or the tests above could not fail."""
    with torch.inference_mode(), Elsewhere():
        there = torch.ones(3).to(ELSEWHERE)
        assert (there + there * 2.0).to("cpu").tolist() == [3.0, 3.0, 3.0]
        with pytest.raises(AssertionError, match="on the device and one on the host"):
            there + torch.ones(3)


def test_without_a_gpu_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device is cuda, and .*; use --device cpu$"):
        make_backend("cuda")


def test_ranks_of_a_machine_take_its_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    devices = [str(make_backend("cuda", local_rank=rank).device) for rank in range(5)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
