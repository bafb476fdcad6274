"""The C kernels are there, found, and chosen by what the CPU and the environment allow."""

import platform
import sys

import numpy as np
import pytest

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
