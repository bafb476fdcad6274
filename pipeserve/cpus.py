"""Cores of this machine: which CPUs are threads of one core, and which cores share a memory.

What the kernel numbers are CPUs. Of a core with hyperthreads it numbers two or more, often far
apart (0 and 32 of 64), and they share what the core can compute.
"""

import re
from collections.abc import Collection
from pathlib import Path

Core = tuple[int, ...]
"""Its CPUs."""
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def cores_of(cpus: Collection[int], root: Path = Path("/")) -> list[Core]:
    """`cpus` by core; cores of one NUMA node stand side by side. Where the kernel does not say, as
    in some sandboxes, each CPU is a core, and all are of one node. `root` stands for the folder /.
    """
    system = root / "sys/devices/system"
    nodes = [_numbers(path) for path in sorted(system.glob("node/node[0-9]*/cpulist"))]
    by_core: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(cpus):
        siblings = _numbers(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") | {cpu}
        first = min(siblings & set(cpus))
        node = next((place for place, node in enumerate(nodes) if first in node), 0)
        by_core.setdefault((node, first), []).append(cpu)
    return [tuple(by_core[place]) for place in sorted(by_core)]


def _numbers(path: Path) -> set[int]:
    """Of a list as the kernel writes it, such as 0-3,8; none where it cannot be read."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return set()
    found: set[int] = set()
    for part in text.strip().split(","):
        if (match := _RANGE.fullmatch(part)) is not None:
            found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found
