"""A KV pool of another type than the run's."""

import pytest
from checkpoints import greedy_tokens, random_prompts, tiny_llama
from local_fleet import local_llm

from pipeserve import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_pool_in_float16_takes_half_and_gives_the_same_tokens(tmp_path):
    folder = tiny_llama(tmp_path)
    prompts = random_prompts(folder, (30, 7, 19))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    kv_bytes = {}
    for dtype in ("auto", "float16"):
        options = {"kv_cache_dtype": dtype, "num_gpu_blocks_override": 64, "dtype": "float32"}
        with local_llm(folder, (2, 2), **options) as llm:
            found = [list(done.token_ids) for done in llm.generate(prompts, params)]
            kv_bytes[dtype] = sum(stage.kv_bytes for stage in llm.client.stages)
        assert found == greedy_tokens(folder, prompts, 12)
    assert kv_bytes["float16"] * 2 == kv_bytes["auto"]
