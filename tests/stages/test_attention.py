"""Every attention against the definition written out in float64, over a pool full of garbage."""

import random
from itertools import pairwise

import pytest
import torch

from pipeserve.errors import ConfigError
from pipeserve.stages.attention import kernel_attention
from pipeserve.stages.attention.attention import make_attention
from pipeserve.stages.attention.inputs import build_inputs
from pipeserve.stages.attention.kv import KVCache
from pipeserve.stages.attention.scoring import Scoring, alibi_slopes
from pipeserve.stages.backends.cpu import library
from pipeserve.stages.config.model_config import ModelConfig

FAST = ["cpu", "kernels"] if library.kernels() else ["cpu"]
NAMES = [*FAST, "reference"]
pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""For outputs of size 1: some units in the last place of each dtype."""
HEADS = [(6, 2, 8), (4, 4, 16), (3, 1, 64), (9, 3, 24)]
"""(query heads, kv heads, head size)."""


class Case:
    """Chunks of random q, k and v, with the K and V of what came before them in the pool."""

    def __init__(
        self,
        spans,
        *,
        heads=(6, 2, 8),
        block_size=16,
        dtype=torch.float32,
        garbage=0.0,
        scoring=None,
        turned=False,
    ):
        self.scoring = scoring or Scoring(heads[2] ** -0.5)
        num_heads, num_kv_heads, head_dim = heads
        rng = random.Random(len(spans))
        counts = [-(-stop // block_size) for _, stop in spans]
        num_blocks = sum(counts) + 3
        free = rng.sample(range(1, num_blocks), num_blocks - 1)
        tables = [[free.pop() for _ in range(count)] for count in counts]
        self.spare_blocks = torch.tensor([0, *free])
        self.kv = KVCache(
            _config(*heads),
            num_layers=2,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            turned=turned,
        )
        self.kv.keys_LKBPH.fill_(garbage)
        self.kv.values_LKBPH.fill_(-garbage)
        chunks = [(*span, table, 0) for span, table in zip(spans, tables, strict=True)]
        self.inputs = build_inputs(chunks, block_size, None)
        torch.manual_seed(0)
        self.q, self.k, self.v, self.expected = [], [], [], []
        for (start, stop), table in zip(spans, tables, strict=True):
            q = torch.randn(stop - start, num_heads, head_dim).to(dtype)
            k, v = torch.randn(2, stop, num_kv_heads, head_dim).to(dtype)
            self._fill(table, block_size, k[:start], v[:start])
            self.q.append(q)
            self.k.append(k[start:])
            self.v.append(v[start:])
            self.expected.append(_attention(q, k, v, self.scoring))

    def _fill(self, table, block_size, k, v):
        """What earlier microbatches would have written, first positions of blocks first."""
        for number in range(-(-len(k) // block_size)):
            part = slice(number * block_size, (number + 1) * block_size)
            for side, new in zip(self.kv.layer(1), (k[part], v[part]), strict=True):
                side[:, table[number]] = 0  # as the microbatch that began the block leaves it
                side[:, table[number], : len(new)] = new.transpose(0, 1)

    def run(self, name):
        attention = make_attention(name)
        with torch.inference_mode():
            plan = attention.prepare(self.inputs, self.kv, {self.scoring.window})
            q, k, v = (torch.cat(parts) for parts in (self.q, self.k, self.v))
            return attention(q, k, v, self.kv.layer(1), plan, self.scoring)

    def check(self, name):
        got = self.run(name)
        limit = TOLERANCE[got.dtype]
        torch.testing.assert_close(got.double(), torch.cat(self.expected), rtol=limit, atol=limit)


def _attention(q_TNH, k_CKH, v_CKH, scoring):
    """The definition, for the last T of C positions: float64 [T, N, H]."""
    group = q_TNH.shape[1] // k_CKH.shape[1]
    q, k, v = q_TNH.double(), k_CKH.double(), v_CKH.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("tnh,cnh->ntc", q, k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    if scoring.slopes_N is not None:
        bias_NC = scoring.slopes_N.bfloat16()[:, None] * torch.arange(len(k))
        scores = scores + bias_NC.double()[:, None] * scoring.scale
    distance_TC = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    is_hidden = distance_TC < 0
    if scoring.window is not None:
        is_hidden |= distance_TC >= scoring.window
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    return torch.einsum("ntc,cnh->tnh", weights, v)


def _config(num_heads, num_kv_heads, head_dim):
    return ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=num_heads * head_dim,
        intermediate_size=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=1,
        max_position_embeddings=1,
        norm_eps=1.0,
        activation="silu",
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(),
    )


def _random_spans(rng, num_chunks):
    spans = []
    for _ in range(num_chunks):
        start = rng.choice((0, 0, 1, 15, 16, rng.randrange(200)))
        spans.append((start, start + rng.choice((1, 1, 2, 5, 16, rng.randrange(1, 90)))))
    return spans


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(10))
def test_random_microbatches(name, dtype, seed):
    rng = random.Random(seed)
    spans = _random_spans(rng, rng.randint(1, 8))
    heads, block_size = rng.choice(HEADS), rng.choice((1, 4, 16, 48, 128))
    Case(spans, heads=heads, block_size=block_size, dtype=dtype).check(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 130, 10**6])
def test_a_sliding_window(name, window, dtype):
    """Chunks and decodes from well inside the window to far beyond it; garbage behind them."""
    spans = [(0, 1), (0, 90), (16, 17), (15, 16), (64, 65), (130, 200), (199, 200), (170, 175)]
    scoring = Scoring(8**-0.5, window=window)
    for block_size in (1, 16, 48):
        more = {"garbage": torch.nan, "turned": name == "kernels"}
        Case(spans, block_size=block_size, dtype=dtype, scoring=scoring, **more).check(name)


@pytest.mark.parametrize("name", NAMES)
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


def test_slopes_of_alibi():
    """As its paper gives them for 8 heads, and for 12."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
    )


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("heads", HEADS)
def test_many_decodes_of_very_different_contexts(name, heads):
    """From one position to hundreds: some share a group, some stand alone."""
    contexts = [1, 700, 2, 350, 16, 17, 33, 32, 31, 340, 1, 64, 90, 8, 128, 690, 15, 3]
    Case([(n - 1, n) for n in contexts], heads=heads).check(name)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("prefix", [0, 1, 16, 37])
@pytest.mark.parametrize("query_len", [2, 63, 64, 65, 127, 128, 129])
def test_chunks_around_the_query_block(name, query_len, prefix):
    Case([(prefix, prefix + query_len)]).check(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_other_requests_left_in_the_pool_does_not_leak(name, garbage, dtype):
    """Block 0 among it, tails of blocks that this microbatch begins, and whole blocks."""
    lengths = [(0, 1), (16, 17), (150, 151), (299, 300), (0, 5), (31, 40), (16, 90), (0, 32)]
    Case(lengths, garbage=garbage, dtype=dtype, turned=name == "kernels").check(name)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_it_writes_only_its_own_layer_and_blocks(name):
    case = Case([(0, 20), (30, 31)], garbage=7.0)
    case.run(name)
    assert (case.kv.keys_LKBPH[0] == 7.0).all()
    assert (case.kv.values_LKBPH[0] == -7.0).all()
    assert (case.kv.keys_LKBPH[1][:, case.spare_blocks] == 7.0).all()
    assert (case.kv.values_LKBPH[1][:, case.spare_blocks] == -7.0).all()


def test_an_unknown_attention_is_refused():
    with pytest.raises(ConfigError, match=r"'flash' is not one of auto, cpu, kernels, reference"):
        make_attention("flash")


# ---- the C kernels ------------------------------------------------------------------------------


@pytest.fixture(params=library.usable_libraries())
def each_library(request, monkeypatch):
    monkeypatch.setattr(kernel_attention, "kernels", lambda: library.load(request.param))


SIZES = [(1, 1, 16), (16, 1, 48), (10, 2, 80), (12, 4, 96), (14, 2, 128), (8, 1, 256), (71, 1, 64)]


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
    table = case.inputs.block_tables[0].tolist()
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
        chunk = (*span, case.inputs.block_tables[i].tolist(), 0)
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("turned", [True, False])
def test_kernels_round_what_they_write_as_torch_does(each_library, dtype, turned):
    case = Case([(0, 50), (20, 21)], heads=(4, 2, 24), dtype=dtype, turned=turned)
    case.k, case.v = ([torch.randn(x.shape) * 1e3 for x in side] for side in (case.k, case.v))
    case.k[0][3, 1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42])
    case.run("kernels")
    for side, new in zip(case.kv.layer(1), (case.k, case.v), strict=True):
        written = side.flatten(1, 2)[:, case.inputs.slots_T].transpose(0, 1)
        assert torch.equal(written.nan_to_num(7), torch.cat(new).to(dtype).nan_to_num(7))
