"""The C kernels: which of the compiled libraries this process can use, and what is in them.

`setup.py` compiles kernels/*.c once for each instruction set. A process takes the best that its CPU
and environment allow. There is none on other kinds of CPU or where nothing was compiled; callers
then do without.
"""

import ctypes
import os
import sys
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

from pipeserve.machine import cpu_instructions
from pipeserve.stages.backends.cpu.kernel_sources import fingerprint

SWITCH = "PIPESERVE_KERNELS"
"""Environment variable: the name of the one library that may be used, or "none"."""
_REMEDY = (
    "products and attention will be slower; install pipeserve again (in a checkout: ./quickstart, "
    "or python setup.py build_kernels --inplace), where files may be executed"
)
_FOLDER = Path(__file__).parent / "kernels"
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_NEEDS = {
    "avx512_bf16": (*_AVX512, "avx512_bf16", "avx512_vnni"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
}
"""Libraries, the best first, by the instructions that they need."""
_FUNCTIONS = {
    # sources.c
    "sources": (c_char_p, []),
    # measure.c
    "read_all": (c_float, [c_void_p, c_int64]),
    "multiply_add": (c_int64, [c_int64]),
    "multiplies_pairs": (c_int, []),
    # attention.c
    "attention_scratch": (c_int64, [c_int64, c_int64]),
    "attend": (
        None,
        [
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        ],
    ),
    # heads.c
    "rotate_heads": (None, [c_void_p, *[c_int64] * 4, c_void_p, c_void_p, c_int64]),
    "write_heads": (None, [*[c_void_p, c_int64] * 2, c_int64, c_void_p, c_void_p]),
    # elementwise.c
    "rms_norm": (None, [*[c_void_p] * 2, c_float, c_int64, c_int64, c_void_p]),
    "layer_norm": (None, [*[c_void_p] * 3, c_float, c_int64, c_int64, c_void_p]),
    "activate": (None, [c_void_p, c_int, c_int64, c_void_p]),
    # halves.c
    "attention_half": (c_int64, [*[c_void_p] * 8, c_int64, *[c_void_p] * 5, c_int64]),
    "mlp_half": (
        c_int64,
        [c_void_p, c_void_p, c_int, c_bool, c_void_p, c_int64, *[c_void_p] * 4, c_int64],
    ),
    "run_layers": (
        c_int64,
        [c_void_p, c_int64, *[c_void_p] * 2, c_int64, *[c_void_p] * 3, c_int64],
    ),
    # weights.c
    "packed_size": (c_int64, [c_int, c_int64, c_int64, c_int]),
    "panel_outputs": (c_int64, []),
    "narrowest_exact": (c_int, [c_void_p, c_int, c_int64]),
    "pack_weight": (c_float, [c_int, c_void_p, c_int, c_int64, c_int64, c_int, c_void_p]),
    "coarse_size": (c_int64, [c_int64, c_int64]),
    "coarsen_weight": (c_int, [c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p]),
    # products.c
    "product_scratch": (c_int64, [c_int64, c_int64]),
    "product": (
        None,
        [
            *(c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
        ],
    ),
    "gated_product": (
        None,
        [
            *(c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64),
            *(c_void_p, c_int, c_void_p, c_void_p),
        ],
    ),
    "likeliest_scratch": (c_int64, [c_int64, c_int64, c_int64]),
    "likeliest": (
        c_bool,
        [
            *(c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p),
            *(c_int64, c_int64, c_float, c_void_p, c_void_p, c_void_p),
        ],
    ),
}
"""Of every C function that Python calls: type of its result and of its arguments."""


@cache
def kernels() -> ctypes.CDLL | None:
    """The library that this process uses, or None; found out at the first call.

    Its functions let other Python threads run. One that cannot be loaded is passed over: it may lie
    on a file system that nothing is executed from, or be left from before its sources changed. The
    first one of a machine says so.
    """
    passed_over = []
    found = None
    for name in usable_libraries():
        try:
            found = load(name)
            break
        except OSError as error:
            passed_over.append(str(error))
    if passed_over and os.environ.get("LOCAL_RANK", "0") == "0":
        what = "C kernels are not used" if found is None else "the best C kernels are not used"
        print(f"warning: {what}: {passed_over[0]}; {_REMEDY}", file=sys.stderr)
    return found


def name_of(library: ctypes.CDLL) -> str:
    return Path(library._name).stem


def has_pairs_of_bfloat16() -> bool:
    """Whether the process's library multiplies bfloat16 natively, two by two."""
    library = kernels()
    return library is not None and bool(library.multiplies_pairs())


def usable_libraries() -> list[str]:
    """Names of the compiled libraries that this process may use, the best first."""
    instructions = cpu_instructions()
    allowed = os.environ.get(SWITCH) or None
    return [
        name
        for name, needs in _NEEDS.items()
        if allowed in (None, name) and instructions.issuperset(needs) and _path(name).exists()
    ]


@cache
def load(name: str) -> ctypes.CDLL:
    """One library by name, whose functions check their arguments' types. Raises OSError, also for
    one of other sources than lie beside it: what that does with what it is given, nobody knows."""
    library = ctypes.CDLL(str(_path(name)))
    try:
        for function_name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, function_name)
            function.restype, function.argtypes = result, arguments
        is_of_these = library.sources().decode() == fingerprint(_FOLDER)
    except AttributeError:  # it has no such function
        is_of_these = False
    if not is_of_these:
        raise OSError(f"{_path(name)} was compiled before its sources changed")
    return library


def _path(name: str) -> Path:
    return _FOLDER / f"{name}.so"
