"""What several test files share."""

import signal
from contextlib import nullcontext

import pytest

# In the background of a shell SIGINT is ignored, and by whatever is started there: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_collections(monkeypatch):
    """For commands within the tests' own process: each begins with a collection of all garbage,
    which takes ten times as long as the command where a thousand tests have left theirs."""
    from pipeserve.launch.run import record

    monkeypatch.setattr(record, "no_pauses", lambda: nullcontext(lambda: None))


@pytest.fixture(scope="session")
def one_thread():
    """Torch on one thread: tiny products only lose time on more, and other tests want the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
