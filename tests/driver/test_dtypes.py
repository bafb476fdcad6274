"""--dtype auto: what the CPUs of all ranks multiply as it is, one type for the whole pipeline."""

import local_fleet
import pytest
import torch
from checkpoints import edit_config, tiny_llama
from local_fleet import LocalFleet
from safetensors.torch import load_file

import pipeserve.driver.checkpoint
import pipeserve.driver.driver
from pipeserve.configs import RunConfig
from pipeserve.core.records import Span
from pipeserve.driver.checkpoint import checkpoint_setup
from pipeserve.driver.driver import Driver
from pipeserve.driver.dtypes import choose_dtype
from pipeserve.frontend.llm import LLM
from pipeserve.launch.show.loaded import loaded
from pipeserve.machine import native_dtypes
from pipeserve.profiling.recording.recording import Ring
from pipeserve.sampling_params import SamplingParams
from pipeserve.wire.control import KeeperHello
from pipeserve.wire.stage_job import decode_share

ZEN3 = "fpu sse4_2 avx avx2 fma f16c"
ZEN4 = f"{ZEN3} avx512f avx512bw avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} avx512_fp16 amx_tile amx_bf16 amx_int8"
GRANITE_RAPIDS = f"{SAPPHIRE_RAPIDS} amx_fp16"
ALL = ("float32", "bfloat16", "float16")
BF16 = ("float32", "bfloat16")
PLAIN = ("float32",)


def cpuinfo(*cores, name="flags\t\t"):
    return "".join(f"processor\t: {n}\nmodel name\t: x\n{name}: {core}\n\n" for n, core in cores)


@pytest.mark.parametrize(
    ("cores", "environment", "expected"),
    [
        ([ZEN3], {}, PLAIN),
        ([ZEN4], {}, BF16),
        ([SAPPHIRE_RAPIDS], {}, ALL),
        ([GRANITE_RAPIDS], {}, ALL),
        ([ZEN4, ZEN4, ZEN3], {}, PLAIN),
        ([], {}, PLAIN),
        ([ZEN4], {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, PLAIN),
        ([ZEN4], {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, PLAIN),
        ([ZEN4], {"DNNL_MAX_CPU_ISA": "AVX2_VNNI_2"}, PLAIN),
        ([ZEN4], {"ATEN_CPU_CAPABILITY": "avx2"}, PLAIN),
        ([ZEN4], {"ATEN_CPU_CAPABILITY": "default"}, PLAIN),
        ([ZEN4], {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "ALL"}, BF16),
        ([SAPPHIRE_RAPIDS], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, BF16),
        ([SAPPHIRE_RAPIDS], {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}, ALL),
    ],
)
def test_what_a_cpu_multiplies_natively(cores, environment, expected):
    assert native_dtypes(cpuinfo(*enumerate(cores)), environment) == expected


def test_arm_calls_its_flags_otherwise():
    assert native_dtypes(cpuinfo((0, "fp asimd bf16"), name="Features\t"), {}) == BF16
    assert native_dtypes(cpuinfo((0, "fp asimd"), name="Features\t"), {}) == PLAIN


def test_of_this_machine_it_says_what_torch_says():
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert ("bfloat16" in native_dtypes(environment={})) == has_bf16


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "native", "name", "why", "warning"),
    [
        ("auto", "bfloat16", [BF16, ALL], "bfloat16", "the checkpoint's, native on this CPU", ""),
        ("auto", "bfloat16", [BF16, PLAIN], "float32", "rank 1 would only imitate", ""),
        ("auto", "bfloat16", [PLAIN, PLAIN], "float32", "this CPU would only imitate", ""),
        ("auto", "float16", [BF16], "float32", "imitate the checkpoint's float16", ""),
        ("auto", "float16", [ALL], "float16", "native", ""),
        ("auto", "float32", [()], "float32", "", ""),
        ("bfloat16", "float32", [PLAIN], "bfloat16", "", "this CPU has no bfloat16 instructions"),
        ("float16", "float32", [ALL, BF16], "float16", "", "rank 1 has no float16 instructions"),
        ("bfloat16", "float32", [BF16], "bfloat16", "", ""),
        ("float32", "bfloat16", [PLAIN], "float32", "", ""),
    ],
)
def test_the_choice(wanted, checkpoint, native, name, why, warning):
    chosen = choose_dtype(wanted, checkpoint, native)
    assert chosen.name == name
    assert why in chosen.why and warning in chosen.warning
    assert bool(chosen.warning) == bool(warning)
    assert bool(chosen.why) == (wanted == "auto")


@pytest.fixture
def folder(tmp_path):
    folder = tiny_llama(tmp_path)
    edit_config(folder, dtype="bfloat16", torch_dtype=None)
    return folder


def test_the_ranks_that_join_decide(folder, monkeypatch):
    """The driver's own machine, which it goes by until then, has bf16; a rank elsewhere has not."""
    monkeypatch.setattr(pipeserve.driver.checkpoint, "native_dtypes", lambda: BF16)
    config = RunConfig(
        model=folder,
        pipeline_parallel_size=2,
        launcher="external",
        control="127.0.0.1:29600",
    )
    setup = checkpoint_setup(config)
    assert setup.dtype == "bfloat16" and setup.shape.bytes_per_value == 2

    def hello(rank, native):
        return KeeperHello(rank, 2, f"host{rank}", "127.0.0.1", 0, "", native)

    other = setup.for_ranks([hello(0, BF16), hello(1, PLAIN)])
    assert (other.dtype, other.shape.bytes_per_value) == ("float32", 4)
    assert [decode_share(work).dtype for work in other.works] == ["float32"] * 2
    assert other.dtype_why == "rank 1 (host1) would only imitate the checkpoint's bfloat16"
    assert other.for_ranks([hello(0, BF16), hello(1, ALL)]).dtype == "bfloat16"


@pytest.mark.parametrize("joined", [BF16, PLAIN])
@pytest.mark.parametrize("thought", [BF16, PLAIN])
def test_one_type_for_the_whole_pipeline(folder, monkeypatch, thought, joined):
    monkeypatch.setattr(pipeserve.driver.checkpoint, "native_dtypes", lambda: thought)
    monkeypatch.setattr(local_fleet, "native_dtypes", lambda: joined)
    config = RunConfig(
        model=folder,
        pipeline_parallel_size=2,
        num_gpu_blocks_override=8,
        attention="cpu",  # whose weights are held as they are
        head_stages="last",  # and each of them once
    )
    with Driver(checkpoint_setup(config), fleet=LocalFleet) as driver:
        expected = "bfloat16" if joined == BF16 else "float32"
        computes = [worker.compute for worker in driver.fleet.workers]
        assert {str(compute.dtype) for compute in computes} == {f"torch.{expected}"}
        assert driver.dtype == expected
        assert f"parameters in {expected} (" in loaded(driver)
        tensors = load_file(f"{folder}/model.safetensors").items()
        wide = ("norm.weight", "lm_head.weight")  # float32 whatever the rest is
        assert sum(stage.weight_bytes for stage in driver.stages) == sum(
            tensor.numel() * (4 if expected == "float32" or name.endswith(wide) else 2)
            for name, tensor in tensors
        )


def test_in_16_bits_too_no_logit_depends_on_where_layers_are_cut(folder):
    """What goes over a link is not rounded: a text parted by that alone."""
    seen = []

    def answer_of(**options):
        config = RunConfig(model=folder, dtype="bfloat16", num_gpu_blocks_override=8, **options)
        prompt, params = list(range(3, 20)), SamplingParams(temperature=0, max_tokens=2, logprobs=5)
        ring = Ring()
        driver = Driver(checkpoint_setup(config), record=ring.record, fleet=LocalFleet)
        with LLM.on(driver) as llm:
            (found,) = llm.generate([prompt], params)
        # And the predicted bytes of a link are those that were sent, with an index of 8.
        for span in ring:
            if isinstance(span, Span) and span.stage < len(driver.stages) - 1:
                sent = span.num_bytes - 8
                assert sent == span.num_tokens * driver.shape.link_bytes_per_token > 0
        return found.token_ids, found.logprobs

    for options in (
        {"pipeline_parallel_size": 1},
        {"pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 2, "pipeline_layers": (3, 1), "head_stages": "last"},
    ):
        seen.append(answer_of(**options))
    assert seen[0] == seen[1] == seen[2]
