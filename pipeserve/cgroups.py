"""Control groups of this process: what a container, or a service of systemd, lets it use of its
machine.

A group is a folder of files. Version 2 has one tree of groups, version 1 one for each controller,
and a machine may have both. The limits of every group around a process hold, not only those of its
own (golang/go#81180). Kernel documentation: admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1.
"""

import re
from math import inf
from pathlib import Path
from typing import NamedTuple

_OCTAL = re.compile(r"\\([0-7]{3})")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
"""Of a group's memory.stat: pages that the kernel takes back where they are needed, such as those
of files that were read, weights among them. As LXCFS counts them (src/proc_fuse.c), and
MemAvailable does; "inactive_file" alone calls a model that was loaded twice memory in use
(ollama#15704)."""


class Group(NamedTuple):
    """One of them."""

    folder: Path
    version: int

    def memory_limit(self) -> float:
        """Bytes; inf: none. Over "high", too, nothing can be kept: without swap a process stands
        still there, and is not even ended."""
        if self.version == 2:
            return min(self._number("memory.max"), self._number("memory.high"))
        return self._number("memory.limit_in_bytes")

    def used_memory(self) -> float:
        """Bytes that processes in it, or in groups of it, hold; without what would make room."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        prefix = "" if self.version == 2 else "total_"
        used = self._number(name, otherwise=0)
        for line in _text(self.folder / "memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key.removeprefix(prefix) in _RECLAIMABLE and key.startswith(prefix):
                used -= int(value)
        return max(used, 0)

    def cpu_limit(self) -> float:
        """CPUs that its processes together may keep busy; inf: no limit."""
        if self.version == 2:
            quota, _, period = _text(self.folder / "cpu.max").strip().partition(" ")
        else:
            quota = _text(self.folder / "cpu.cfs_quota_us").strip()
            period = _text(self.folder / "cpu.cfs_period_us").strip()
        if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
            return inf  # "max", -1, or no such file
        return int(quota) / int(period)

    def _number(self, name: str, otherwise: float = inf) -> float:
        text = _text(self.folder / name).strip()
        return int(text) if text.isdecimal() else otherwise


def groups_of(controller: str, root: Path = Path("/")) -> list[Group]:
    """Those that limit this process's "memory" or "cpu", as far as they can be seen from here: its
    own, then those around it, outermost last. `root` stands for the folder / of the machine."""
    paths = _own_paths(controller, root)
    groups = []
    for version, path in paths.items():
        mounts = _mounts(controller, version, root)
        # One tree may be mounted several times, in part: this process's part, if any, counts.
        near = [mount for mount in mounts if _below(path, mount.shown) is not None]
        for mount in (near or mounts)[:1]:
            # A process in a namespace of its own, or one that was moved, may be told a path that
            # cannot be found: what is mounted is then the container's own group, or one around it.
            inner = mount.at / (_below(path, mount.shown) or "")
            for folder in (inner, *inner.parents):
                groups.append(Group(folder, version))
                if folder == mount.at:
                    break
    return groups


class _Mount(NamedTuple):
    shown: str
    """The group that is seen there, as a path in its tree."""
    at: Path


def _own_paths(controller: str, root: Path) -> dict[int, str]:
    """Where this process is in the tree of each version."""
    paths = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)  # of a path with colons
        if controller in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    return paths


def _mounts(controller: str, version: int, root: Path) -> list[_Mount]:
    """Where the tree can be seen. See proc_pid_mountinfo(5)."""
    mounts = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, shown, at, *_ = before.split(" ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" if version == 2 else _is_of(controller, kind, options):
            mounts.append(_Mount(_plain(shown), root / _plain(at).lstrip("/")))
    return mounts


def _is_of(controller: str, kind: str, options: str) -> bool:
    return kind == "cgroup" and controller in options.split(",")  # "cpu" is not "cpuset"


def _below(path: str, folder: str) -> str | None:
    """What is left of `path` inside `folder`; None where it is not inside."""
    start = folder.rstrip("/") + "/"
    inside = (path.rstrip("/") + "/").startswith(start) and ".." not in path.split("/")
    return path[len(start) :] if inside else None


def _plain(escaped: str) -> str:
    """Of a path in mountinfo, where a space is \\040."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), escaped)


def _text(path: Path) -> str:
    """Empty where it cannot be read: a limit that cannot be seen is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
