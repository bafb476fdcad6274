"""What to predict with where no device was measured: a profile of none in particular.

Only its proportions say anything: a stage reads its weights once and multiplies them with every
token, a decode reads its context, a chunk its prefix. How long each of these takes on each stage
`PipelineCost` learns from what stages observe, from the first microbatch on.
"""

from pipeserve.core.cost.device import DeviceProfile, Link
from pipeserve.core.cost.kernels import AttentionCost, Elementwise, Gemm, Kernels

_BYTES_PER_S = 1e11
_FLOPS_PER_BYTE = 100
"""Products a second over bytes a second: 20 to 300 on the devices that serve language models."""
_ATTENDING = 0.5
"""Of the rate of products, what attention reaches."""

_AT_ONCE = Elementwise(overhead_s=0.0, bytes_per_s=_BYTES_PER_S)
_FLOPS_PER_S = _FLOPS_PER_BYTE * _BYTES_PER_S
_LINK = Link(alpha_s=0.0, bytes_per_s=_BYTES_PER_S)

ROUGH = DeviceProfile(
    name="rough",
    provenance={"made by": "hand: no device"},
    memory_bytes=0,
    devices_per_node=1 << 20,
    attention=AttentionCost(
        prefill_overhead_s=0.0,
        prefill_values_per_s=_FLOPS_PER_S,
        prefix_flops_per_s=_ATTENDING * _FLOPS_PER_S,
        causal_flops_per_s=_ATTENDING * _FLOPS_PER_S,
        query_tile=1,
        decode_overhead_s=0.0,
        decode_sequence_s=0.0,
        decode_bytes_per_s=_BYTES_PER_S,
    ),
    intra_node=_LINK,
    inter_node=_LINK,
    group_link=_LINK,
    kernels=Kernels(
        gemm=Gemm(
            flops_per_s=_FLOPS_PER_S,
            bytes_per_s=_BYTES_PER_S,
            overhead_s=0.0,
            norm=2.0,
            wave_share=0.0,
            ramp=0.0,
            num_processors=1,
        ),
        norm=_AT_ONCE,
        rope=_AT_ONCE,
        activation=_AT_ONCE,
        add=_AT_ONCE,
        embedding=_AT_ONCE,
    ),
)
