"""Sampling against a plain float64 reference, and as statistics over many draws.

Every draw is a pure function of (seed, index), so these statistics are the same in every run.
"""

import math
from array import array
from collections import Counter
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeserve.sampling_params import DrawParams
from pipeserve.stages import sampling
from pipeserve.stages.sampling import SampleRow, sample, score, uniform_draw

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 50


PARAMS = {item.name for item in fields(DrawParams)}


def row(**options):
    """Options of `DrawParams` and fields of `SampleRow`."""
    params = {name: value for name, value in options.items() if name in PARAMS}
    others = {name: value for name, value in options.items() if name not in PARAMS}
    return SampleRow(DrawParams(**{"seed": 7, **params}), **{"output_index": 0, **others})


def banning(*banned):
    """Options by which these ids are not drawn at any place in the output."""
    return {"stop_ids": banned, "min_tokens": 10**6}


def ruled(logits_V, one):
    for rule in sampling._RULES:
        logits_V = rule(logits_V, one)
    return logits_V


def tokens(logits, rows):
    return [token for token, _ in sample(logits, rows)]


def draws(logits_V, count, **options):
    """Output tokens 0 .. count - 1 of one request whose logits never change."""
    rows = [row(output_index=i, **options) for i in range(count)]
    return tokens(logits_V.expand(count, -1), rows)


def reference_distribution(logits, temperature, top_k, top_p, min_p=0.0, banned=()):
    """[(token, probability)] in plain Python, in the order in which a draw walks through them."""
    allowed = [i for i in range(len(logits)) if i not in banned]
    top = max(logits[i] for i in allowed)
    weights = {i: math.exp((logits[i] - top) / temperature) for i in allowed}
    allowed = [i for i in allowed if weights[i] >= min_p]  # the likeliest one weighs 1
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


def reference_logits(logits, one):
    """What vLLM's rules make of a row, each by its definition, in vLLM's order. Plain Python."""
    rules, known = one.params, list(one.known_ids)
    prompt, outputs = known[: one.num_prompt_tokens], known[one.num_prompt_tokens :]
    is_early = one.output_index < rules.min_tokens
    changed = [float(value) for value in logits]
    for token in range(len(changed)):
        if rules.allowed_token_ids is not None and token not in rules.allowed_token_ids:
            changed[token] = -math.inf
        if is_early and token in one.stop_ids:
            changed[token] = -math.inf
        for *before, last in one.bad_word_ids:
            began = outputs[len(outputs) - len(before) :] if len(before) <= len(outputs) else None
            if last == token and began == before:
                changed[token] = -math.inf
        changed[token] += (rules.logit_bias or {}).get(token, 0.0)
        if token in prompt or token in outputs:
            positive = changed[token] > 0
            factor = 1 / rules.repetition_penalty if positive else rules.repetition_penalty
            changed[token] *= factor
        changed[token] -= rules.frequency_penalty * outputs.count(token)
        changed[token] -= rules.presence_penalty * (token in outputs)
    return changed


FILTERS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 5, VOCAB, VOCAB + 9)
    for top_p, min_p in ((1e-9, 0.0), (0.4, 0.0), (0.9, 0.0), (1.0, 0.0), (0.9, 0.05), (1.0, 0.3))
]


@pytest.mark.parametrize("options", FILTERS, ids=lambda o: "-".join(map(str, o.values())))
def test_each_draw_is_the_inverse_of_the_filtered_distribution(options):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(60, VOCAB, generator=generator) * 2
    rows = [row(seed=i, output_index=3 * i, **options) for i in range(len(logits))]
    for logits_V, one, got in zip(logits, rows, tokens(logits, rows), strict=True):
        draw, reached = uniform_draw(one.params.seed, one.output_index), 0.0
        for token, probability in reference_distribution(logits_V.tolist(), **options):
            reached += probability
            if reached > draw:
                assert got == token
                break
        assert reached > draw


def many_draws(logits_V, count, **options):
    """What `draws` gives, as counts. The weights that the draws choose from are the same for each,
    so they are made once; that they are those of `sample` is checked on the first 300."""
    one = row(**options)
    weights, ids = sampling._filtered(ruled(logits_V, one), one.params)
    cumulative = weights.cumsum(-1)
    shares = torch.tensor(
        [uniform_draw(one.params.seed, i) for i in range(count)], dtype=torch.float64
    )
    places = torch.searchsorted(cumulative, shares * cumulative[-1], right=True)
    got = (places if ids is None else ids[places]).tolist()
    assert got[:300] == draws(logits_V, 300, **options)
    return Counter(got)


HISTORY = {"known_ids": array("i", [1, 2, 2, 5, 9, 2, 9, 9, 4]), "num_prompt_tokens": 4}
RULES = {
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.4},
    "bias": {"logit_bias": {3: 1.5, 9: -2.0}},
    "bad words": {"bad_word_ids": ((7,), (9, 4, 6), (4, 8), (9, 3))},
    "allowed": {"allowed_token_ids": array("i", [2, 4, 9, 11, 12])},
    "all": {
        "repetition_penalty": 0.7,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.2,
        "logit_bias": {2: 1.0, 15: 3.0},
        "bad_word_ids": ((4, 2),),
        "allowed_token_ids": [2, 4, 5, 8, 9, 10, 11, 15],
    },
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
        *({**HISTORY, **rules} for rules in RULES.values()),
        {**HISTORY, **RULES["all"], "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda options: "-".join(options),
)
def test_frequencies_are_the_probabilities(options):
    """Pearson's chi-squared over 100,000 draws."""
    logits_V = torch.randn(16, generator=torch.Generator().manual_seed(2))
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    wanted = {name: wanted[name] for name in wanted if name in FILTERS[0]}
    kept = reference_distribution(reference_logits(logits_V.tolist(), row(**options)), **wanted)
    kept = [(token, probability) for token, probability in kept if probability > 0]
    num_draws = 100_000
    got = many_draws(logits_V, num_draws, seed=5, **options)
    assert set(got) == {token for token, _ in kept}
    assert chi_squared_is_plausible(
        [got[token] for token, _ in kept], [num_draws * p for _, p in kept]
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
    rows = [row(seed=i, logprobs=i % 3, **options) for i, options in enumerate(FILTERS)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert together[::-1] == sample(logits.flip(0), rows[::-1])


def test_it_leaves_the_logits_alone():
    logits = torch.randn(len(FILTERS), VOCAB)
    before = logits.clone()
    for changes in ({}, *RULES.values()):
        changes = {**banning(1, 2), **HISTORY, **changes, "logprobs": 2}
        sample(logits, [row(**changes, **options) for options in FILTERS])
        score(logits, [3] * len(logits), 2)
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
    options = {"temperature": temperature, "top_p": top_p, **banning(0, 4)}
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
        assert set(draws(logits_V, 1, **banning(0, 3), **options)) < {1, 2}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"logprobs": 2},
        banning(3),
        {"allowed_token_ids": [1, 2]},
    ],
)
def test_logits_of_a_broken_model_give_no_token(value, everywhere, options):
    """And its neighbours what they give alone."""
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    rows = [row(seed=1), row(**options), row(temperature=0)]
    expected = sample(logits, rows)
    logits[1, slice(None) if everywhere else 30] = value
    got = sample(logits, rows)
    assert (got[0], got[2]) == (expected[0], expected[2])
    if everywhere or value != -torch.inf:
        assert got[1] == (None, None)
    else:  # a token that is impossible is none that is broken
        assert got[1][0] in range(VOCAB)


def test_rules_that_leave_no_finite_logit_give_no_token():
    huge = {"repetition_penalty": 1e-308, "known_ids": [4], "num_prompt_tokens": 1}
    logits = torch.full((1, VOCAB), 5.0)
    for temperature in (0, 1.0):
        assert sample(logits, [row(temperature=temperature, **huge)]) == [(None, None)]


def test_banned_ids_beyond_the_vocabulary_ban_nothing():
    """Some checkpoints name an eos that is no token, or -1."""
    logits = torch.zeros(1, VOCAB)
    logits[0, VOCAB - 1] = 1.0
    banned = row(temperature=0, **banning(VOCAB, -1, 2**40))
    assert tokens(logits, [banned]) == [VOCAB - 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_of_a_broken_row_are_nan(value):
    logits = torch.zeros(3, VOCAB)
    logits[1] = value
    owns = [own for own, _ in score(logits, [1, 2, 3], 60)]
    assert [math.isnan(own) for own in owns] == [False, True, False]


def test_logprobs_are_those_of_the_raw_logits():
    """Whatever the filters are, and of a banned id too."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5)) * 5
    expected = torch.log_softmax(logits.double(), -1)
    best = int(logits[1].argmax())
    rows = [
        row(logprobs=0, temperature=0.2),
        row(logprobs=4, temperature=1.5, top_k=3, **banning(best)),
        row(logprobs=None),
    ]
    got = sample(logits, rows)
    assert got[2][1] is None
    assert got[0][1][1] == []
    for i in (0, 1):
        token, (logprob, _) = got[i]
        assert logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
    top = got[1][1][1]
    assert [token for token, _ in top] == expected[1].topk(4).indices.tolist()
    assert top[0][0] == best
    assert [p for _, p in top] == pytest.approx(expected[1].topk(4).values.tolist(), abs=1e-4)


def test_scores_of_given_tokens():
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(6)) * 3
    expected = torch.log_softmax(logits.double(), -1)
    given_ids = array("i", [4, 0, 49, 4, 7])
    got = score(logits, given_ids, 3)
    for i, (own, top) in enumerate(got):
        assert own == pytest.approx(expected[i, given_ids[i]].item(), abs=1e-4)
        assert [token for token, _ in top] == expected[i].topk(3).indices.tolist()
        assert [p for _, p in top] == pytest.approx(expected[i].topk(3).values.tolist(), abs=1e-4)


# ---- rules --------------------------------------------------------------------------------------

ids = st.integers(0, 11)
penalties = st.sampled_from([-2.0, -0.3, 0.0, 0.0, 0.7, 2.0])


@st.composite
def ruled_rows(draw):
    """Twelve tokens, so that prompt, output, words and bans meet all the time."""
    known = draw(st.lists(ids, min_size=1, max_size=14))
    return row(
        repetition_penalty=draw(st.sampled_from([0.2, 1.0, 1.0, 1.5, 4.0])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=draw(st.none() | st.dictionaries(ids, st.floats(-100, 100), max_size=4)),
        bad_word_ids=draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=5)),
        allowed_token_ids=draw(st.none() | st.lists(ids, min_size=1, unique=True)),
        stop_ids=draw(st.lists(ids, max_size=3)),
        min_tokens=draw(st.sampled_from([0, 3, 4])),
        output_index=3,
        known_ids=array("i", known),
        num_prompt_tokens=draw(st.integers(1, len(known))),
        temperature=0,
    )


@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(one=ruled_rows(), seed=st.integers(0, 2**32))
def test_rules_change_the_logits_as_their_definitions_say(one, seed):
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 3
    expected = reference_logits(logits_V.tolist(), one)
    if max(expected) == -math.inf:
        return  # bans that leave nothing: the next test
    got = ruled(logits_V, one)
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    assert tokens(logits_V[None], [one]) == [int(got.argmax())]


def test_bans_that_leave_nothing_give_way_to_allowed_ids():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(7))
    rules = {"allowed_token_ids": [3, 4], "bad_word_ids": ((3,), (4,))}
    for temperature in (0, 1.0):
        for index in range(50):
            one = row(temperature=temperature, output_index=index, **rules)
            assert tokens(logits, [one])[0] in (3, 4)
    everything = row(**banning(*range(VOCAB)), temperature=0)
    assert tokens(logits, [everything]) == logits.argmax(-1).tolist()


def test_stop_ids_are_banned_until_there_are_min_tokens():
    logits = torch.zeros(3, VOCAB)
    logits[:, 8] = 1.0
    rows = [row(temperature=0, stop_ids=(8,), min_tokens=2, output_index=i) for i in range(3)]
    assert tokens(logits, rows) == [0, 0, 8]


def test_a_bad_word_is_one_only_within_the_output():
    """As in vLLM: what the prompt began, the output may finish."""
    logits_V = torch.zeros(VOCAB)
    logits_V[8] = 9.0

    def drawn(known, num_prompt):
        one = row(bad_word_ids=((6, 7, 8),), known_ids=known, num_prompt_tokens=num_prompt,
                  temperature=0)  # fmt: skip
        return tokens(logits_V[None], [one])[0]

    assert drawn([1, 6, 7], 1) == 0
    assert drawn([1, 6, 7], 2) == 8
    assert drawn([6, 7], 2) == 8
    assert drawn([1, 7, 6], 1) == 8


def test_penalties_of_thousands_of_tokens_are_exact():
    known = array("i", [i * i % VOCAB for i in range(5000)])
    one = row(frequency_penalty=0.01, presence_penalty=0.5, repetition_penalty=1.1,
              known_ids=known, num_prompt_tokens=1234)  # fmt: skip
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(8))
    got = ruled(logits_V, one).tolist()
    assert got == pytest.approx(reference_logits(logits_V.tolist(), one), abs=1e-9)


# ---- top-p over a large vocabulary --------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
def test_top_p_of_a_large_vocabulary_keeps_what_a_whole_sort_would(top_p, scale):
    """Whether the nucleus is among the few that are looked at first, or most of 20,000."""
    generator = torch.Generator().manual_seed(int(scale * 10))
    logits_V = torch.randn(20_000, generator=generator) * scale
    one = row(top_p=top_p)
    weights, kept_ids = sampling._filtered(logits_V, one.params)
    expected = reference_distribution(logits_V.tolist(), 1.0, 0, top_p)
    kept = int((weights > 0).sum())
    assert kept == len(expected)
    kept_logits = logits_V[kept_ids[:kept]].tolist()  # not ids: equal logits may change places
    assert kept_logits == [logits_V[token].item() for token, _ in expected]
    shares = weights[:kept] / weights.sum()
    assert shares.tolist() == pytest.approx([p for _, p in expected], rel=1e-9)
