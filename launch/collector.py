"""Keeps Python's garbage collector from stopping a run.

Reference counts free all that a run makes; the collector is there for cycles, of which it makes
none. But it looks for them by walking through every object: of the imports alone 0.1 s at a time.
vLLM and SGLang freeze their engine processes likewise (sgl-project/sglang#9241).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 700
"""Objects made since the last collection, from which on those are walked."""
_TIMES = 2
"""Such collections, after which what they left is walked once more: under a millisecond each."""
_NEVER = 1 << 30


@contextmanager
def short_collections() -> Iterator[None]:
    """While it is entered, collections walk only what was made lately: none is a full one. For a
    process of one's own: cycles that live longer than that are freed only at the end."""
    thresholds, num_frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _TIMES, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not num_frozen:
            gc.unfreeze()
