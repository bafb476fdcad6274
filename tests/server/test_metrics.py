"""What /metrics says: vLLM's names with vLLM's meaning, and ours of the stages."""

import json
import re
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask
from prometheus_client.parser import text_string_to_metric_families

from pipeserve.server.options import ServerOptions
from pipeserve.wire.client import STEP_S, STEP_TOKENS, Distribution, StageFigures

COMPLETIONS = "/v1/completions"
DASHBOARD = Path(__file__).parents[2] / "configs/grafana/pipeserve.json"
MODEL = {"model_name": "fake", "engine": "0"}


@pytest.fixture
def folder(tmp_path):
    return byte_tokenizer(tmp_path)


def told(server):
    """(name, labels) -> value of every sample, without the labels that all have."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items() - MODEL.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[name, frozenset(labels.items())]


def test_what_ends_is_counted_once(folder):
    with served(folder) as server:
        ask(server, COMPLETIONS, prompt="abc", max_tokens=3)
        ask(server, COMPLETIONS, prompt="abcd", max_tokens=2, n=2, stop="no")
        samples = told(server)
    assert value(samples, "vllm:prompt_tokens_total") == 3 + 4 + 4
    assert value(samples, "vllm:generation_tokens_total") == 3 + 2 + 2
    reasons = {"length": 3, "stop": 0, "abort": 0, "error": 0}
    for reason, count in reasons.items():
        assert value(samples, "vllm:request_success_total", finished_reason=reason) == count
    for name, count, total in (
        ("request_prompt_tokens", 3, 11),
        ("request_generation_tokens", 3, 7),
        ("request_params_max_tokens", 3, 7),
        ("request_params_n", 2, 1 + 2),
        ("request_max_num_generation_tokens", 2, 3 + 2),
        ("request_queue_time_seconds", 3, 0.03),
        ("request_prefill_time_seconds", 3, 0.06),
    ):
        assert value(samples, f"vllm:{name}_count") == count, name
        assert value(samples, f"vllm:{name}_sum") == pytest.approx(total), name
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 3
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 2 + 1 + 1
    between_s = value(samples, "vllm:inter_token_latency_seconds_sum")
    assert value(samples, "vllm:request_decode_time_seconds_sum") == pytest.approx(between_s)
    inference_s = value(samples, "vllm:request_inference_time_seconds_sum")
    assert inference_s == pytest.approx(between_s + 0.06)


def test_what_the_server_ends_is_aborted(folder):
    options = ServerOptions(request_timeout=0.2)
    with served(folder, options, step_s=0.02, max_model_len=1_500) as server:
        ask(server, COMPLETIONS, prompt="a", max_tokens=1_400)
        samples = told(server)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1


def test_the_buckets_of_lengths_end_at_the_context(folder):
    with served(folder, max_model_len=64) as server:
        ends = [dict(labels).get("le") for name, labels in told(server)
                if name == "vllm:request_prompt_tokens_bucket"]  # fmt: skip
    assert ends == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "+Inf"]


def test_answers_are_counted_by_route(folder):
    with served(folder, keys=("k",)) as server:
        ask(server, COMPLETIONS, {"Authorization": "Bearer k"}, prompt="a", max_tokens=2)
        ask(server, COMPLETIONS, {"Authorization": "Bearer k"}, prompt="a", n=-1)
        ask(server, f"{COMPLETIONS}/", prompt="a")
        for path in ("/nowhere", "/elsewhere", "/v1/models/other"):
            httpx.get(server.url + path, headers={"Authorization": "Bearer k"})
        text = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer k"}).text
    found = {
        tuple(sample.labels[name] for name in ("method", "status", "handler")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "http_requests_total"
    }
    assert found == {
        ("POST", "2xx", COMPLETIONS): 1,
        ("POST", "4xx", COMPLETIONS): 2,  # a wrong body, and one without a key
        ("GET", "4xx", "none"): 2,
        ("GET", "4xx", "/v1/models/{name:path}"): 1,
    }


def test_of_the_pipeline_it_says_what_the_driver_said(folder):
    with served(folder, step_s=0.02, max_model_len=1_500) as server:
        running = threading.Thread(
            target=ask, args=(server, COMPLETIONS), kwargs={"prompt": "a", "max_tokens": 60}
        )
        running.start()
        deadline = time.monotonic() + 20
        while not value(samples := told(server), "vllm:num_requests_running"):
            assert time.monotonic() < deadline
        running.join()
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.01
    assert value(samples, "pipeserve:kv_blocks", state="used") == 1
    assert value(samples, "pipeserve:kv_blocks", state="free") == 99
    (info,) = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert info["block_size"] == "16" and info["enable_prefix_caching"] in ("True", "False")
    told_of_stages = {name for name, _ in samples if name.startswith("pipeserve:stage")}
    assert told_of_stages == {"pipeserve:stage_losses_total"}  # no figures have come


def figures_of(stage):
    counts = [0] * (len(STEP_S) + 1)
    counts[3] = 2
    tokens = [0] * (len(STEP_TOKENS) + 1)
    tokens[-1] = 2
    seconds = {"computing": 3.0 + stage, "link": 0.5}
    steps, sizes = Distribution(counts, 0.015), Distribution(tokens, 40_000)
    return StageFigures(seconds, steps, sizes, predicted_s=1.0, measured_s=2.0, off_s=1.5)


def test_of_each_stage_it_says_where_its_time_went(folder):
    with served(folder, step_s=0.02) as server:
        server.pipeline.stages = [figures_of(0), figures_of(1)]
        ask(server, COMPLETIONS, prompt="a", max_tokens=2)
        samples = told(server)
    name = "pipeserve:stage_seconds_total"
    assert value(samples, name, stage="1", state="computing", cause="") == 4.0
    assert value(samples, name, stage="0", state="idle", cause="link") == 0.5
    name = "pipeserve:stage_microbatch_seconds"
    assert value(samples, f"{name}_bucket", stage="0", le="0.005") == 0
    assert value(samples, f"{name}_bucket", stage="0", le="0.01") == 2
    assert value(samples, f"{name}_bucket", stage="0", le="+Inf") == 2
    assert value(samples, f"{name}_sum", stage="0") == 0.015
    assert value(samples, "vllm:iteration_tokens_total_bucket", le="16384.0") == 0
    assert value(samples, "vllm:iteration_tokens_total_count") == 2
    assert value(samples, "pipeserve:stage_measured_seconds_total", stage="1") == 2.0


def test_the_dashboard_asks_for_what_there_is(folder):
    """`bench/server_dashboard.py` asks Prometheus for each of its expressions."""
    with served(folder, step_s=0.02) as server:
        server.pipeline.stages = [figures_of(0), figures_of(1)]
        ask(server, COMPLETIONS, prompt="a", max_tokens=2)
        names = {name for name, _ in told(server)}
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    expressions = [
        each["expr"] for panel in dashboard["panels"] for each in panel.get("targets", ())
    ]
    expressions += [each["query"] for each in dashboard["templating"]["list"]]
    asked = set(re.findall(r"\b(?:(?:vllm|pipeserve):|http_|process_)\w+", " ".join(expressions)))
    assert len(asked) > 30
    assert asked <= names
