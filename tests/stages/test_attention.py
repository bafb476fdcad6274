"""Every attention against the definition written out in float64, over a pool full of garbage."""

import random

import pytest
import torch
from attention_cases import ATTENTIONS, HEADS, TOLERANCE, Case

from pipeserve.errors import ConfigError
from pipeserve.stages.attention.scoring import Scoring, alibi_slopes
from pipeserve.stages.devices import make_backend

pytestmark = pytest.mark.usefixtures("one_thread")


def _random_spans(rng, num_chunks):
    spans = []
    for _ in range(num_chunks):
        start = rng.choice((0, 0, 1, 15, 16, rng.randrange(200)))
        spans.append((start, start + rng.choice((1, 1, 2, 5, 16, rng.randrange(1, 90)))))
    return spans


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(10))
def test_random_microbatches(name, dtype, seed):
    rng = random.Random(seed)
    spans = _random_spans(rng, rng.randint(1, 8))
    heads, block_size = rng.choice(HEADS), rng.choice((1, 4, 16, 48, 128))
    Case(spans, heads=heads, block_size=block_size, dtype=dtype).check(name)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 130, 10**6])
def test_a_sliding_window(name, window, dtype):
    """Chunks and decodes from well inside the window to far beyond it; garbage behind them."""
    spans = [(0, 1), (0, 90), (16, 17), (15, 16), (64, 65), (130, 200), (199, 200), (170, 175)]
    scoring = Scoring(8**-0.5, window=window)
    for block_size in (1, 16, 48):
        more = {"garbage": torch.nan, "turned": name == "kernels"}
        Case(spans, block_size=block_size, dtype=dtype, scoring=scoring, **more).check(name)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["scale", "softcap", "alibi", "softcap_window"])
def test_every_way_to_score(name, heads, kind):
    scoring = {
        "scale": Scoring(0.1),
        "softcap": Scoring(1.0, softcap=2.0),
        "alibi": Scoring(heads[2] ** -0.5, slopes_N=alibi_slopes(heads[0])),
        "softcap_window": Scoring(1.0, softcap=2.0, window=21),
    }[kind]
    spans = [(0, 1), (0, 90), (16, 17), (130, 200), (199, 200), (299, 300), (300, 309)]
    Case(spans, heads=heads, scoring=scoring).check(name)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("common", "limit"), [(60.0, 3e-2), (800.0, 1e-1)])
def test_large_scores_that_differ_by_little(name, dtype, common, limit):
    """Scores of 450 and of 80,000, as biases of Qwen 2 make them: rounded to 16 bits they are alike
    (transformers#33317), and the latter are no float16 (Qwen3#910)."""
    turned = name == "kernels"
    case = Case([(0, 90), (199, 200)], heads=(4, 2, 64), dtype=dtype, turned=turned, common=common)
    got, expected = case.run(name).double(), torch.cat(case.expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=limit)


def test_slopes_of_alibi():
    """As its paper gives them for 8 heads, and for 12."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
    )


@pytest.mark.parametrize("name", ["blocked", "gathered"])
@pytest.mark.parametrize("heads", HEADS)
def test_many_decodes_of_very_different_contexts(heads, name):
    """From one position to hundreds: some share a group, some stand alone."""
    contexts = [1, 700, 2, 350, 16, 17, 33, 32, 31, 340, 1, 64, 90, 8, 128, 690, 15, 3]
    Case([(n - 1, n) for n in contexts], heads=heads).check(name)


@pytest.mark.parametrize("window", [None, 70])
def test_more_than_is_gathered_at_a_time(window):
    """Of one chunk's queries, and of decodes."""
    spans = [(5, 600), (0, 257), *((n, n + 1) for n in range(1, 80, 2))]
    Case(spans, scoring=Scoring(8**-0.5, window=window)).check("gathered")


@pytest.mark.parametrize("prefix", [0, 1, 16, 37])
@pytest.mark.parametrize("query_len", [2, 63, 64, 65, 127, 128, 129])
def test_chunks_around_the_query_block(query_len, prefix):
    Case([(prefix, prefix + query_len)]).check("blocked")


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("garbage", [1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_other_requests_left_in_the_pool_does_not_leak(name, garbage, dtype):
    """Block 0 among it, tails of blocks that this microbatch begins, and whole blocks."""
    lengths = [(0, 1), (16, 17), (150, 151), (299, 300), (0, 5), (31, 40), (16, 90), (0, 32)]
    Case(lengths, garbage=garbage, dtype=dtype, turned=name == "kernels").check(name)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_broken_request_leaves_its_neighbours_alone(name):
    """NaN in one request, decode or chunk, spoils its own rows and no others."""
    case = Case([(40, 41), (44, 45), (3, 30), (5, 40)])
    case.q[1].fill_(torch.nan)
    case.k[1].fill_(torch.nan)
    case.v[3].fill_(torch.nan)
    got = case.run(name).split([1, 1, 27, 35])
    assert got[1].isnan().all()
    assert got[3].isnan().all()
    for i in (0, 2):
        torch.testing.assert_close(got[i].double(), case.expected[i], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_it_writes_only_its_own_layer_and_blocks(name):
    case = Case([(0, 20), (30, 31)], garbage=7.0)
    case.run(name)
    assert (case.kv.keys_LKBPH[0] == 7.0).all()
    assert (case.kv.values_LKBPH[0] == -7.0).all()
    assert (case.kv.keys_LKBPH[1][:, case.spare_blocks] == 7.0).all()
    assert (case.kv.values_LKBPH[1][:, case.spare_blocks] == -7.0).all()


def test_an_attention_that_the_device_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"'flash' of cpu is not one of auto, cpu, reference"):
        make_backend("cpu", "flash")
    with pytest.raises(ConfigError, match=r"'cpu' of cuda is not one of auto, reference"):
        make_backend("cuda", "cpu")
