"""The fit finds what made up the data, and the shipped profiles are what the measurements say."""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from published.fit import (
    fit_attention,
    fit_gemm,
    fit_link,
    least_error,
    log_errors,
    make_all_reduce,
    product_columns,
    ring_link,
    rising,
)
from published.measurements import (
    LayerTimes,
    MessageTimes,
    read_attention,
    read_iterations,
    read_layers,
    read_messages,
)

from pipeserve.configs.device_profiles import load_profile
from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.device import AllReduce, Link
from pipeserve.core.cost.kernels import Gemm, products
from pipeserve.core.cost.partition import split_layers
from pipeserve.core.cost.pipeline_cost import PipelineCost
from pipeserve.core.cost.shape import ModelShape
from pipeserve.core.work import Work

BESIDE = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("PIPESERVE_DATA", BESIDE))
    if not (folder / "vidur_a100_compute").is_dir():
        pytest.skip(f"no measurements in {folder}; name their folder with PIPESERVE_DATA")
    return folder


# ---- data made up from known parameters ---------------------------------------------------------


def test_least_error_finds_a_line_and_ignores_outliers():
    x = np.arange(1.0, 200.0)
    measured = 3e-6 + 5e-9 * x
    measured[::20] *= 3
    values = least_error(lambda v: v[0] + v[1] * x, (1e-5, 1e-8), measured)
    assert values == pytest.approx([3e-6, 5e-9], rel=5e-3)


def test_fit_link():
    sizes = np.geomspace(1e3, 1e8, 50)
    true = Link(alpha_s=3e-5, bytes_per_s=8e9)
    found = fit_link(MessageTimes(sizes, true.seconds(sizes)))
    assert (found.alpha_s, found.bytes_per_s) == pytest.approx((3e-5, 8e9), rel=1e-3)


def test_fit_gemm():
    shape = ModelShape(
        name="x",
        num_layers=1,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=1,
        max_position_embeddings=1,
    )
    true = Gemm(
        flops_per_s=2e14,
        bytes_per_s=1.4e12,
        overhead_s=6e-6,
        norm=2.2,
        wave_share=0.2,
        ramp=50.0,
        num_processors=108,
    )
    tokens = np.tile(np.unique(np.geomspace(1, 4096, 120).astype(int)), 2)
    size = np.repeat([1, 4], len(tokens) // 2)
    seconds = {name: np.empty(len(tokens)) for name, _, _ in products(shape)}
    for each in (1, 4):
        for name, columns, inner in products(shape.shard(each)):
            seconds[name][size == each] = true.seconds(tokens[size == each], columns, inner)
    found = fit_gemm([LayerTimes(shape, size, tokens, seconds, {}, 0.0)], 108)
    for name in ("flops_per_s", "bytes_per_s", "overhead_s", "norm", "wave_share", "ramp"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02), name


def test_rising():
    assert rising([1, 3, 2, 2, 5]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert rising([3, 2, 1]) == [2, 2, 2]


def test_all_reduce_tables_never_fall():
    rng = np.random.default_rng(0)
    sizes = np.arange(2048, 64 << 20, 50_000)
    noisy = (2e-5 + sizes / 1e11) * rng.lognormal(0, 0.3, len(sizes))
    points = make_all_reduce(4, 1, MessageTimes(sizes, noisy)).points
    seconds = [s for _, s in points]
    assert seconds == sorted(seconds) and len(points) > 15
    assert seconds[-1] == pytest.approx(2e-5 + points[-1][0] / 1e11, rel=0.1)


def test_a_ring_stands_for_the_widest_group_of_a_node():
    """Four devices send 1.5 times a message each."""
    fast = AllReduce(group=2, nodes=1, points=((1, 1e-6), (1 << 30, 1e-3)))
    widest = AllReduce(group=4, nodes=1, points=((1, 1e-5), (1 << 20, 1e-5 + 1.5 * 2**20 / 1e9)))
    wider = AllReduce(group=8, nodes=2, points=((1, 1.0), (1 << 20, 2.0)))
    link = ring_link([fast, widest, wider])
    assert (link.alpha_s, link.bytes_per_s) == pytest.approx((1e-5, 1e9))


# ---- the measurements themselves ----------------------------------------------------------------


def test_the_shipped_profiles_are_what_the_fit_finds(data):
    shipped = load_profile("a100-80gb-dgx")
    gemm = fit_gemm(read_layers(data), shipped.kernels.gemm.num_processors)
    assert asdict(shipped.kernels.gemm) == rounded(gemm)
    times = read_attention(data)
    every = np.ones(len(times.start), bool), np.ones(len(times.context), bool)
    assert asdict(shipped.attention) == rounded(fit_attention(times, *every))
    path = data / "vidur_a100_network" / "a100_dgx.send_recv.csv.gz"
    assert asdict(shipped.inter_node) == rounded(fit_link(read_messages(path, "send_recv", 2, 1)))


def rounded(value):
    """As the YAML file has it, to five digits; the machine's own rounding may move the last."""
    return {k: pytest.approx(v, rel=1e-3) for k, v in asdict(value).items()}


def test_layers_of_models_left_out_of_the_fit(data):
    """The sum of a layer's four products: 3 % median over the five gated models, at most 5 % of
    any."""
    layers, every = read_layers(data), []
    gated = [times for times in layers if times.shape.gated_mlp]
    assert len(gated) == 5
    for left_out in gated:
        gemm = fit_gemm([times for times in layers if times is not left_out], 108)
        errors = []
        for size in (1, 2, 4, 8):
            chosen = left_out.tensor_parallel_size == size
            tokens = left_out.num_tokens[chosen]
            measured = sum(seconds[chosen] for seconds in left_out.products.values())
            sizes = [(tokens, n, k) for _, n, k in products(left_out.shape.shard(size))]
            predicted = sum(gemm.seconds(*each) for each in sizes)
            errors.append(np.abs(predicted / measured - 1))
        errors = np.concatenate(errors)
        assert np.median(errors) < 0.05, left_out.shape.name
        every.append(errors)
    assert np.median(np.concatenate(every)) < 0.031


def test_residuals_are_those_of_models_left_out(data):
    layers, shipped = read_layers(data), load_profile("a100-80gb-dgx")
    errors = []
    for left_out in layers:
        gemm = fit_gemm([times for times in layers if times is not left_out], 108)
        *sizes, seconds = product_columns([left_out])
        errors.append(log_errors(seconds, gemm.seconds(*sizes)))
    assert shipped.residuals.linear == pytest.approx(np.concatenate(errors).std(), rel=0.01)


def test_whole_prefills_on_models_left_out_of_the_fit(data):
    """Of 512 tokens and more: 7 % median."""
    errors = []
    for iteration in read_iterations(data):
        tokens, size = iteration.num_prefill_tokens, iteration.tensor_parallel_size
        if tokens < 512 or size == 3:
            continue
        node = "nc96ads-a100-v4" if iteration.model == "yi-34b" else "a100-80gb-dgx"
        shape = load_shape(iteration.model)
        cost = PipelineCost(load_profile(node), shape, split_layers(shape.num_layers, 1), size)
        predicted = cost.seconds(Work(tokens, 1, ((0, tokens),), 0, 0))[0]
        errors.append(abs(predicted / iteration.seconds - 1))
    assert len(errors) == 24
    assert np.median(errors) < 0.07
