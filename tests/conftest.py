"""What several test files share."""

import signal

import pytest

# In the background of a shell SIGINT is ignored, and by whatever is started there: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_thread():
    """Torch on one thread: tiny products only lose time on more, and other tests want the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
