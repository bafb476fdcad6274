"""What the body of a request may be: OpenAI's fields, and vLLM's beyond them.

Here is their form alone. Values are checked where those of the Python API are
(`frontend/params.py`), and by `sampling.py`. A field that is null is as if it were left out; one
that nobody knows is ignored, as OpenAI's clients send what their makers think of next.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler

_MOST_TEXT = 1 << 24

T = TypeVar("T")


class _FirstAlone:
    """Of a list, the first thing that is wrong ends the check: to tell of each, of a million, takes
    seconds, for which all streams would stand still. (pydantic's own FailFast has no hash, which
    unions want.)"""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


Listed = Annotated[list[T], _FirstAlone]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Listed[int] | None = None
    bad_words: Listed[str] | None = None
    seed: int | None = None
    stop: str | Listed[str] | None = None
    stop_token_ids: Listed[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    user: str | None = None
    request_id: str | None = Field(default=None, pattern=r"^[\x21-\x7e]{1,128}$")
    best_of: int | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | Listed[str] | Listed[int] | Listed[Listed[int]] | None = None
    prompt_token_ids: Listed[int] | Listed[Listed[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Listed[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Listed[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Listed[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class TokenizeBody(Body):
    """POST /tokenize: of a prompt, or of a conversation."""

    model: str | None = None
    prompt: str | None = Field(default=None, max_length=_MOST_TEXT)
    messages: Listed[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Listed[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Listed[int]
