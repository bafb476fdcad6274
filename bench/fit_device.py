"""Makes the shipped device profiles from published measurements.

    python bench/fit_device.py --data DIR [--out configs/devices]

`--data` is a folder with vidur's CSV files (names and origins: docs/cost-model.md). Prints what was
fitted and how far off it is on measurements that the fit did not see; those figures also go into
the profiles' `provenance` and `residuals`. Takes about 3 seconds.
"""

import argparse
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from commands import script
from published.fit import (
    fit_attention,
    fit_elementwise,
    fit_gemm,
    fit_link,
    log_errors,
    make_all_reduce,
    product_columns,
    ring_link,
    smaller_sizes,
)
from published.measurements import (
    AttentionTimes,
    LayerTimes,
    MessageTimes,
    read_attention,
    read_layers,
    read_messages,
)

from pipeserve.configs.device_profiles import save_profile
from pipeserve.core.cost.device import AllReduce, DeviceProfile, Link, Residuals
from pipeserve.core.cost.kernels import AttentionCost, Kernels

NUM_PROCESSORS = 108  # streaming multiprocessors of an A100
MEMORY_BYTES = 80_000_000_000  # as sold; SARATHI's batch sizes of 11 and 27 follow from it
DGX, DENSE = "a100_dgx.all_reduce", "a100_pairwise_nvlink.all_reduce.dense"
SEND_RECV = "a100_dgx.send_recv"
SOURCE = "microsoft/vidur, MIT licence"
HEAD = SOURCE + ", commit 7d47513363ec447a741ac5e47241580b47724fbf"


def fit_kernels(layers: list[LayerTimes]) -> Kernels:
    names = ("norm", "rope", "activation", "add", "embedding")
    elementwise = {name: fit_elementwise(layers, name) for name in names}
    return Kernels(gemm=fit_gemm(layers, NUM_PROCESSORS), **elementwise)


def held_out_products(layers: list[LayerTimes]) -> np.ndarray:
    """log errors of every product of every model, each predicted from the other models alone."""
    errors = []
    for left_out in layers:
        gemm = fit_gemm([times for times in layers if times is not left_out], NUM_PROCESSORS)
        *sizes, seconds = product_columns([left_out])
        errors.append(log_errors(seconds, gemm.seconds(*sizes)))
    return np.concatenate(errors)


def held_out_attention(times: AttentionTimes) -> tuple[np.ndarray, np.ndarray]:
    """log errors of prefill and decode on the larger sizes, predicted from the smaller ones."""
    seen, small = smaller_sizes(times)
    fitted = fit_attention(times, seen, small)
    shard = times.shape.shard(times.tensor_parallel_size)
    prefill = fitted.prefill_s(shard, times.start, times.num_tokens)
    decode = fitted.decode_s(shard, times.num_decodes, times.context)
    prefill_errors = log_errors(times.prefill_s, prefill)[~seen]
    return prefill_errors, log_errors(times.decode_s, decode)[~small]


def fit_whole_attention(times: AttentionTimes) -> AttentionCost:
    every = np.ones(len(times.start), bool), np.ones(len(times.context), bool)
    return fit_attention(times, *every)


def every_second(times: MessageTimes, first: int) -> MessageTimes:
    return MessageTimes(times.num_bytes[first::2], times.seconds[first::2])


def held_out_all_reduce(times: MessageTimes) -> np.ndarray:
    """log errors of every second row, predicted from a table of the others."""
    table = make_all_reduce(1, 1, every_second(times, 0))
    test = every_second(times, 1)
    return log_errors(test.seconds, np.array([table.seconds(size) for size in test.num_bytes]))


def all_reduces(
    folder: Path, rows: list[tuple[str, int, int]]
) -> tuple[tuple[AllReduce, ...], np.ndarray]:
    """Tables of (file, devices, devices in a node), and their held-out log errors."""
    tables, errors = [], []
    for name, devices, per_node in rows:
        path = folder / "vidur_a100_network" / f"{name}.csv.gz"
        times = read_messages(path, "all_reduce", devices, per_node)
        tables.append(make_all_reduce(devices, devices // per_node, times))
        errors.append(held_out_all_reduce(times))
        print(f"all-reduce of {devices:2}, {per_node} a node, {name}: {spread(errors[-1])}")
    return tuple(tables), np.concatenate(errors)


def spread(errors: np.ndarray) -> str:
    """Of log errors, in words."""
    off = np.abs(np.expm1(-errors))
    return f"off by {np.median(off):.1%} (median), {np.quantile(off, 0.9):.1%} (P90)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("configs/devices"))
    args = parser.parse_args()

    layers, attention = read_layers(args.data), read_attention(args.data)
    products = held_out_products(layers)
    prefill, decode = held_out_attention(attention)
    print(f"products of a model left out: {spread(products)}")
    print(f"attention of larger sizes: prefill {spread(prefill)}; decode {spread(decode)}")

    network = args.data / "vidur_a100_network" / f"{SEND_RECV}.csv.gz"
    inside = fit_link(read_messages(network, "send_recv", 2, 2))
    between = fit_link(read_messages(network, "send_recv", 2, 1))
    dgx = [(DGX, 2, 2), (DGX, 4, 4), (DGX, 8, 8), (DGX, 16, 8)]
    dgx_tables, dgx_errors = all_reduces(args.data, dgx)
    pairs = [(DENSE, 2, 2), (DENSE, 4, 4), (DGX, 8, 4)]
    pair_tables, pair_errors = all_reduces(args.data, pairs)

    common = DeviceProfile(
        name="a100-80gb-dgx",
        provenance={
            "made by": f"bench/fit_device.py, {date.today()}",
            "linear": f"vidur_a100_compute/*.mlp.csv.gz, six models: {HEAD}",
            "linear, held out": f"products, each model from the others: {spread(products)}",
            "attention": "vidur_a100_compute/attention.*.csv.gz, one shape (head_dim 128, 32 query "
            f"and 4 KV heads): {SOURCE}, commit e2d00e9afba96cec9f0e7ea560bbfc4a539fae6a",
            "attention, held out": f"larger sizes from smaller ones: prefill {spread(prefill)}; "
            f"decode {spread(decode)}",
            "all-reduce": f"{DGX}.csv.gz: {HEAD}",
            "all-reduce, held out": f"every second row {spread(dgx_errors)}",
            "all-reduce, other groups inside a node": "not measured: a ring on group_link, which "
            "has the widest measured group's latency and bandwidth",
            "links": f"{SEND_RECV}.csv.gz, within a node and between two: {HEAD}",
            "jitter": "standard deviation over mean of a product's repeats, median over all",
            "assumed": "memory as sold, 80e9 bytes; host_s and control_s 0: device time alone",
        },
        memory_bytes=MEMORY_BYTES,
        devices_per_node=8,
        attention=fit_whole_attention(attention),
        intra_node=inside,
        inter_node=between,
        kernels=fit_kernels(layers),
        all_reduce=dgx_tables,
        group_link=ring_link(dgx_tables),
        residuals=Residuals(
            linear=float(products.std()),
            attention_prefill=float(prefill.std()),
            attention_decode=float(decode.std()),
            all_reduce=float(dgx_errors.std()),
            jitter=float(np.mean([times.jitter for times in layers])),
        ),
    )
    nc96 = nc96ads(common, pair_tables, pair_errors)
    for profile in (common, nc96):
        path = args.out / f"{profile.name}.yaml"
        save_profile(profile, path, "Made by bench/fit_device.py; docs/cost-model.md explains it.")
        print(f"wrote {path}")


def nc96ads(dgx: DeviceProfile, tables: tuple[AllReduce, ...], errors: np.ndarray) -> DeviceProfile:
    """Azure's NC96ads_A100_v4: 4 A100 on PCIe with NVLink in pairs, 100 Gb/s between nodes."""
    largest, seconds = tables[1].points[-1]
    return replace(
        dgx,
        name="nc96ads-a100-v4",
        provenance={
            **dgx.provenance,
            "all-reduce": f"{DENSE}.csv.gz: {SOURCE}, commit "
            "0abb8ffb68e7f3c8e0ca9597b307019e998b6c65; of 8 over two nodes from "
            f"{DGX}.csv.gz, two DGX nodes with 4 GPUs each in use, faster inside than PCIe is",
            "all-reduce, held out": f"every second row {spread(errors)}; another run of 4 over "
            "PCIe had 15.7 GB/s where this one has 19.9",
            "links": f"between nodes as measured in {SEND_RECV}.csv.gz, 62 Gb/s, which stands for "
            "the nodes' 100 Gb/s Ethernet; within a node not measured: the bandwidth of the "
            "all-reduce of 4 over PCIe is assumed",
        },
        devices_per_node=4,
        intra_node=Link(alpha_s=dgx.intra_node.alpha_s, bytes_per_s=largest / seconds),
        all_reduce=tables,
        group_link=ring_link(tables),
        residuals=replace(dgx.residuals, all_reduce=float(errors.std())),
    )


if __name__ == "__main__":
    script(main)
