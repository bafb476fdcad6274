"""What a stage has computed is known though it was killed in the middle of a word."""

import os
import signal

from pipeserve.core.records import Span
from pipeserve.stage.last_spans import LastSpans


def span(index):
    return Span(2, index, 7, float("-inf"), 0.5, *[float(index)] * 4, 0.25, float("inf"), 1 << 40)


def test_its_keeper_takes_out_what_it_put_in():
    spans = LastSpans.make()
    assert spans.take() == []
    for index in range(5):
        spans.put(span(index))
    assert LastSpans(spans.descriptor).take() == [span(index) for index in range(5)]
    spans.close()


def test_the_latest_are_kept():
    spans = LastSpans.make()
    for index in range(1000):
        spans.put(span(index))
    taken = [each.index for each in spans.take()]
    assert taken == list(range(taken[0], 1000)) and len(taken) > 50
    spans.close()


def test_a_stage_that_is_killed_while_it_writes_leaves_whole_spans():
    spans = LastSpans.make()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            own = LastSpans(spans.descriptor)
            index = own.take()[-1].index if own.take() else 0
            while True:
                index += 1
                own.put(span(index))
        before = spans.take()
        while spans.take() == before:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        taken = spans.take()
        indices = [each.index for each in taken]
        assert indices == list(range(indices[0], indices[0] + len(taken)))
        assert taken == [span(index) for index in indices]
    spans.close()
