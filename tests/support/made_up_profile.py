"""A cost profile as `pipeserve calibrate` makes them, with numbers made up by hand."""

from pipeserve.configs.model_shapes import load_shape
from pipeserve.core.cost.device import DeviceProfile, Link
from pipeserve.core.cost.kernels import AttentionCost, Tables
from pipeserve.core.cost.partition import split_explicitly

SHAPE = load_shape("smollm2-135m")
PLAN = split_explicitly(30, 2, [20, 10])
LINK = Link(alpha_s=1e-4, bytes_per_s=1e9)
TRUE = DeviceProfile(
    name="made up",
    provenance={"made": "by hand"},
    memory_bytes=10**9,
    devices_per_node=2,
    attention=AttentionCost(
        prefill_overhead_s=2e-4,
        prefill_values_per_s=1e30,
        prefix_flops_per_s=50e9,
        causal_flops_per_s=20e9,
        query_tile=1,
        decode_overhead_s=0.0,
        decode_sequence_s=3e-5,
        decode_bytes_per_s=2e9,
    ),
    tables=Tables(
        model="smollm2-135m",
        dtype="bfloat16",
        threads=1,
        layer=((1, 4e-4), (16, 8e-4), (128, 4e-3), (512, 14e-3)),
        head=((1, 2e-3), (32, 9e-3)),
        embedding=((1, 1e-6), (512, 512e-6)),
    ),
    intra_node=LINK,
    inter_node=LINK,
    host_s=1e-3,
)
