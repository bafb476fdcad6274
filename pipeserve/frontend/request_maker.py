"""From what a user asks to what the engine runs: prompts made token ids, parameters checked, a
request with a seed of its own for each sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any

from pipeserve.core.nouns import Request, RequestId
from pipeserve.core.request_state import check_fits
from pipeserve.errors import ConfigError
from pipeserve.frontend.client import Client
from pipeserve.frontend.generation_config import default_params, eos_token_ids
from pipeserve.frontend.params import check_leaves_a_token, check_params, seeded
from pipeserve.frontend.prompt_forms import PlainPrompt, plain_prompt
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.sampling_params import SamplingParams


class RequestMaker:
    """Of one client; numbers its requests."""

    def __init__(self, client: Client) -> None:
        """Raises ConfigError for a generation_config.json that cannot be read."""
        self._client = client
        self.tokenizer = Tokenizer(client.model_folder)
        self.default_params = default_params(client.config, client.model_folder)
        self._numbers = count()

    def first(self, prompt: Any, params: SamplingParams, priority: int = 0) -> Request:
        """The first sample of a prompt of any form (`prompt_forms.py`), but for its seed.

        Raises ConfigError for what is no prompt or no parameter, and CapacityError for what can
        never run.
        """
        params = check_params(params, self._client.vocab_size)
        if params.stop and not self.tokenizer.exists:
            raise ConfigError(
                f"stop is {params.stop!r}, but {self._client.model_folder} has no tokenizer; "
                "use stop_token_ids"
            )
        if params.detokenize:
            self.tokenizer.load()
        eos = () if params.ignore_eos else self._eos_ids
        stop_ids = frozenset((*params.stop_token_ids, *eos))
        bad_word_ids = self._bad_word_ids(params)
        check_leaves_a_token(params, stop_ids, bad_word_ids)
        plain = plain_prompt(prompt)
        token_ids = self._encode(plain)
        if params.max_tokens is None:
            params = replace(params, max_tokens=self._room_behind(token_ids))
        request = Request(
            id=RequestId(next(self._numbers)),
            prompt=token_ids,
            params=params,
            stop_ids=stop_ids,
            bad_word_ids=bad_word_ids,
            cache_salt=plain.cache_salt,
            priority=priority,
        )
        check_fits(request, self._client.limits)
        return request

    def samples(self, first: Request) -> Iterator[Request]:
        """All samples of a prompt, each with its own id and seed. The first one computes the
        prompt, whose blocks the others share, and alone tells the prompt's logprobs."""
        for sample in range(first.params.n):
            number = first.id if sample == 0 else RequestId(next(self._numbers))
            params = seeded(first.params, self._client.config.seed, number, sample)
            if sample == 0:
                yield replace(first, params=params)
            else:
                params = replace(params, prompt_logprobs=None)
                yield replace(first, id=number, params=params, sample_of=first.id)

    def _room_behind(self, prompt: Sequence[int]) -> int:
        """Tokens until the context or the KV pool is full; 1 where there is no room, which
        is refused."""
        limits = self._client.limits
        longest = min(limits.max_model_len, limits.num_blocks * limits.block_size + 1)
        return max(1, longest - len(prompt))

    @cached_property
    def _eos_ids(self) -> tuple[int, ...]:
        """Not before it is needed, for it needs the tokenizer."""
        client = self._client
        return eos_token_ids(client.config, client.eos_token_ids, client.vocab_size, self.tokenizer)

    def _bad_word_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if not self.tokenizer.exists:
            raise ConfigError(
                f"bad_words is {params.bad_words!r}, but {self._client.model_folder} has no "
                "tokenizer; use logit_bias"
            )
        words = self.tokenizer.encode_bad_words(params.bad_words)
        vocab_size = self._client.vocab_size
        return tuple(ids for ids in words if max(ids) < vocab_size)  # others cannot be sampled

    def _encode(self, prompt: PlainPrompt) -> tuple[int, ...]:
        """Checked whoever made the ids: a tokenizer may know more of them than the model does."""
        ids: Sequence[int] = prompt.token_ids or ()
        if prompt.text is not None:
            ids = self.tokenizer.encode(prompt.text)
        elif prompt.messages is not None:
            ids = self.tokenizer.encode_chat(prompt.messages)
        vocab_size = self._client.vocab_size
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{token!r} is no token id; this model's are 0 to {vocab_size - 1}"
                )
        return tuple(ids)
