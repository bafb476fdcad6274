"""Keeps Python's garbage collector from stopping a run. For a process of one's own.

References that are counted free all that a run makes; the collector is there for cycles, of which
it makes none. But it looks for them by walking through every object, at a time of its own: of the
imports alone that is 0.1 s. So vLLM and SGLang freeze what is there when their engines have started
(sgl-project/sglang#9241). Freezing does not bound what comes later: a collection of the young
starts by how many more objects were made than freed, and under a steady load, where that is none,
finds everything that was made for minutes (sgl-project/sglang#30596). So none starts by itself.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST = 4000
"""New objects that are walked at a time: about half a millisecond."""


@contextmanager
def no_pauses() -> Iterator[Callable[[], None]]:
    """While it is entered, garbage is collected only when what it gives is called, and only among
    what was made since the last call. A cycle that lives longer is freed at the end."""
    was_enabled, num_frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield _collect
    finally:
        if was_enabled:
            gc.enable()
        if not num_frozen:
            gc.unfreeze()


def _collect() -> None:
    """Of many at once, such as a load's requests, most live long: they are not walked at all."""
    if gc.get_count()[0] > _MOST:
        gc.freeze()
    else:
        gc.collect(0)
