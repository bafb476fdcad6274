"""What this process may have of its machine: kinds of containers, each as the files in /proc and
/sys/fs/cgroup that it is told by, and most of them as somebody was told wrong by them."""

import os
from math import inf

import pytest

from pipeserve.cgroups import groups_of
from pipeserve.machine import memory_limits, num_cpus

GIB = 1 << 30
TOTAL, AVAILABLE = 64 * GIB, 40 * GIB
NONE_V1 = 9223372036854771712
"""What version 1 says for no limit."""

V2 = "0 0 0:1 {shown} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1(controllers, shown="/"):
    return f"0 0 0:1 {shown} /sys/fs/cgroup/{controllers} rw - cgroup cgroup rw,{controllers}"


@pytest.fixture
def machine(tmp_path):
    """Writes the files of a machine, and gives the folder that stands for its /."""

    def write(cgroup="", mounts=(), files=None):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        (tmp_path / "proc/self/mountinfo").write_text("\n".join(mounts))
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal: {TOTAL // 1024} kB\nMemAvailable: {AVAILABLE // 1024} kB\n"
        )
        for name, content in (files or {}).items():
            path = tmp_path / f"sys/fs/cgroup/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


def least(root):
    """Of all memory, and of free memory."""
    limits = memory_limits(root)
    return min(limit.num_bytes for limit in limits), min(limit.free_bytes for limit in limits)


# ---- where the groups are -----------------------------------------------------------------------

SCOPE = "/kubepods.slice/pod7/cri-containerd-1.scope"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "folder"),
    [
        # A namespace of its own: the path is / (uber-go/automaxprocs#43).
        ("0::/", [V2.format(shown="/")], ""),
        ("0::/", [V2.format(shown="/..")], ""),
        # None, as on the machine itself, or in docker run --cgroupns=host.
        (f"0::{SCOPE}", [V2.format(shown="/")], SCOPE[1:]),
        # What is mounted is the container's own group, or one around it (golang/go#76390).
        (f"0::{SCOPE}", [V2.format(shown=SCOPE)], ""),
        (f"0::{SCOPE}", [V2.format(shown="/kubepods.slice")], "pod7/cri-containerd-1.scope"),
        # Moved out of what is mounted (automaxprocs#85), or out of its namespace.
        ("0::/nomad/shared", [V2.format(shown=SCOPE)], ""),
        ("0::/../other", [V2.format(shown="/")], ""),
        # A name that another begins with (openjdk/jdk#8629).
        ("0::/foo/bar", [V2.format(shown="/fo")], ""),
        # Mounted twice, once of another container (automaxprocs#41).
        (
            f"0::{SCOPE}",
            ["0 0 0:1 /docker/2 /mnt/other rw - cgroup2 cgroup2 rw", V2.format(shown=SCOPE)],
            "",
        ),
        # A colon in the path (duckdb#16608), and a space in that of the mount.
        ("0::/system.slice:docker:1", [V2.format(shown="/")], "system.slice:docker:1"),
        ("0::/my group/1", [V2.format(shown="/my\\040group")], "1"),
        # Version 1 alone, with or without the machine's paths.
        (f"4:memory:{SCOPE}\n3:cpu,cpuacct:{SCOPE}",
         [v1("cpuset"), v1("memory"), v1("cpu,cpuacct")], SCOPE[1:]),
        (f"4:memory:{SCOPE}\n3:cpu,cpuacct:{SCOPE}",
         [v1("cpuset"), v1("memory", SCOPE), v1("cpu,cpuacct", SCOPE)], ""),
        # Both, where version 2 has no limits of its own to set.
        (f"4:memory:{SCOPE}\n3:cpu,cpuacct:{SCOPE}\n1:name=systemd:/\n0::/",
         ["0 0 0:1 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw", v1("memory"),
          v1("cpu,cpuacct")], SCOPE[1:]),
    ],
)  # fmt: skip
def test_the_limits_of_its_own_group(machine, cgroup, mounts, folder):
    is_v1 = "memory" in cgroup
    memory, cpu = ("memory", "cpu,cpuacct") if is_v1 else ("", "")
    files = {
        f"{memory}/{folder}/memory.max": 8 * GIB,
        f"{memory}/{folder}/memory.limit_in_bytes": 8 * GIB,
        f"{cpu}/{folder}/cpu.max": "200000 100000",
        f"{cpu}/{folder}/cpu.cfs_quota_us": 200000,
        f"{cpu}/{folder}/cpu.cfs_period_us": 100000,
        "cpuset/cpu.cfs_quota_us": 100000,  # of another tree
    }
    root = machine(cgroup, mounts, files)
    assert least(root) == (8 * GIB, 8 * GIB)
    assert num_cpus(root) == 2


def test_any_group_around_it_may_be_the_tighter_one(machine):
    """golang/go#81180."""
    files = {
        "pod/memory.max": 6 * GIB,
        "pod/cpu.max": "300000 100000",
        "pod/container/memory.max": "max",
        "pod/container/cpu.max": "max 100000",
        "pod/container/worker/memory.max": 7 * GIB,
        "pod/container/worker/cpu.max": "1600000 200000",
    }
    root = machine("0::/pod/container/worker", [V2.format(shown="/")], files)
    assert least(root)[0] == 6 * GIB
    assert num_cpus(root) == 3


@pytest.mark.parametrize(
    ("cgroup", "mounts"),
    [
        ("", []),  # hidden by a sandbox, or a kernel without groups
        ("0::/", []),
        ("", [V2.format(shown="/")]),
        (f"0::{SCOPE}", [V2.format(shown="/")]),  # whose files are not there
    ],
)
def test_what_cannot_be_seen_limits_nothing(machine, cgroup, mounts):
    root = machine(cgroup, mounts)
    assert least(root) == (TOTAL, AVAILABLE)
    assert num_cpus(root) == 64


def test_this_machine_can_be_read():
    assert all(0 < limit.free_bytes <= limit.num_bytes for limit in memory_limits())
    assert 1 <= num_cpus() <= 64
    for group in groups_of("memory"):
        assert group.memory_limit() > 0 and group.used_memory() < inf


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max", NONE_V1, TOTAL, 100 * GIB, "", "nonsense", -1])
@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_is_spelled_in_many_ways(machine, limit, version):
    """And then what the group uses means nothing (ollama#15961); nor is a limit over the machine's
    memory one (vllm#45086)."""
    files = {
        "memory/memory.limit_in_bytes": limit,
        "memory/memory.usage_in_bytes": 30 * GIB,
        "memory.max": limit,
        "memory.current": 30 * GIB,
    }
    kinds = {1: ("4:memory:/", [v1("memory")]), 2: ("0::/", [V2.format(shown="/")])}
    assert least(machine(*kinds[version], files)) == (TOTAL, AVAILABLE)


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_that_were_read_are_free(machine, version):
    """Of a model that was loaded before they are most of what a group uses, and those of one that
    was loaded twice are "active" (ollama#15704)."""
    stat = "\n".join(
        f"{name} {number * GIB}"
        for name, number in {
            "anon": 2, "active_file": 3, "inactive_file": 1, "file": 4, "active_anon": 2,
            "total_active_file": 3, "total_inactive_file": 2, "total_active_anon": 2,
        }.items()
    )  # fmt: skip
    folder = {1: "memory/", 2: ""}[version]
    files = {
        f"{folder}memory.max": 10 * GIB,
        f"{folder}memory.limit_in_bytes": 10 * GIB,
        f"{folder}memory.current": 7 * GIB,
        f"{folder}memory.usage_in_bytes": 7 * GIB,
        f"{folder}memory.stat": stat,
    }
    kinds = {1: ("4:memory:/", [v1("memory")]), 2: ("0::/", [V2.format(shown="/")])}
    # Version 1 has the group's own, and with "total_" what the groups in it have, too.
    assert least(machine(*kinds[version], files))[1] == {1: 8 * GIB, 2: 7 * GIB}[version]


def test_over_the_soft_limit_a_process_stands_still(machine):
    """memory.high: without swap there is nothing that could be taken from it."""
    files = {"memory.max": 8 * GIB, "memory.high": 6 * GIB, "memory.current": 1 * GIB}
    assert least(machine("0::/", [V2.format(shown="/")], files)) == (6 * GIB, 5 * GIB)


def test_a_group_may_have_room_that_its_machine_has_not(machine):
    root = machine("0::/", [V2.format(shown="/")], {"memory.max": 60 * GIB, "memory.current": GIB})
    assert least(root) == (60 * GIB, AVAILABLE)


def test_more_in_use_than_is_allowed_is_nothing_free(machine):
    """The limit of a group that runs may be lowered."""
    root = machine("0::/", [V2.format(shown="/")], {"memory.max": GIB, "memory.current": 2 * GIB})
    assert least(root)[1] == 0


def test_who_shares_memory_gives_it_the_same_key(machine):
    """Two containers in one pod: the pod's limit and the machine are shared, their own are not."""
    files = {"pod/memory.max": 8 * GIB, "pod/a/memory.max": 4 * GIB, "pod/b/memory.max": 4 * GIB}
    root = machine("0::/pod/a", [V2.format(shown="/")], files)
    first = [limit.key for limit in memory_limits(root)]
    (root / "proc/self/cgroup").write_text("0::/pod/b\n")
    second = [limit.key for limit in memory_limits(root)]
    assert len({*first}) == len({*second}) == 3
    assert [key in second for key in first] == [True, False, True]  # machine, its own, the pod's


# ---- CPUs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("150000 100000", 1),
        ("765000 100000", 7),
        ("100000 50000", 2),
        ("6400000 100000", 64),
        ("12800000 100000", 64),  # more than there are
        ("0 100000", 64),
        ("200000 0", 64),
        ("max", 64),
        ("", 64),
    ],
)
def test_a_quota_of_time_is_so_many_cpus(machine, quota, expected):
    """Whole ones (lilbee#660)."""
    root = machine("0::/", [V2.format(shown="/")], {"cpu.max": quota})
    assert num_cpus(root) == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"), [(-1, 100000, 64), (250000, 100000, 2), (1000, 100000, 1)]
)
def test_a_quota_of_version_1(machine, quota, period, expected):
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": period}
    assert num_cpus(machine("3:cpu:/", [v1("cpu")], files)) == expected
