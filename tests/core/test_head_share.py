"""Which end of a pipeline applies a head, by what the ends are told to have taken."""

import random

import pytest

from pipeserve.core.head_share import HeadShare


def serve(first_s, last_s, head_s, count=400, late=2, noise=0.0, is_prompt=lambda index: False):
    """Share of the heads that the first stage gets, and by how much it is busier in the end than
    the last one, in heads. What a stage took is told `late` microbatches later."""
    share, rng = HeadShare(3), random.Random(0)
    pending, num_first, ahead_s = [], 0, 0.0

    def told(index, at_first):
        nonlocal ahead_s
        first, last, head = (s * rng.gauss(1.0, noise) for s in (first_s, last_s, head_s))
        share.took(index, 0, first)
        share.took(index, 2, last + head * (at_first is False))
        if at_first:
            share.headed(index, head)
        ahead_s += first - last + head * {True: 1, False: -1, None: 0}[at_first]

    for index in range(count):
        at_first = None if is_prompt(index) else share.at_first(index)
        num_first += at_first is True
        pending.append((index, at_first))
        if len(pending) > late:
            told(*pending.pop(0))
    num_heads = sum(not is_prompt(index) for index in range(count))
    return num_first / num_heads, ahead_s / head_s


@pytest.mark.parametrize("late", [0, 1, 2, 5])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_equal_ends_have_half_of_the_heads_each(late, noise):
    num_first, _ = serve(5.0, 5.0, 2.0, late=late, noise=noise)
    assert num_first == pytest.approx(0.5, abs=0.06)


def test_the_busier_end_has_fewer():
    assert serve(5.2, 5.0, 2.0)[0] < 0.47
    assert serve(5.0, 5.2, 2.0)[0] > 0.53


def test_chunks_of_prompts_that_sample_nothing_have_no_part_in_it():
    num_first, _ = serve(5.0, 5.0, 2.0, is_prompt=lambda index: index % 3 > 0)
    assert num_first == pytest.approx(0.5, abs=0.06)


def test_what_is_void_is_not_waited_for():
    """After a loss it goes on as before, though no end of what was outstanding ever comes."""
    share = HeadShare(2)
    for index in range(8):
        share.at_first(index)
    share.forget()
    turns = []
    for index in range(8, 20):
        turns.append(share.at_first(index))
        share.took(index, 0, 1.0)
        share.took(index, 1, 1.0 + (not turns[-1]))
        if turns[-1]:
            share.headed(index, 1.0)
    assert sum(turns) == pytest.approx(len(turns) / 2, abs=1)
