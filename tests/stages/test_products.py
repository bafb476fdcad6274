"""Products of the C kernels: near float64's, a row the same in every batch, 16 bits where exact."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeserve.stages.backends.cpu import elementwise, library, products
from pipeserve.stages.backends.cpu.kernel_backend import KernelBackend
from pipeserve.stages.backends.cpu.large_pages import Shelf
from pipeserve.stages.backends.cpu.products import (
    GatedWeight,
    PackedWeight,
    VocabularyWeight,
    narrowest_exact_dtype,
)
from pipeserve.stages.backends.cpu.scratch import scratch

SHAPES = [(1, 1), (7, 3), (33, 65), (64, 64), (100, 577), (129, 1030), (40, 2100)]
"""[out, in]; many rows of the last are added up in several parts of it."""
ROWS = [*range(1, 14), 25, 64, 241]
STORED = {
    "float32": lambda weight: weight,
    "float16": lambda weight: weight.half(),
    "bfloat16": lambda weight: weight.bfloat16(),
}


def made(dtype: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias and 513 rows."""
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    weight[0, 0] = 1 + 2.0**-10  # not exact in bfloat16
    weight = STORED[dtype](weight)
    return weight, torch.randn(shape[0]), torch.randn(513, shape[1])


@pytest.fixture(params=library.usable_libraries())
def kernels(request):
    return library.load(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", STORED)
def test_near_float64_and_a_row_does_not_depend_on_its_batch(kernels, dtype, shape):
    weight, bias, x = made(dtype, shape)
    padded = PackedWeight.padded(bias)
    packed = PackedWeight(weight, library=kernels)
    # A single number that float16 holds is held in it.
    assert str(packed.dtype) == f"torch.{dtype}" or shape == (1, 1)
    whole = packed.product(x, padded)
    exact = x.double() @ weight.double().T + bias.double()
    assert (whole.double() - exact).abs().max() < 1e-5
    for rows in ROWS:
        assert torch.equal(packed.product(x[:rows], padded), whole[:rows]), rows
        assert torch.equal(packed.product(x[-rows:], padded), whole[-rows:]), rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", STORED)
def test_some_outputs_are_those_of_the_whole(kernels, dtype, shape):
    """Wherever they begin and end in a panel."""
    weight, bias, x = made(dtype, shape)
    padded, size = PackedWeight.padded(bias, kernels), shape[0]
    for pairs in {False, dtype == "bfloat16" and bool(kernels.multiplies_pairs())}:
        packed = PackedWeight(weight, rounds_x=pairs, library=kernels)
        for num_rows in (0, 1, 25):
            whole = packed.product(x[:num_rows], padded)
            for start, stop in [(0, size), (0, size // 2), (size // 2, size), (size // 3, size)]:
                some = packed.product(x[:num_rows], padded, outputs=range(start, stop))
                assert torch.equal(some, whole[:, start:stop]), (num_rows, start, stop)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_of_bfloat16_with_sums_in_float32(shape):
    if "avx512_bf16" not in library.usable_libraries():
        pytest.skip("needs AVX512-bf16")
    weight, bias, x = made("bfloat16", shape)
    padded = PackedWeight.padded(bias)
    packed = PackedWeight(weight, rounds_x=True, library=library.load("avx512_bf16"))
    whole = packed.product(x, padded)
    exact = x.bfloat16().double() @ weight.double().T + bias.double()
    assert (whole.double() - exact).abs().max() < 1e-5
    for rows in ROWS:
        assert torch.equal(packed.product(x[:rows], padded), whole[:rows]), rows


@pytest.mark.parametrize("shape", [(33, 65), (100, 577)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_stays_in_its_row(kernels, shape, bad):
    """oneDNN#5717: at inputs that fill no whole register NaN went into other rows."""
    weight, _, x = made("bfloat16", shape)
    ways = [PackedWeight(weight, library=kernels).product]
    if kernels.multiplies_pairs():
        ways.append(PackedWeight(weight, rounds_x=True, library=kernels).product)
    gated = GatedWeight(weight[: len(weight) // 2 * 2], library=kernels)
    ways.append(lambda x: gated.gated(x, None, "silu"))
    for product in ways:
        expected = product(x[:40])
        worse = x[:40].clone()
        worse[7, -1] = worse[20, 0] = bad
        got = product(worse)
        others = [i for i in range(40) if i not in (7, 20)]
        assert torch.equal(got[others], expected[others])
        assert not torch.equal(got[[7, 20]], expected[[7, 20]])


def test_nothing_is_read_that_was_not_written(kernels):
    """tensorflow#61510: results that change from run to run."""
    weight, bias, x = made("float32", (100, 577))
    packed, gated = PackedWeight(weight, library=kernels), GatedWeight(weight, library=kernels)
    bias = PackedWeight.padded(bias, kernels)

    def results():
        return (
            *[packed.product(x[:rows], bias) for rows in (1, 5, 30, 241)],
            gated.gated(x, None, "relu"),
            *packed.likeliest(x),
        )

    expected = results()
    ctypes.memset(scratch.address, 0xFF, 4 * scratch.size)  # NaN
    assert all(map(torch.equal, results(), expected))


def test_numbers_too_small_to_be_normal(kernels):
    """pytorch#4737 and #67797 flush them to 0; a product in float32 keeps them."""
    weight = torch.full((32, 64), 2.0**-100)
    x = torch.full((3, 64), 2.0**-40)
    assert torch.equal(
        PackedWeight(weight, library=kernels).product(x), torch.full((3, 32), 2.0**-134)
    )


def test_pairs_are_refused_where_there_are_none(kernels):
    """amd/ZenDNN#29 handed them to a kernel of another type."""
    if kernels.multiplies_pairs():
        pytest.skip("has them")
    with pytest.raises(AssertionError):
        PackedWeight(torch.ones(8, 8).bfloat16(), rounds_x=True, library=kernels)


def test_added_to_what_is_there(kernels):
    weight, bias, x = made("float16", (100, 577))
    padded = PackedWeight.padded(bias)
    packed = PackedWeight(weight, library=kernels)
    residual = torch.randn(513, 100)
    kept = residual.clone()
    found = packed.product(x, padded, residual)
    assert torch.equal(found, residual + packed.product(x, padded))
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("shape", [(2, 3), (66, 64), (130, 577), (1024, 64), (40, 2100)])
@pytest.mark.parametrize("dtype", STORED)
def test_gated_in_one_product(kernels, dtype, shape, monkeypatch):
    """The bits of a product, an activation and a multiplication one after the other."""
    monkeypatch.setattr(elementwise, "kernels", lambda: kernels)
    weight, bias, x = made(dtype, shape)
    gate_up = PackedWeight(weight, library=kernels).product(x) + bias
    gate, up = gate_up.chunk(2, -1)
    expected = elementwise.activate(gate.contiguous(), "gelu") * up
    gated = GatedWeight(weight, library=kernels)
    padded = GatedWeight.padded(bias, kernels)
    for rows in (1, 2, 3, 16, 241):
        assert torch.equal(gated.gated(x[:rows], padded, "gelu"), expected[:rows]), rows


@pytest.mark.parametrize("shape", [(2, 3), (66, 64), (130, 577)])
@pytest.mark.parametrize("activation", ["silu", "gelu_new", "gelu", "relu"])
def test_gated_pairs_are_as_near_as_what_is_rounded_next(kernels, activation, shape, monkeypatch):
    """Also where gates are far from 0; a row does not depend on its batch."""
    if not kernels.multiplies_pairs():
        pytest.skip("has no pairs")
    monkeypatch.setattr(elementwise, "kernels", lambda: kernels)
    weight, bias, x = made("bfloat16", shape)
    x[5:10] *= torch.tensor([30.0, 100.0, 1e4, 1e18, 1e36])[:, None]
    gate_up = PackedWeight(weight, rounds_x=True, library=kernels).product(x) + bias
    gate, up = gate_up.chunk(2, -1)
    expected = elementwise.activate(gate.contiguous(), activation) * up
    gated = GatedWeight(weight, rounds_x=True, library=kernels)
    padded = GatedWeight.padded(bias, kernels)
    whole = gated.gated(x, padded, activation)
    assert torch.allclose(whole, expected, rtol=2e-4, atol=1e-7)
    for rows in (1, 2, 3, 16, 241):
        assert torch.equal(gated.gated(x[:rows], padded, activation), whole[:rows]), rows


@pytest.mark.parametrize("up", [1.0, 0.0, -3.0, torch.inf, torch.nan, 1e38])
@pytest.mark.parametrize("activation", ["silu", "gelu_new", "gelu", "relu"])
def test_every_gate_that_pairs_can_have(kernels, activation, up, monkeypatch):
    """All bfloat16 numbers, by the rough gate and the exact one: NaN and infinity at the same
    places, no sign turned, small negative results not lost (ds4#498, torch-xpu-ops#5230,
    tiny-llm#164; of results under 1e-30 the last ones are, as in tt-metal#55711)."""
    if not kernels.multiplies_pairs():
        pytest.skip("has no pairs")
    monkeypatch.setattr(elementwise, "kernels", lambda: kernels)
    gates = (torch.arange(65_536, dtype=torch.int32) << 16).view(torch.float32)
    weight = torch.cat((gates, torch.full_like(gates, up)))[:, None].bfloat16()
    one = torch.ones(1, 1)
    found = GatedWeight(weight, rounds_x=True, library=kernels).gated(one, None, activation)
    gate_up = PackedWeight(weight, rounds_x=True, library=kernels).product(one)
    gate, given = gate_up.chunk(2, -1)
    exact = elementwise.activate(gate.contiguous(), activation) * given
    assert torch.equal(found.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(found.isinf(), exact.isinf())
    assert torch.equal(found[finite].signbit(), exact[finite].signbit())
    assert torch.allclose(found[finite], exact[finite], rtol=2e-4, atol=1e-34)


both_kinds = pytest.mark.parametrize("kind", [PackedWeight, VocabularyWeight])


@pytest.mark.parametrize("shape", [*SHAPES, (5000, 64)])
@pytest.mark.parametrize("dtype", STORED)
@both_kinds
def test_the_likeliest_output_without_the_others(kernels, kind, dtype, shape):
    """The first of equals, as pytorch#10370, #22853 and #41998 wished."""
    weight, _, x = made(dtype, shape)
    weight[shape[0] // 2 :] = weight[: -(-shape[0] // 2)].clone()  # all twice: the first counts
    packed = kind(weight, library=kernels)
    x[3] = 0
    for rows in (1, 2, 3, 16, 241):
        highest, outputs = packed.likeliest(x[:rows])
        expected = packed.product(x[:rows]).max(-1)
        assert torch.equal(highest, expected.values) and torch.equal(outputs, expected.indices)
    for bad in (torch.nan, torch.inf, 3e38):
        x[1, 0] = bad
        assert packed.likeliest(x[:3]) is None or packed.product(x[:3]).isfinite().all()


@pytest.mark.parametrize("size", [1_668, 50_257, 151_669])
@both_kinds
def test_the_last_of_a_vocabulary_of_any_size(kernels, kind, size):
    """Of sizes that no panel divides (ik_llama.cpp#911, #230, marian-dev#107), all of it is looked
    through (1bit-MONSTER#253: the first 1,000)."""
    torch.manual_seed(0)
    weight = torch.randn(size, 24).half()
    weight[-1] = 4
    packed = kind(weight, library=kernels)
    x = torch.randn(3, 24)
    x[1] = 1
    highest, outputs = packed.likeliest(x)
    expected = packed.product(x).max(-1)
    assert torch.equal(highest, expected.values) and torch.equal(outputs, expected.indices)
    assert outputs[1] == size - 1 and highest[1] == 96


def test_several_threads_compute_at_once(kernels):
    """Each works in memory of its own (sglang#28992: threads shared what a kernel keeps of a shape,
    and a server ended after hours)."""
    torch.manual_seed(0)
    weight, xs = torch.randn(300, 130), [torch.randn(rows, 130) for rows in (1, 7, 40, 130)]
    packed = VocabularyWeight(weight, library=kernels)
    alone = [(packed.product(x), *packed.likeliest(x)) for x in xs]

    def differ(number):
        seen = []
        for place in (number + step for step in range(60)):
            x, expected = xs[place % 4], alone[place % 4]
            seen += map(torch.equal, (packed.product(x), *packed.likeliest(x)), expected)
        return not all(seen)

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(differ, range(4)))


@both_kinds
def test_the_likeliest_of_outputs_that_are_all_negative(kernels, kind):
    """What fills up the last panel is 0, and no output."""
    torch.manual_seed(0)
    packed = kind(-torch.rand(100, 64).bfloat16(), library=kernels)
    x = torch.rand(40, 64)
    highest, outputs = packed.likeliest(x)
    expected = packed.product(x).max(-1)
    assert torch.equal(highest, expected.values) and torch.equal(outputs, expected.indices)


@both_kinds
def test_outputs_that_rounding_of_x_would_swap(kernels, kind):
    """By pairs alone the other would be the highest: in bfloat16 the one number of x becomes 1, and
    the one that is little larger 1.0078."""
    low, high = 1 + 2.0**-8 - 2.0**-12, 1 + 2.0**-8 + 2.0**-12
    weight, x = torch.zeros(70, 64), torch.zeros(2, 64)
    for row, (first, other) in enumerate(((5, 40), (40, 5))):
        weight[first, 2 * row], weight[other, 2 * row + 1] = 1, 1 - 2.0**-8
        x[row, 2 * row], x[row, 2 * row + 1] = low, high
    rounded = x.bfloat16().float() @ weight.T
    assert rounded.argmax(-1).tolist() == [40, 5]
    highest, outputs = kind(weight, library=kernels).likeliest(x)
    assert outputs.tolist() == [5, 40] and highest.tolist() == [low, low]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12])
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1])
def test_the_likeliest_where_8_bits_hardly_tell(kernels, scale, spread):
    """Outputs and inputs of very different sizes (bitsandbytes' LLM.int8: few features outweigh all
    others), and outputs that are all but alike."""
    torch.manual_seed(0)
    weight = torch.randn(1, 200) + spread * torch.randn(300, 200)
    weight[::7] *= 1e-3
    x = torch.randn(20, 200) * scale
    x[:, [3, 150]] *= 100
    packed = VocabularyWeight(weight, library=kernels)
    highest, outputs = packed.likeliest(x)
    expected = packed.product(x).max(-1)
    assert torch.equal(highest, expected.values) and torch.equal(outputs, expected.indices)


def hadamard_matrix():
    """Of 64 rows, as inputs are mixed by it."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat(
            (torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))
        )
    return hadamard


def test_a_vocabulary_in_bfloat16_does_not_round_x():
    """8 bits bound the product with x as it is. Here they lose nothing, and bfloat16 does: equal
    outputs would come apart by more than the bounds allow for."""
    if library.kernels() is None:
        pytest.skip("no kernels")
    hadamard = hadamard_matrix()
    weight = KernelBackend().place_vocabulary(hadamard.repeat_interleave(32, 0).bfloat16())
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = torch.randint(-100, 100, (1, 64)).float()
        mixed[0, :8] = 127  # the highest outputs
        x = mixed @ hadamard / 8
        highest, outputs = weight.likeliest(x)
        expected = weight.product(x).max(-1)
        assert torch.equal(highest, expected.values) and torch.equal(outputs, expected.indices)


def test_outputs_that_8_bits_of_x_would_swap(kernels):
    """Weights are exact in them, once mixed. Of x 0.6 and 1.4 become 1, for the sake of -127."""
    hadamard = hadamard_matrix()
    weight, x = torch.zeros(70, 64), torch.zeros(1, 64)
    weight[5, :2], weight[60, 2] = 1, 1
    x[0, 0] = x[0, 1] = 0.6
    x[0, 2], x[0, 9] = 1.4, -127
    packed = VocabularyWeight(weight @ hadamard / 8, library=kernels)
    highest, outputs = packed.likeliest(x @ hadamard / 8)
    assert outputs.tolist() == [60] and highest.item() == pytest.approx(1.4, abs=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_weights_of_a_vocabulary_that_are_not_finite(kernels, bad):
    weight = torch.randn(70, 64)
    weight[40, 5] = bad
    packed, x = VocabularyWeight(weight, library=kernels), torch.randn(3, 64)
    found, expected = packed.likeliest(x), packed.product(x).max(-1)
    assert found is None or all(map(torch.equal, found, expected))
    assert found is None or bad == 3e38


def test_rows_may_be_cut_out_of_wider_ones(kernels):
    """Of x and of what the product is added to; what lies beside them is not read."""
    weight, _, x = made("float32", (100, 577))
    packed = PackedWeight(weight, library=kernels)
    residual = torch.randn(513, 100)
    wide_x, wide_residual = torch.full((513, 600), torch.nan), torch.full((513, 120), torch.nan)
    wide_x[:, 10:587], wide_residual[:, 5:105] = x, residual
    found = packed.product(wide_x[:, 10:587], onto_TN=wide_residual[:, 5:105])
    assert torch.equal(found, residual + packed.product(x))


class WornShelf(Shelf):
    """Its memory was used before."""

    def take(self, num_bytes):
        return super().take(num_bytes).fill_(255)


def numbers_in(packed, kernels):
    """What lies there, as rows of float32: [outputs and what fills the last panel, inputs and
    what fills the last step]."""
    panel = kernels.panel_outputs()
    flat = packed.packed.view(packed.dtype).float()
    if packed.dtype == torch.bfloat16:  # two inputs of an output side by side
        rows = flat.view(-1, (packed.in_features + 1) // 2, panel, 2).permute(0, 2, 1, 3)
    else:
        rows = flat.view(-1, (packed.in_features + 1) // 2 * 2, panel).transpose(1, 2)
    return rows.flatten(0, 1).flatten(1)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 31), (48, 130)])
@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("exact_in", STORED)
def test_every_number_lies_where_it_should_bit_for_bit(
    kernels, monkeypatch, given, exact_in, shape
):
    """Of each type that a weight is given in, kept in each; with zeros behind the last output and
    the last input."""
    monkeypatch.setattr(products, "_shelf", WornShelf())
    weight, _, _ = made(exact_in, shape)
    weight = weight.to(getattr(torch, given))
    packed = PackedWeight(weight, library=kernels)
    assert packed.dtype == narrowest_exact_dtype(weight, kernels)
    rows = numbers_in(packed, kernels)
    assert torch.equal(rows[: shape[0], : shape[1]], weight.float())
    assert not rows[shape[0] :].any() and not rows[:, shape[1] :].any()
    longest = weight.double().norm(dim=1).max()
    assert longest <= packed._norm <= longest * 1.001


@pytest.mark.parametrize("size", [1, 8, 33, 64])
@pytest.mark.parametrize("given", STORED)
def test_gates_and_what_they_are_for_lie_in_turn_bit_for_bit(kernels, monkeypatch, given, size):
    monkeypatch.setattr(products, "_shelf", WornShelf())
    weight, _, _ = made(given, (2 * size, 37))
    packed, half = GatedWeight(weight, library=kernels), kernels.panel_outputs() // 2
    rows = numbers_in(packed, kernels).unflatten(0, (-1, 2, half))
    for side in (0, 1):
        there = rows[:, side].flatten(0, 1)
        assert torch.equal(there[:size, :37], weight[side * size : (side + 1) * size].float())
        assert not there[size:].any() and not there[:, 37:].any()


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ([1.0, -0.5, 2.0**-30, 2.0**100], torch.bfloat16),
        ([1.0, 1 + 2.0**-10, 65504.0, 2.0**-24], torch.float16),
        ([1.0, 1 + 2.0**-12], torch.float32),
        ([2.0**17, 1 + 2.0**-10], torch.float32),  # each in one of them, both in none
    ],
)
def test_sixteen_bits_where_that_is_exact(kernels, numbers, dtype):
    assert narrowest_exact_dtype(torch.tensor([numbers]), kernels) == dtype
    among_many = torch.zeros(9001)
    among_many[-len(numbers) :] = torch.tensor(numbers)
    assert narrowest_exact_dtype(among_many[None], kernels) == dtype


def test_sixteen_bits_take_half_the_memory(kernels):
    weight = torch.randn(64, 576)
    assert PackedWeight(weight, library=kernels).nbytes == 64 * 576 * 4
    assert PackedWeight(weight.half(), library=kernels).nbytes == 64 * 576 * 2


def test_weights_made_in_inference_mode_and_outside_share_memory(kernels, monkeypatch):
    monkeypatch.setattr(products, "_shelf", Shelf())
    weight, x = torch.randn(40, 16), torch.randn(3, 16)
    with torch.inference_mode():
        first = PackedWeight(weight, library=kernels)
    second = PackedWeight(weight, library=kernels)
    assert 0 < second.packed.data_ptr() - first.packed.data_ptr() <= 2 * first.nbytes
    assert first.packed.data_ptr() % 64 == second.packed.data_ptr() % 64 == 0
    assert torch.equal(first.product(x), second.product(x))
