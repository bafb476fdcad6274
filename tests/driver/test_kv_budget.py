"""How many KV blocks all stages get, by what each says that it takes, and of which memory."""

import pytest

from pipeserve.configs import RunConfig
from pipeserve.core.cost.partition import plan_of, with_ranks
from pipeserve.driver.kv_budget import num_kv_blocks
from pipeserve.errors import ConfigError
from pipeserve.machine import MemoryLimit
from pipeserve.wire.control import StageSized

MIB, GIB = 1 << 20, 1 << 30
LONGEST = 1 << 20  # tokens: no limit here


def machine(free_bytes, name="here"):
    return MemoryLimit(name, name, 64 * GIB, free_bytes)


def takes(weight_bytes, block_bytes, *memory):
    return StageSized(weight_bytes, block_bytes, memory)


def blocks(*sizes, longest=LONGEST, width=1, **options):
    """`sizes`: of each rank, of which `width` share a stage."""
    plan = with_ranks(plan_of([1] * (len(sizes) // width)), width)
    return num_kv_blocks(RunConfig(model="any", **options), plan, longest, sizes)


# ---- what the user wants ------------------------------------------------------------------------


def test_a_number_is_taken_as_it_is():
    sizes = [takes(0, MIB, machine(8 * GIB)), takes(0, 2 * MIB, machine(8 * GIB))]
    assert blocks(*sizes, num_gpu_blocks_override=100) == 100


def test_bytes_are_those_of_the_stage_whose_blocks_take_most():
    sizes = [takes(0, MIB, machine(8 * GIB)), takes(0, 2 * MIB, machine(8 * GIB))]
    assert blocks(*sizes, kv_cache_memory_bytes=11 * MIB) == 5


def test_bytes_for_no_block():
    with pytest.raises(ConfigError, match=f"-bytes 1000 holds no block .* give at least {2 * MIB}"):
        blocks(takes(0, 2 * MIB, machine(8 * GIB)), kv_cache_memory_bytes=1000)


def test_not_more_than_all_requests_can_use():
    size = takes(0, MIB, machine(64 * GIB))
    assert blocks(size, longest=33, max_num_seqs=4) == 4 * 3
    assert blocks(size, longest=33, max_num_seqs=4, kv_cache_memory_bytes=GIB) == 4 * 3
    assert blocks(size, longest=33, max_num_seqs=4, num_gpu_blocks_override=99) == 99


# ---- what is left to us -------------------------------------------------------------------------


def test_by_default_a_stage_gets_a_gibibyte():
    assert blocks(takes(GIB, MIB, machine(16 * GIB))) == 1024


def test_or_half_of_what_is_free_beside_the_weights():
    assert blocks(takes(512 * MIB, MIB, machine(GIB))) == 256


def test_stages_share_the_memory_of_their_machine():
    """Uneven ones, too: what all of them take together counts."""
    shared = machine(GIB)
    even = [takes(128 * MIB, MIB, shared)] * 2
    assert blocks(*even) == (1024 - 256) // 2 // 2
    uneven = [takes(0, MIB, shared), takes(256 * MIB, 3 * MIB, shared)]
    assert blocks(*uneven) == (1024 - 256) // 2 // 4


def test_the_least_that_any_saw_free_counts():
    """They look one after the other, and the first has seen what others have taken since."""
    assert blocks(takes(0, MIB, machine(GIB)), takes(0, MIB, machine(512 * MIB))) == 128


def test_the_scarcest_machine_decides():
    sizes = [takes(0, MIB, machine(8 * GIB, "a")), takes(0, MIB, machine(200 * MIB, "b"))]
    assert blocks(*sizes) == 100


@pytest.mark.parametrize("scarce", range(4))
def test_ranks_of_a_stage_have_the_same_blocks(scarce):
    """As many as the rank with least room holds, whichever it is: where each counts its own, as in
    GeeeekExplorer/nano-vllm#187, the first one hands out blocks that others do not have."""
    machines = [machine(8 * GIB, f"gpu {rank}") for rank in range(4)]
    machines[scarce] = machine(GIB, f"gpu {scarce}")
    sizes = [takes(0, MIB, memory) for memory in machines]
    assert blocks(*sizes, width=2) == blocks(sizes[scarce])


def test_every_limit_holds():
    """Two containers on one machine: each has its own, and both the machine's."""
    here = machine(GIB)
    first = takes(0, MIB, here, machine(900 * MIB, "container a"))
    second = takes(0, MIB, here, machine(100 * MIB, "container b"))
    assert blocks(first, second) == 50
    assert blocks(first, takes(0, MIB, here, machine(900 * MIB, "container b"))) == 256


def test_a_stage_without_layers_needs_no_pool():
    nothing = takes(0, 0, machine(MIB, "small"))
    assert blocks(nothing, takes(0, MIB, machine(GIB, "large"))) == 512


# ---- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"num_gpu_blocks_override": 600}, "--kv-cache-memory-bytes or --num-gpu-blocks-override"),
        ({"kv_cache_memory_bytes": 600 * MIB}, "smaller --kv-cache-memory-bytes"),
    ],
)
def test_pools_beside_weights_that_do_not_fit(options, remedy):
    small = takes(100 * MIB, MIB, machine(612 * MIB, "node7"))
    with pytest.raises(ConfigError) as caught:
        blocks(takes(GIB, MIB, machine(8 * GIB, "node6")), small, **options)
    text = str(caught.value)
    assert text.startswith(f"stage 1: weights take {100 * MIB} bytes and 600 KV blocks {600 * MIB}")
    assert f"node7 has {612 * MIB} free" in text and remedy in text and "\n" not in text


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 4}])
def test_weights_that_leave_no_room(options):
    """All on this machine are named; a smaller pool would not help."""
    sizes = [takes(600 * MIB, MIB, machine(GIB))] * 2
    with pytest.raises(ConfigError, match=r"stage 0, stage 1: weights take .* more machines"):
        blocks(*sizes, **options)


def test_room_for_one_block_is_enough():
    assert blocks(takes(GIB - MIB, MIB, machine(GIB))) == 1
