"""What `versus.py` makes of its sides' runs."""

import json
from pathlib import Path

import pytest
from ratios import comparison, table
from sides import Conditions, Vllm
from versus import WORKLOADS, lengths_of, settings, write_requests


def report(rate: float, tbt_s: float = 0.1) -> dict:
    percentiles = {"p50": tbt_s / 2, "p90": tbt_s, "p99": tbt_s}
    return {
        "total_tokens_per_s": rate,
        "output_tokens_per_s": rate / 4,
        "ttft_s": percentiles,
        "tbt_s": percentiles,
    }


@pytest.fixture
def conditions(tmp_path):
    return Conditions(
        model=tmp_path,
        num_stages=2,
        cores=(0, 1, 4, 5),
        peer_dtype="float32",
        batched_tokens=512,
        max_model_len=2048,
        passes=1,
    )


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    found = comparison(
        {
            "ours": [report(100), report(300), report(200)],
            "slow": [report(50), report(100), report(50)],
            "fast": [report(100), report(100, tbt_s=0.4), report(400)],
        }
    )
    assert found["best_peer"] == "fast"
    ratio = found["ratios"]["slow"]["total tokens/s"]
    assert ratio == {"of_medians": 4.0, "least": 2.0, "greatest": 4.0}
    ratio = found["ratios"]["fast"]["TBT P99, s"]
    assert ratio == {"of_medians": 1.0, "least": 0.25, "greatest": 1.0}
    assert "| ours / fast, its best | 2.00 (0.50 to 3.00) |" in table(found)
    assert "| ours / slow | 4.00 (2.00 to 4.00) |" in table(found)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_trial_is_the_beginning_of_the_workload(workload):
    whole = lengths_of(workload, None)
    assert len(whole) == WORKLOADS[workload]
    assert lengths_of(workload, 8) == whole[:8]


def test_rounds_have_the_same_lengths_and_other_tokens(tmp_path):
    def requests(seed: str) -> list[dict]:
        write_requests(tmp_path / seed, [(5, 3), (1, 2)], 1000, seed)
        return [json.loads(line) for line in (tmp_path / seed).read_text().splitlines()]

    first, again, second = requests("a"), requests("a"), requests("b")
    assert first == again != second
    assert [(len(r["prompt_token_ids"]), r["max_tokens"]) for r in second] == [(5, 3), (1, 2)]


def test_a_peers_token_times_are_summed_up_as_ours(tmp_path, conditions):
    side = Vllm(conditions=conditions, running=32, python="there")
    slow = {"start_s": 0.0, "prompt_tokens": [6], "token_times_s": [[8.0]]}
    quick = {
        "start_s": 10.0,
        "prompt_tokens": [6, 2],
        "token_times_s": [[11.0, 11.5, 12.0], [11.0]],
    }
    out = Path(tmp_path, "out.json")
    out.write_text(json.dumps({"runs": [slow, quick, quick]}))
    figures = side.figures(out)
    assert figures["seconds"] == 2.0  # the middle run
    assert figures["total_tokens_per_s"] == 6.0
    assert figures["output_tokens_per_s"] == 2.0
    assert figures["ttft_s"]["p50"] == 1.0
    assert figures["tbt_s"]["p99"] == 0.5


def test_each_stage_of_vllm_has_its_own_cores(conditions):
    side = Vllm(conditions=conditions, running=32, python="there")
    assert side.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|4,5"


def test_settings_that_make_no_difference_are_left_out():
    assert settings([32, 256], 64) == [32, 256]
    assert settings([32, 256], 32) == [32]
    assert settings([16, 32, 256], 20) == [16, 32]
    assert settings([16, 32], 64) == [16, 32]
