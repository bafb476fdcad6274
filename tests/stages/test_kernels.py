"""The C kernels are there, found, and chosen by what the CPU and the environment allow."""

import ctypes.util
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeserve import machine
from pipeserve.stages.backends.cpu import library


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="kernels are for x86_64 Linux"
)
def test_kernels_are_compiled_and_found():
    assert library.kernels() is not None, "python setup.py build_kernels --inplace"


@pytest.mark.parametrize("name", library.usable_libraries())
def test_every_library_reads_to_the_end(name):
    values = np.zeros(12 * 16 * 40, np.float32)
    values[-16 * 12 :: 16] = 1  # the first lane of each sum of the last step
    assert library.load(name).read_all(values.ctypes.data, values.nbytes) == 12


@pytest.mark.parametrize(
    ("environment", "best"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
        ({library.SWITCH: "avx2"}, "avx2"),
        ({library.SWITCH: "none"}, None),
        ({"ATEN_CPU_CAPABILITY": "default"}, None),
    ],
)
def test_the_environment_limits_them(monkeypatch, environment, best):
    if "avx2" not in library.usable_libraries():
        pytest.skip("no kernels")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = library.usable_libraries()
    assert (found[0] if found else None) == best


FLAGS = "flags : fpu avx avx2 fma f16c"
AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "best"),
    [
        ("flags : fpu sse4_1 sse4_2 ssse3", None),  # dondai44423/donsetch#57: a VM without AVX
        ("flags : fpu avx", None),  # llama.cpp#14691, odysseus#3050: no backend, or a crash
        # The CPU has more, and the system, or what it runs in, does not save it: OpenBLAS#1949,
        # jvector#629, jax#2906, whisper.cpp#3699, Halide#9017.
        (FLAGS, "avx2"),
        (f"{FLAGS} avx512vl", "avx2"),  # eclipse-openj9#19408: avx512vl alone
        (f"{FLAGS} avx512f avx512bw avx512dq", "avx2"),
        (f"{FLAGS} {AVX512}", "avx512"),
        (f"{FLAGS} avx512_bf16", "avx2"),
        (f"{FLAGS} {AVX512} avx512_bf16", "avx512"),
        (f"{FLAGS} {AVX512} avx512_bf16 avx512_vnni", "avx512_bf16"),
        (f"{FLAGS} {AVX512} avx512_bf16 avx512_vnni\n{FLAGS}", "avx2"),  # cores of two kinds
        ("Features : fp asimd bf16", None),
    ],
)
def test_what_the_kernel_says_of_every_core_decides(monkeypatch, cpuinfo, best):
    instructions = machine.cpu_instructions(cpuinfo, {})
    monkeypatch.setattr(library, "cpu_instructions", lambda: instructions)
    monkeypatch.setattr(library, "_path", lambda name: Path(__file__))
    monkeypatch.delenv(library.SWITCH, raising=False)
    assert (library.usable_libraries() or [None])[0] == best


def test_without_a_library_that_cannot_be_loaded(monkeypatch, capsys):
    """Acellera/moleculekit#39, score-p/scorep_binding_python#110: mounted "noexec"."""
    error = OSError("avx2.so: failed to map segment from shared object")

    def load(name):
        raise error

    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(library, "usable_libraries", lambda: ["avx512", "avx2"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert library.kernels.__wrapped__() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(error) in line and "install pipeserve again" in line
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first stage of a machine has said it
    assert library.kernels.__wrapped__() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["content", "name", "more", "fewer"])
def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path, capsys, change):
    """Of a checkout that was updated and not installed again: it had ended stages by SIGSEGV."""
    if not library.usable_libraries():
        pytest.skip("no kernels")
    folder = tmp_path / "kernels"
    shutil.copytree(library._FOLDER, folder)
    monkeypatch.setattr(library, "_FOLDER", folder)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert library.kernels.__wrapped__() is not None
    match change:
        case "content":
            (folder / "heads.c").write_text((folder / "heads.c").read_text() + "\n")
        case "name":
            (folder / "heads.c").rename(folder / "legs.c")
        case "more":
            (folder / "legs.h").write_text("")
        case "fewer":
            (folder / "pool.h").unlink()
    assert library.kernels.__wrapped__() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "before its sources changed" in line and "install pipeserve again" in line


def test_a_library_from_before_fingerprints_is_not_used(monkeypatch, tmp_path):
    """It has not even the function that tells of its sources."""
    monkeypatch.setattr(library, "_path", lambda name: Path(ctypes.util.find_library("c")))
    with pytest.raises(OSError, match="before its sources changed"):
        library.load.__wrapped__("c")
