"""Attention by the C kernels: what it promises beyond the others, with every library."""

import random
from itertools import pairwise

import pytest
import torch
from attention_cases import TOLERANCE, Case, config_of

from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.attention.scoring import Scoring, alibi_slopes
from pipeserve.stages.backends.cpu import kernel_attention, library
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=library.usable_libraries())
def each_library(request, monkeypatch):
    monkeypatch.setattr(kernel_attention, "kernels", lambda: library.load(request.param))


SIZES = [
    *(
        (5, 1, 7),
        (3, 1, 32),
        (6, 2, 40),
        (4, 1, 112),
        (2, 1, 512),
    ),  # vllm#302 1455 22193 31968 39065
    # vllm#336, flash-attention#1542, FasterTransformer#89; groups of 6, 12: ik_llama.cpp#1521, #217
    *((4, 1, 100), (8, 2, 72), (5, 5, 80), (12, 2, 64), (24, 2, 32)),
    *((1, 1, 16), (16, 1, 48), (10, 2, 80), (12, 4, 96), (14, 2, 128), (8, 1, 256), (71, 1, 64)),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", SIZES)
def test_kernels_for_every_size_of_head(each_library, heads, dtype):
    """Up to 2,000 positions, as layers score them, in blocks of every kind."""
    rng = random.Random(sum(heads))
    spans = [(n - 1, n) for n in (1, 64, 65, rng.randrange(100, 2000))]
    spans += [(0, 70), (rng.randrange(300), rng.randrange(300, 400))]
    for block_size, turned in ((16, True), (40, True), (16, False)):
        scoring = rng.choice(
            (
                Scoring(heads[2] ** -0.5),
                Scoring(heads[2] ** -0.5, window=rng.choice((1, 30, 64, 130))),
                Scoring(heads[2] ** -0.5, softcap=2.0, window=100),
                Scoring(heads[2] ** -0.5, slopes_N=alibi_slopes(heads[0])),
            )
        )
        sizes = {"heads": heads, "block_size": block_size, "turned": turned, "dtype": dtype}
        Case(spans, scoring=scoring, garbage=torch.nan, **sizes).check("kernels")


def parts_of(case, cuts):
    """The case's only chunk as several microbatches, over what they leave in the pool."""
    (q,), (k,), (v,) = case.q, case.k, case.v
    table = case.inputs.chunks[0].blocks
    out = []
    for start, stop in pairwise(cuts):
        chunk = (start, stop, table[: -(-stop // case.kv.block_size)], 0)
        case.inputs = build_inputs([chunk], case.kv.block_size, None)
        case.q, case.k, case.v = [q[start:stop]], [k[start:stop]], [v[start:stop]]
        out.append(case.run("kernels"))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "scoring", [Scoring(0.1), Scoring(0.1, window=70), Scoring(1, softcap=3.0)]
)
def test_kernels_give_a_row_the_same_bits_wherever_it_stands(each_library, scoring, dtype):
    """A prompt at once, in any chunks, and its last tokens one by one as decodes."""
    options = {"heads": (9, 3, 64), "scoring": scoring, "dtype": dtype, "turned": True}
    whole = Case([(0, 200)], **options).run("kernels")
    for cuts in ([0, 1, 2, 67, 130, 199, 200], [0, 64, 128, *range(150, 201)]):
        assert torch.equal(parts_of(Case([(0, 200)], **options), cuts), whole)


def test_kernels_give_a_row_the_same_bits_in_any_batch(each_library):
    spans = [(299, 300), (0, 33), (63, 64), (100, 180), (15, 16), (500, 501)]
    case = Case(spans, heads=(8, 2, 64), turned=True)
    together = case.run("kernels").split([len(q) for q in case.q])
    for i, span in enumerate(spans):
        alone = Case(spans, heads=(8, 2, 64), turned=True)
        chunk = (*span, case.inputs.chunks[i].blocks, 0)
        alone.inputs = build_inputs([chunk], case.kv.block_size, None)
        alone.q, alone.k, alone.v = [case.q[i]], [case.k[i]], [case.v[i]]
        assert torch.equal(alone.run("kernels"), together[i])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("turned", [True, False])
def test_kernels_keep_what_is_not_finite_from_earlier_rows(each_library, side, bad, turned):
    case = Case([(10, 100), (3, 4)], heads=(4, 2, 64), turned=turned)
    getattr(case, side)[0][60] = bad
    got = case.run("kernels")
    expected = torch.cat(case.expected)
    torch.testing.assert_close(got[:60].double(), expected[:60], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got[90:].double(), expected[90:], rtol=2e-6, atol=2e-6)
    assert not got[60:90].isfinite().all(-1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_keep_what_is_not_finite_from_rows_whose_window_is_past_it(
    each_library, side, bad, dtype
):
    """Beside rows that see it, in a tile that all of them see the end of; and as decodes."""
    options = {"heads": (4, 2, 64), "scoring": Scoring(0.1, window=100), "turned": True}
    expected = Case([(0, 200)], **options, dtype=dtype).run("kernels")
    for cuts in ([0, 200], [0, *range(105, 121), 200]):
        case = Case([(0, 200)], **options, dtype=dtype)
        getattr(case, side)[0][10] = bad
        got = parts_of(case, cuts)
        assert torch.equal(got[:10], expected[:10]) and torch.equal(got[110:], expected[110:])
        assert not got[10:110].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("turned", [True, False])
def test_kernels_round_what_they_write_as_torch_does(each_library, dtype, turned):
    case = Case([(0, 50), (20, 21)], heads=(4, 2, 24), dtype=dtype, turned=turned)
    case.k, case.v = ([torch.randn(x.shape) * 1e3 for x in side] for side in (case.k, case.v))
    case.k[0][3, 1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42])
    half_ways = [1 + odd * 2.0**-bits for bits in (8, 11) for odd in (1, 3)]  # bfloat16, float16
    case.k[0][4, 1, :4] = torch.tensor(half_ways)
    case.run("kernels")
    for side, new in zip(case.kv.layer(1), (case.k, case.v), strict=True):
        written = side.flatten(1, 2)[:, case.inputs.slots_T].transpose(0, 1)
        assert torch.equal(written.nan_to_num(7), torch.cat(new).to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_keep_scores_of_any_size(each_library, dtype):
    """Where others had NaN (pytorch#121558: inputs of 133,120) or 0 (flashinfer#4401: all scores
    below -50,000). Equal scores weigh all values alike."""
    for size, sign in ((2.0**15, 1), (2.0**15, -1), (300.0, -1)):
        case = Case([(0, 90), (40, 41)], heads=(3, 1, 64), turned=True, dtype=dtype)
        case.q = [torch.full_like(q, size) for q in case.q]
        case.k = [torch.full_like(k, sign * size) for k in case.k]
        case.v = [torch.full_like(v, 3.0) for v in case.v]
        for side, value in zip(case.kv.layer(1), (sign * size, 3.0), strict=True):
            side[:] = value
        assert torch.equal(case.run("kernels"), torch.full((91, 3, 64), 3.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_pass_a_query_that_is_no_number_on(each_library, dtype):
    """pytorch#141128: zeros came of it; and its neighbours have nothing to do with it."""
    case = Case([(0, 90), (40, 41)], heads=(3, 1, 64), turned=True, dtype=dtype)
    expected = case.run("kernels")
    case.q[0][50, 1, 3] = torch.nan
    got = case.run("kernels")
    assert got[50, 1].isnan().all()
    got = got.clone()
    got[50, 1] = expected[50, 1]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("heads", [(4, 2, 48), (5, 1, 7)])
def test_kernels_read_nothing_that_was_not_written(each_library, monkeypatch, heads):
    """tensorflow#61510, vllm's and others' NaN that come and go; pytorch#127055: windows that leave
    whole tiles unseen."""
    real = torch.empty
    for dtype in TOLERANCE:
        case = Case(
            [(0, 200), (299, 300)],
            heads=heads,
            scoring=Scoring(0.1, window=70),
            turned=True,
            dtype=dtype,
        )
        expected = case.run("kernels")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(torch.nan))
            assert torch.equal(case.run("kernels"), expected)


def test_blocks_beyond_what_32_bits_count(each_library):
    """Numbers of K, more than 2**31 of them, of which few are ever used (vllm#50427, aiter#4474,
    vllm-xpu-kernels#445: offsets wrapped around, and other memory was read)."""
    backend, num_blocks = KernelBackend(), (1 << 31) // (2 * 256 * 16) + 4
    sizes = {"num_layers": 1, "num_blocks": num_blocks, "block_size": 16, "dtype": torch.float16}
    try:
        kv = backend.make_kv(config_of(2, 2, 256), **sizes)
    except OSError:
        pytest.skip("a machine of little memory")
    assert kv.keys_LKBPH.numel() > 1 << 31
    torch.manual_seed(0)
    drawn = torch.randn(20, 6, 256)

    def attended(table):
        inputs = build_inputs([(0, 20, table, 1)], 16, None)
        plan = backend.prepare_attention(inputs, kv, {None})
        q = backend.place_heads(drawn.clone(), 2, None, None, kv.layer(0), inputs)
        return backend.attend(q, kv.layer(0), plan, Scoring(0.1))

    assert torch.equal(attended([1, 2]), attended([num_blocks - 1, num_blocks - 2]))
