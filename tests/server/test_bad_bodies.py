"""Bodies that are nearly right: an answer or an error, never a failure (`bench/server_fuzz.py` has
the long run)."""

import json

import httpx
import pytest
from bad_bodies import bad_body
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import ask, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeserve.server.openai.bodies import CompletionBody
from pipeserve.server.options import ServerOptions


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(folder, ServerOptions(tool_call_parser="hermes"), max_model_len=200) as it:
        yield it


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
def test_none_is_a_failure_of_ours(server, path):
    with httpx.Client(base_url=server.url, timeout=30) as client:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def try_it(rng):
            content = json.dumps(bad_body(rng, path))
            headers = {"Content-Type": "application/json"}
            answer = client.post(path, content=content, headers=headers)
            assert answer.status_code in (200, 400, 404), (answer.text, content)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        try_it()
    until(lambda: server.service.num_open == server.pipeline.num_unfinished == 0)
    assert ask(server, "/v1/completions", prompt="a", max_tokens=2)[0] == 200


@pytest.mark.parametrize(
    "body",
    [{"prompt": [1.5] * 1000}, {"prompt": [[{}] * 1000] * 3}, {"prompt": "a", "stop": [1] * 1000}],
)
def test_of_a_long_list_the_first_that_is_wrong_is_enough(body):
    """All of 32 MB took 17 seconds, in which nobody's stream went on."""
    with pytest.raises(ValidationError) as raised:
        CompletionBody.model_validate(body)
    assert raised.value.error_count() < 10
