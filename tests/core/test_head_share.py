"""Which end of a pipeline applies a head, by what the ends are told to have taken."""

import random
from itertools import pairwise

import pytest

from pipeserve.core.head_share import HeadShare


def serve(first_s, last_s, head_s, count=400, late=2, noise=0.0, is_prompt=lambda index: False):
    """For each head, whether the first stage gets it. What a stage took is told `late` microbatches
    later."""
    share, rng = HeadShare(3), random.Random(0)
    pending, turns = [], []
    for index in range(count):
        at_first = None if is_prompt(index) else share.at_first()
        if at_first is not None:
            turns.append(at_first)
        pending.append((index, at_first))
        if len(pending) > late:
            told, at_first = pending.pop(0)
            first, last, head = (s * rng.gauss(1.0, noise) for s in (first_s, last_s, head_s))
            share.took(told, 0, first)
            share.took(told, 2, last + head * (at_first is False))
            if at_first:
                share.headed(head)
    return turns


@pytest.mark.parametrize("late", [0, 1, 2, 5])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_ends_that_are_nearly_even_take_turns(late, noise):
    more_s = 5.3 if noise == 0 else 5.0
    for first_s, last_s in ((5.0, 5.0), (more_s, 5.0), (5.0, more_s)):
        turns = serve(first_s, last_s, 2.0, late=late, noise=noise)[20:]  # the first ones are new
        assert all(a is not b for a, b in pairwise(turns))


@pytest.mark.parametrize("late", [0, 1, 2, 5])
def test_an_end_that_is_much_busier_has_fewer(late):
    def share(first_s, last_s):
        turns = serve(first_s, last_s, 2.0, late=late)
        return sum(turns) / len(turns)

    assert share(6.5, 5.0) < 0.4 and share(5.0, 6.5) > 0.6
    assert share(7.5, 5.0) < 0.2 and share(5.0, 7.5) > 0.8


def test_chunks_of_prompts_that_sample_nothing_take_no_turn():
    turns = serve(5.0, 5.0, 2.0, is_prompt=lambda index: index % 3 > 0)[20:]
    assert all(a is not b for a, b in pairwise(turns))


def test_what_is_void_is_not_waited_for():
    """After a loss it goes on as before, though no end of what was outstanding ever comes."""
    share = HeadShare(2)
    for _ in range(8):
        share.at_first()
    share.forget()
    turns = []
    for index in range(8, 20):
        turns.append(share.at_first())
        share.took(index, 0, 1.0)
        share.took(index, 1, 1.0 + (not turns[-1]))
        if turns[-1]:
            share.headed(1.0)
    assert sum(turns) == pytest.approx(len(turns) / 2, abs=1)


def test_what_is_told_in_another_order_counts_alike_and_nothing_piles_up():
    def turns(order):
        share = HeadShare(2)
        share.headed(2.0)
        for index in range(50):
            for stage in order:
                share.took(index, stage, (9.0, 3.0)[stage])
        assert not share._one_s
        return [share.at_first() for _ in range(4)]

    assert turns((0, 1)) == turns((1, 0)) == [False] * 4
