"""Compiles the C kernels of CPU stages when the package is built; all else is in pyproject.toml.

The compiler is the `ziglang` wheel, which a build needs and the package does not. The libraries
have nothing of Python or torch in them, so one wheel serves every Python on any Linux. Elsewhere
there are none, and stages use PyTorch's products and attention.

    python setup.py build_kernels --inplace       # after a change of C, without installing again
"""

import os
import runpy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

FOLDER = Path("pipeserve/stages/backends/cpu/kernels")
TARGET, PLATFORM_TAG = "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"
CPUS = {
    "avx2": "x86_64_v3",
    "avx512": "x86_64_v4",
    "avx512_bf16": "x86_64_v4+avx512bf16+avx512vnni",
}
"""Libraries, by what zig calls the CPU that each is for."""
# Left to itself, clang uses half a register of AVX512, for the sake of CPUs before 2019.
FLAGS = ("-O3", "-mprefer-vector-width=512", "-fvisibility=hidden", "-shared", "-fPIC", "-s")
HAS_COMPILER = find_spec("ziglang") is not None

# By its path: the package is not imported by what installs it.
fingerprint = runpy.run_path(str(FOLDER.parent / "kernel_sources.py"))["fingerprint"]


def compile_into(folder: Path) -> None:
    """Makes <name>.so of every library in `folder`."""
    sources = [*sorted(map(str, FOLDER.glob("*.c"))), f'-DSOURCES="{fingerprint(FOLDER)}"']
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        caches = {"ZIG_LOCAL_CACHE_DIR": scratch, "ZIG_GLOBAL_CACHE_DIR": scratch}
        running = {}
        for name, cpu in CPUS.items():
            command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGET, f"-mcpu={cpu}"]
            made = Path(scratch, f"{name}.so")
            command += [*FLAGS, *sources, "-o", str(made)]
            running[made] = subprocess.Popen(command, env={**os.environ, **caches})
        failed = [made.name for made, process in running.items() if process.wait() != 0]
        if failed:
            raise SystemExit(f"the C kernels could not be compiled: {', '.join(failed)}")
        for made in running:
            # In one step: a process may have the file that was there in use.
            beside = folder / f"{made.name}.new"
            beside.write_bytes(made.read_bytes())
            beside.replace(folder / made.name)


class BuildKernels(Command):
    """A step of `build`: the libraries lie beside their sources, or in the wheel at their place."""

    description = "compile the C kernels"
    user_options = [("inplace", "i", "beside their sources")]  # noqa: RUF012
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False  # set by setuptools in an editable install
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        if HAS_COMPILER:
            compile_into(self.folder)
        else:
            print("no C kernels: they are for x86_64 and Linux, and compiled by ziglang")

    @property
    def folder(self) -> Path:
        is_beside = self.inplace or self.editable_mode
        return FOLDER if is_beside else Path(self.build_lib) / FOLDER

    def get_outputs(self) -> list[str]:
        return [str(self.folder / f"{name}.so") for name in CPUS] if HAS_COMPILER else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return sorted(map(str, FOLDER.glob("*.[ch]")))


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether the package is for one platform."""
        return HAS_COMPILER


class Wheel(bdist_wheel):
    """For any Python 3 on the platform that the libraries are for."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", PLATFORM_TAG) if HAS_COMPILER else super().get_tag()


build.sub_commands.append(("build_kernels", None))
setup(
    distclass=Package,
    cmdclass={"build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
