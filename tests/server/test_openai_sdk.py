"""OpenAI's own Python client against the server."""

import asyncio

import pytest
from fake_client import byte_tokenizer
from fake_server import served
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError, OpenAI

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = byte_tokenizer(tmp_path_factory.mktemp("model"))
    with served(folder, keys=("k",), reply=lambda prompt: b"Hello.", max_model_len=200) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as it:
        yield it


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "pipeserve"


def test_completions(client):
    answer = client.completions.create(
        model="fake",
        prompt=["ab", "ab"],
        max_tokens=5,
        n=2,
        echo=True,
        logprobs=1,
        seed=1,
        stop=["zz"],
        logit_bias={"97": 1},
        user="me",
        extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True, "repetition_penalty": 1.1},
    )
    assert [choice.text for choice in answer.choices] == ["abHello"] * 4
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert answer.usage.completion_tokens == 20


def test_a_stream_of_completions(client):
    options = {"include_usage": True}
    stream = client.completions.create(
        model="fake", prompt="ab", max_tokens=5, stream=True, stream_options=options
    )
    *told, last = stream
    assert "".join(event.choices[0].text for event in told) == "Hello"
    assert told[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.total_tokens == 7
    assert last.usage.prompt_tokens_details.cached_tokens == 0


def test_chat(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=HI,
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
    )
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].logprobs.content[0].token == "H"


def test_a_stream_of_chat(client):
    stream = client.chat.completions.create(model="fake", messages=HI, max_tokens=5, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == "Hello"


def test_its_helper_for_streams(client):
    with client.chat.completions.stream(model="fake", messages=HI, stop=".") as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "Hello"


def test_errors_are_its_own(server, client):
    with pytest.raises(BadRequestError) as error:
        client.completions.create(model="fake", prompt="a", max_tokens=300)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(NotFoundError) as error:
        client.completions.create(model="gpt-5", prompt="a")
    assert error.value.code == "model_not_found"
    stranger = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with stranger, pytest.raises(AuthenticationError):
        stranger.models.list()


def test_many_at_once_and_async(server):
    async def main():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k") as client:

            async def one(number):
                if number % 2:
                    answer = await client.completions.create(
                        model="fake", prompt="ab", max_tokens=5
                    )
                    return answer.choices[0].text
                stream = await client.chat.completions.create(
                    model="fake", messages=HI, max_tokens=5, stream=True
                )
                return "".join([event.choices[0].delta.content or "" async for event in stream])

            return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(main()) == ["Hello"] * 40
