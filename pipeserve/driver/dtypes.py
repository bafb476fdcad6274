"""Which type the weights are kept and multiplied in, where the user leaves that to us."""

from collections.abc import Collection, Sequence
from typing import NamedTuple


class ChosenDtype(NamedTuple):
    name: str
    why: str
    """Of `auto`, for the line that says what was loaded; empty where the user chose."""
    warning: str
    """Empty, or one line on what the user chose."""


def choose_dtype(
    wanted: str,
    checkpoint: str,
    native: Sequence[Collection[str]],
    hosts: Sequence[str] = (),
    device: str = "cpu",
) -> ChosenDtype:
    """`wanted`; for "auto" the checkpoint's type where every rank multiplies it natively, else
    float32: what a CPU imitates, it does 2 to 8 times slower than float32. GPUs have them all.

    `native`: of each rank, what `machine.native_dtypes` finds of its CPU; `hosts`: where it runs.
    """
    if device == "cuda":
        why = "the checkpoint's" if wanted == "auto" else ""
        return ChosenDtype(checkpoint if wanted == "auto" else wanted, why, "")
    name = checkpoint if wanted == "auto" else wanted
    lacking = [rank for rank, dtypes in enumerate(native) if name not in ("float32", *dtypes)]
    if wanted != "auto":
        return ChosenDtype(wanted, "", _emulated(wanted, lacking, native, hosts))
    if name == "float32":
        return ChosenDtype(name, "the checkpoint's", "")
    if not lacking:
        return ChosenDtype(name, f"the checkpoint's, native on {_ranks([], native, hosts)}", "")
    where = _ranks(lacking, native, hosts)
    return ChosenDtype("float32", f"{where} would only imitate the checkpoint's {name}", "")


def _emulated(
    name: str, lacking: Sequence[int], native: Sequence[Collection[str]], hosts: Sequence[str]
) -> str:
    if not lacking:
        return ""
    return (
        f"{_ranks(lacking, native, hosts)} has no {name} instructions: they are imitated, which is "
        "several times slower than --dtype float32; --dtype auto takes what is fastest"
    )


def _ranks(
    ranks: Sequence[int], native: Sequence[Collection[str]], hosts: Sequence[str] = ()
) -> str:
    """Those ranks in words, or all of them."""
    if not ranks or len(ranks) == len(native):
        return "this CPU" if len(set(hosts)) < 2 else "every CPU"
    return ", ".join(f"rank {rank}" + (f" ({hosts[rank]})" if hosts else "") for rank in ranks)
