"""What a request has to be, so that no stage ends by it."""

from pipeserve.core.nouns import Request
from pipeserve.core.request_state import check_fits
from pipeserve.core.view import Limits
from pipeserve.errors import CapacityError, ConfigError
from pipeserve.sampling_params import token_ids_of


def check_request(request: Request, vocab_size: int, limits: Limits) -> None:
    """Raises CapacityError, and ConfigError for token ids that the model does not have."""
    _check_token_ids(request, vocab_size)
    check_fits(request, limits)
    if request.num_imported:
        raise CapacityError(
            f"request {request.id} imports the KV of {request.num_imported} positions; stages "
            "cannot take KV from another pipeline yet"
        )


def _check_token_ids(request: Request, vocab_size: int) -> None:
    """A stage would end at one that is not in its tables, and the run with it."""
    for ids in (request.prompt, *token_ids_of(request.params), *request.bad_word_ids):
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"request {request.id}: {token} is no token id; this model's are 0 to "
                    f"{vocab_size - 1}"
                )
