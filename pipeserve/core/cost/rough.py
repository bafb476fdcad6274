"""What to predict with where no device was measured: profiles of none in particular.

Only their proportions say anything: a stage reads its weights once and multiplies them with every
token, a decode reads its context, a chunk its prefix. How long each of these takes on each stage
`PipelineCost` learns from what stages observe, from the first microbatch on.
"""

from pipeserve.core.cost.device import DeviceProfile, Link
from pipeserve.core.cost.kernels import TILE, AttentionCost, Elementwise, Gemm, Kernels

_BYTES_PER_S = 1e11
_ATTENDING = 0.5
"""Of the rate of products, what attention reaches."""


def _rough(name: str, flops_per_byte: float, tile_rows: int) -> DeviceProfile:
    """`flops_per_byte`: products a second over bytes a second."""
    flops_per_s = flops_per_byte * _BYTES_PER_S
    at_once = Elementwise(overhead_s=0.0, bytes_per_s=_BYTES_PER_S)
    link = Link(alpha_s=0.0, bytes_per_s=_BYTES_PER_S)
    return DeviceProfile(
        name=name,
        provenance={"made by": "hand: no device"},
        memory_bytes=0,
        devices_per_node=1 << 20,
        attention=AttentionCost(
            prefill_overhead_s=0.0,
            prefill_values_per_s=flops_per_s,
            prefix_flops_per_s=_ATTENDING * flops_per_s,
            causal_flops_per_s=_ATTENDING * flops_per_s,
            query_tile=1,
            decode_overhead_s=0.0,
            decode_sequence_s=0.0,
            decode_bytes_per_s=_BYTES_PER_S,
        ),
        intra_node=link,
        inter_node=link,
        group_link=link,
        kernels=Kernels(
            gemm=Gemm(
                flops_per_s=flops_per_s,
                bytes_per_s=_BYTES_PER_S,
                overhead_s=0.0,
                norm=2.0,
                wave_share=0.0,
                ramp=0.0,
                num_processors=1,
                tile_rows=tile_rows,
            ),
            norm=at_once,
            rope=at_once,
            activation=at_once,
            add=at_once,
            embedding=at_once,
        ),
    )


ROUGH_GPU = _rough("rough GPU", flops_per_byte=100, tile_rows=TILE)
"""20 to 300 operations a byte on the GPUs that serve language models."""
ROUGH_CPU = _rough("rough CPU", flops_per_byte=20, tile_rows=1)
"""4 to 10 on a core (bench/stage_parts.py), whose kernels multiply each row for itself. Guessed as
a GPU, whose first pieces of prompts are twice as long, four stages of CPU cores took 2 to 4 %
longer for loads that come at once (bench/at_once.py); 10, 20 and 30 a byte are as good there. It is
rather too high: where prompts are thought four times as dear as they are, what they take is held
for hiccups, and while decodes come between them it is not learnt for dozens of microbatches."""


def rough_profile(device: str) -> DeviceProfile:
    """Of `--device`, of which auto is the CPU."""
    return ROUGH_GPU if device == "cuda" else ROUGH_CPU


def is_rough(profile: DeviceProfile) -> bool:
    return profile is ROUGH_CPU or profile is ROUGH_GPU
