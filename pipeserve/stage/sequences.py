"""What a stage knows of the requests that it holds: the replay of the engine's decisions."""

from array import array
from dataclasses import dataclass
from itertools import chain, repeat
from math import inf

from pipeserve.sampling_params import DrawParams
from pipeserve.wire.step_messages import Registration, Step, unpack_params, unpack_tokens


@dataclass(slots=True)
class Sequence:
    """One registered request on one stage. A request that is admitted again gets a new one."""

    registration: Registration
    token_ids: array
    """Prompt and outputs known here; kept up to date on the first and the last stage alone."""
    block_table: list[int]
    token_s: float = -inf
    """When the token that the last microbatch sampled was here; -inf before the first."""
    _params: DrawParams | None = None

    @property
    def params(self) -> DrawParams:
        """How its tokens are drawn; unpacked by the stage that asks, which is the last one."""
        if self._params is None:
            self._params = unpack_params(self.registration.params)
        return self._params


class Sequences:
    """Every registered request of a stage, brought up to date by each step in index order."""

    def __init__(self) -> None:
        self._by_id: dict[int, Sequence] = {}
        self._awaiting: dict[int, list[Sequence]] = {}
        """Of each microbatch whose tokens are not known here."""

    def __len__(self) -> int:
        return len(self._by_id)

    def apply(self, step: Step) -> list[Sequence]:
        """Bring the table up to `step`; returns the sequence of each of its chunks."""
        for request_id in step.released:
            del self._by_id[request_id]
        for registration in step.admitted:
            self._by_id[registration.request_id] = Sequence(
                registration, unpack_tokens(registration.token_ids), list(registration.blocks)
            )
        sequences = [self._by_id[chunk.request_id] for chunk in step.chunks]
        for sequence, chunk in zip(sequences, step.chunks, strict=True):
            sequence.block_table.extend(chunk.new_blocks)
        return sequences

    def has_tokens_for(self, step: Step) -> bool:
        """Whether every id that `step` embeds is known, before it is applied (first stage; and last
        one, which may have to know them to sample, where both do).

        Not only a chunk with `token_from` may have to wait: the driver may know a token, and plan
        on it, before the last stage's message with that token has got here.
        """
        admitted = {registration.request_id for registration in step.admitted}
        return all(
            chunk.request_id in admitted
            or len(self._by_id[chunk.request_id].token_ids) >= chunk.stop
            for chunk in step.chunks
        )

    def await_tokens(self, step: Step, sequences: list[Sequence]) -> None:
        """Note whose tokens microbatch `step` will bring, if it samples (first and last stage)."""
        if any(chunk.samples for chunk in step.chunks):
            self._awaiting[step.index] = sequences

    def take_tokens(self, index: int, tokens: list[int], counts: bytes, now: float) -> None:
        """Append what microbatch `index` sampled, `counts` of it in each chunk (first and last
        stage).

        The sequences are those of the time when the microbatch ran, so a token of a request that
        was released or admitted again since then changes nothing. Where both ends sample, what one
        of them did may be here before what the other did for an earlier microbatch: none of its
        requests is in both.
        """
        sequences = self._awaiting.pop(index, None)
        if sequences is None or len(counts) != len(sequences) or len(tokens) != sum(counts):
            expected = "none" if sequences is None else f"those of {len(sequences)} chunks"
            raise RuntimeError(
                f"token feedback out of step: expected {expected} of microbatch {index}, got "
                f"{len(tokens)} of {len(counts)} chunks"
            )
        owners = chain.from_iterable(map(repeat, sequences, counts))
        for sequence, token in zip(owners, tokens, strict=True):
            sequence.token_ids.append(token)
            sequence.token_s = now
