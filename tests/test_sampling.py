"""Sampling against a plain float64 reference, and as statistics over many draws.

Every draw is a pure function of (seed, index), so these statistics are the same in every run.
"""

import math

import pytest
import torch

from pipeserve.stages import sampling
from pipeserve.stages.sampling import SampleRow, sample, uniform_draw

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 50


def row(**options):
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7, "output_index": 0}
    return SampleRow(**{**plain, **options})


def tokens(logits, rows):
    return [token for token, _, _ in sample(logits, rows)]


def draws(logits_V, count, **options):
    """Output tokens 0 .. count - 1 of one request whose logits never change."""
    rows = [row(output_index=i, **options) for i in range(count)]
    return tokens(logits_V.expand(count, -1), rows)


def reference_distribution(logits, temperature, top_k, top_p, banned=()):
    """[(token, probability)] in plain Python, in the order in which a draw walks through them."""
    allowed = [i for i in range(len(logits)) if i not in banned]
    top = max(logits[i] for i in allowed)
    weights = {i: math.exp((logits[i] - top) / temperature) for i in allowed}
    ranked = sorted(allowed, key=lambda i: -weights[i])
    if 0 < top_k < len(logits):
        ranked = ranked[:top_k]
    total = sum(weights[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    if top_p == 1 and not 0 < top_k < len(logits):
        kept = allowed
    total = sum(weights[i] for i in kept)
    return [(i, weights[i] / total) for i in kept]


def chi_squared_is_plausible(observed, expected):
    """Pearson's statistic within 4 standard deviations of its mean under the hypothesis."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(expected) - 1
    return abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


FILTERS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 5, VOCAB, VOCAB + 9)
    for top_p in (1e-9, 0.4, 0.9, 1.0)
]


@pytest.mark.parametrize("options", FILTERS, ids=lambda o: "-".join(map(str, o.values())))
def test_each_draw_is_the_inverse_of_the_filtered_distribution(options):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(60, VOCAB, generator=generator) * 2
    rows = [row(seed=i, output_index=3 * i, **options) for i in range(len(logits))]
    for logits_V, one, got in zip(logits, rows, tokens(logits, rows), strict=True):
        draw, reached = uniform_draw(one.seed, one.output_index), 0.0
        for token, probability in reference_distribution(logits_V.tolist(), **options):
            reached += probability
            if reached > draw:
                assert got == token
                break
        assert reached > draw


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}]
)
def test_frequencies_are_the_probabilities(options):
    logits_V = torch.randn(16, generator=torch.Generator().manual_seed(2))
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    kept = reference_distribution(logits_V.tolist(), **wanted)
    num_draws = 20_000
    got = draws(logits_V, num_draws, seed=5, **options)
    assert set(got) == {token for token, _ in kept}
    assert chi_squared_is_plausible(
        [got.count(token) for token, _ in kept], [num_draws * p for _, p in kept]
    )


@pytest.mark.parametrize(
    "pairs",
    [
        [(seed, 0) for seed in range(100_000)],
        [(3, index) for index in range(100_000)],
        [(seed, index) for seed in range(300) for index in range(300)],
    ],
    ids=["seeds", "indices", "both"],
)
def test_draws_are_uniform(pairs):
    bins = [0] * 200
    for seed, index in pairs:
        draw = uniform_draw(seed, index)
        assert 0 <= draw < 1
        bins[int(draw * len(bins))] += 1
    assert chi_squared_is_plausible(bins, [len(pairs) / len(bins)] * len(bins))


@pytest.mark.parametrize(
    ("other_seed", "shift"), [(0, 1), (0, 2), (1, 0), (1, 1), (1, -1), (2, 0), (2**32, 0)]
)
def test_neighbouring_draws_are_independent(other_seed, shift):
    """No correlation beyond 4 standard errors, and pairs fill the square evenly."""
    count, side = 20_000, 10
    pairs = [
        (uniform_draw(0, i + 1), uniform_draw(other_seed, i + 1 + shift)) for i in range(count)
    ]
    correlation = 12 * sum((a - 0.5) * (b - 0.5) for a, b in pairs) / count
    assert abs(correlation) < 4 / math.sqrt(count)
    cells = [0] * side**2
    for a, b in pairs:
        cells[int(a * side) * side + int(b * side)] += 1
    assert chi_squared_is_plausible(cells, [count / side**2] * side**2)


def test_seeds_use_all_of_their_bits():
    seeds = [0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**53, 2**53 + 1]
    assert len({uniform_draw(seed, 0) for seed in seeds}) == len(seeds)


def test_a_row_does_not_know_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(FILTERS), VOCAB, generator=generator)
    rows = [row(seed=i, num_logprobs=i % 3, **options) for i, options in enumerate(FILTERS)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together[::-1] == sample(logits.flip(0), rows[::-1])


def test_it_leaves_the_logits_alone():
    logits = torch.randn(len(FILTERS), VOCAB)
    before = logits.clone()
    sample(logits, [row(banned_ids=(1, 2), num_logprobs=2, **options) for options in FILTERS])
    assert torch.equal(logits, before)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.zeros(3, VOCAB)
    logits[0, 31] = 1.0
    logits[1, [9, 40]] = 2.0
    assert tokens(logits, [row(temperature=0)] * 3) == [31, 9, 0]


def test_ties_are_drawn_evenly():
    """Equal logits at the edge of top_k: as many tokens as asked for, each as often."""
    got = draws(torch.zeros(8), 8_000, top_k=4)
    kept = sorted(set(got))
    assert len(kept) == 4
    assert chi_squared_is_plausible([got.count(token) for token in kept], [2_000] * 4)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.2, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 4), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits_V = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()
    got = set(draws(logits_V, 400, top_p=top_p))
    assert len(got) == kept
    assert 1 in got
    assert kept < 2 or 3 in got


@pytest.mark.parametrize("temperature", [0, 1e-5, 1.0])
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_banned_ids_are_never_drawn(temperature, top_p):
    logits_V = torch.tensor([9.0, 2.0, 1.0, 1.0, 7.0, 1.0])
    options = {"temperature": temperature, "top_p": top_p, "banned_ids": (0, 4)}
    got = set(draws(logits_V, 300, **options))
    assert got == ({1, 2, 3, 5} if (temperature, top_p) == (1, 1) else {1})


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-320])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(4)) * 100
    rows = [row(seed=i, temperature=temperature) for i in range(40)]
    assert tokens(logits, rows) == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_uniform():
    got = draws(torch.linspace(-3, 3, 20), 10_000, temperature=1e5)
    assert chi_squared_is_plausible([got.count(token) for token in range(20)], [500] * 20)


def test_logits_of_minus_infinity_are_never_drawn():
    logits_V = torch.full((VOCAB,), -torch.inf)
    logits_V[[3, 30]] = 0.0
    for options in ({}, {"top_k": 10}, {"top_p": 0.99}):
        assert set(draws(logits_V, 200, **options)) == {3, 30}


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_outermost_draws_take_no_token_of_probability_0(monkeypatch, draw):
    monkeypatch.setattr(sampling, "uniform_draw", lambda seed, output_index: draw)
    logits_V = torch.tensor([0.0, 1.0, 0.5, 0.0])
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}):
        assert set(draws(logits_V, 1, banned_ids=(0, 3), **options)) < {1, 2}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_of_a_broken_model_still_give_a_token_id(value):
    logits = torch.full((1, VOCAB), value)
    for options in ({}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.5}):
        for index in range(20):
            (token,) = tokens(logits, [row(output_index=index, **options)])
            assert 0 <= token < VOCAB


def test_logprobs_are_those_of_the_raw_logits():
    """Whatever the filters are, and of a banned id too."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5)) * 5
    expected = torch.log_softmax(logits.double(), -1)
    best = int(logits[1].argmax())
    rows = [
        row(num_logprobs=0, temperature=0.2),
        row(num_logprobs=4, temperature=1.5, top_k=3, banned_ids=(best,)),
        row(num_logprobs=None),
    ]
    got = sample(logits, rows)
    assert got[2][1:] == (None, [])
    assert got[0][2] == []
    for i in (0, 1):
        token, logprob, _ = got[i]
        assert logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
    top = got[1][2]
    assert [token for token, _ in top] == expected[1].topk(4).indices.tolist()
    assert top[0][0] == best
    assert [p for _, p in top] == pytest.approx(expected[1].topk(4).values.tolist(), abs=1e-4)
