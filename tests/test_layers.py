"""Who may import whom (docs/design.md): rooms are folders, and arrows between them go one way.

Imports inside functions count, and so does a module that is named in a string, as programs to start
are. Left out is `pipeserve/__init__.py`, the front door, which names what it hands out.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("pipeserve", "stages", "profiling", "launch", "configs")
FRONT_DOOR = "pipeserve"
MAY_SEE = {
    "addresses": set(),
    "errors": set(),
    "cgroups": set(),
    "cpus": set(),
    "machine": {"cgroups"},
    "sampling_params": set(),
    "core": {"errors", "sampling_params"},
    "core.cost": {"errors", "core"},
    "core.policies": {"errors", "core", "core.cost"},
    "configs": {"addresses", "errors", "core", "core.cost", "core.policies"},
    "wire": {"addresses", "errors", "machine", "core", "configs", "sampling_params"},
    "stages.config": {"errors"},
    "stages.config.families": {"errors", "stages.config"},
    "stages.attention": {"stages.config"},
    "stages.backends": {"errors", "stages.attention", "stages.config"},
    "stages.backends.cpu": {"machine", "stages.attention", "stages.backends"},
    "stages.layers": {"stages.attention", "stages.backends", "stages.config"},
    "stages.tensor_parallel": {"errors", "stages.config", "stages.layers"},
    "stages.families": {
        "stages.attention",
        "stages.config",
        "stages.config.families",
        "stages.layers",
    },
    "stages": {
        "core",
        "sampling_params",
        "stages.attention",
        "stages.backends",
        "stages.backends.cpu",
        "stages.config",
        "stages.config.families",
        "stages.families",
        "stages.layers",
        "stages.tensor_parallel",
    },
    "stages.checkpoint": {
        "errors",
        "stages",
        "stages.config",
        "stages.config.families",
        "stages.layers",
    },
    "stage": {
        "addresses",
        "cgroups",
        "core",
        "cpus",
        "errors",
        "machine",
        "sampling_params",
        "stages",
        "stages.attention",
        "stages.checkpoint",
        "stages.config.families",
        "stages.tensor_parallel",
        "wire",
    },
    "driver": {
        "addresses",
        "configs",
        "core",
        "core.cost",
        "core.policies",
        "errors",
        "machine",
        "sampling_params",
        "stage",
        "stages.checkpoint",
        "stages.config",
        "stages.config.families",
        "wire",
    },
    "frontend": {"errors", "core", "configs", "driver", "sampling_params"},
    "server": {"errors", "core", "configs", "frontend", "sampling_params", "server.openai", "wire"},
    "server.openai": {"errors", "core", "frontend", "sampling_params"},
    "profiling.recording": {"errors", "core"},
    "profiling.ledger": {"core", "profiling.recording"},
    "profiling.simulation": {
        "errors",
        "core",
        "core.cost",
        "profiling.recording",
        "sampling_params",
    },
    "profiling.calibration": {"errors", "core", "core.cost"},
    "profiling.search": {"errors", "core", "core.cost", "core.policies", "profiling.simulation"},
    "profiling.advice": {
        "errors",
        "core",
        "core.policies",
        "profiling.calibration",
        "profiling.ledger",
        "profiling.recording",
        "profiling.simulation",
    },
    "profiling.pages": {"core", "profiling.ledger", "profiling.recording"},
    "profiling": set(),
}
"""Of each room below `launch`, which sees all of these: the command line hands the runtime and the
profiler to each other, and neither of them sees the other."""
LAUNCH_MAY_SEE = {
    "launch.emulated": set(),
    "launch.show": set(),
    "launch.job": set(),
    "launch.inputs": {"launch.job"},
    "launch.run": {"launch.emulated", "launch.show"},
    "launch.verbs": {"launch.inputs", "launch.run", "launch.show"},
    "launch.commands": {"launch.inputs", "launch.job", "launch.run", "launch.verbs"},
    "launch": {"launch.commands"},
    "__main__": {"launch"},
}
# What the pure part may use of the standard library: nothing that reads, writes, waits or draws.
PURE = {
    "array",
    "bisect",
    "collections",
    "dataclasses",
    "difflib",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "operator",
    "types",
    "typing",
}


def modules() -> dict[str, Path]:
    """Every module of the project by import name; the links in pipeserve/ are not followed."""
    found = {}
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "pipeserve" and len(parts) > 1 and parts[1] in TOPS:
                continue
            name = ".".join(parts if top == "pipeserve" else ("pipeserve", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def mentions(name: str, is_package: bool, source: str) -> Iterator[str]:
    """Full names of all that a module imports, and strings that might be a module's name;
    `from a import b` counts as a.b."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            yield node.value


def used_modules(name: str, is_package: bool, source: str) -> set[str]:
    """Other modules of the project that a module uses."""
    used = set()
    for mentioned in mentions(name, is_package, source):
        while mentioned and mentioned not in MODULES:
            mentioned = mentioned.rpartition(".")[0]
        used.add(mentioned)
    return used - {"", name}


def room_of(name: str) -> str:
    """The folder that a module lies in, from `pipeserve` on; one that all may use is its own."""
    path = MODULES[name].relative_to(ROOT)
    parts = path.parts[1 if path.parts[0] == "pipeserve" else 0 : -1]
    return ".".join(parts) or path.stem


USES = {
    name: used_modules(name, path.stem == "__init__", path.read_text("utf-8")) - {FRONT_DOOR}
    for name, path in MODULES.items()
    if name != FRONT_DOOR
}


def circles(arrows: Mapping[str, set[str]]) -> list[str]:
    """What is left when everything without an arrow to another of the rest has gone."""
    rest = {name: set(others) - {name} for name, others in arrows.items()}
    while leaves := {name for name, others in rest.items() if not others & rest.keys()}:
        for name in leaves:
            del rest[name]
    return sorted(rest)


def test_every_room_is_known():
    rooms = {room_of(name) for name in USES}
    assert rooms == MAY_SEE.keys() | LAUNCH_MAY_SEE.keys()


@pytest.mark.parametrize("name", sorted(USES))
def test_arrows_go_as_they_may(name):
    room = room_of(name)
    is_launch = room in LAUNCH_MAY_SEE
    allowed = LAUNCH_MAY_SEE[room] | MAY_SEE.keys() if is_launch else MAY_SEE[room]
    forbidden = {other for other in USES[name] if room_of(other) not in allowed | {room}}
    assert not forbidden, f"{name} ({room}) may not see {sorted(forbidden)}"


def test_no_circle_between_rooms():
    assert not circles({**MAY_SEE, **LAUNCH_MAY_SEE})
    seen: dict[str, set[str]] = {}
    for name, others in USES.items():
        seen.setdefault(room_of(name), set()).update(map(room_of, others))
    assert not circles(seen)


def test_no_circle_between_modules():
    assert not circles(USES)


def test_what_is_allowed_is_used():
    """Or the table would grow stale."""
    used = {(room_of(name), room_of(other)) for name in USES for other in USES[name]}
    stale = {(room, other) for room, others in MAY_SEE.items() for other in others} - used
    assert not stale


@pytest.mark.parametrize("name", sorted(n for n in USES if n.startswith("pipeserve.core")))
def test_the_core_is_pure(name):
    path = MODULES[name]
    source = path.read_text("utf-8")
    named = set(mentions(name, path.stem == "__init__", source))
    foreign = {each.split(".")[0] for each in named} - {"pipeserve"}
    assert foreign <= PURE, f"{name} imports {sorted(foreign - PURE)}"
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("def f():\n    import pipeserve.stages.stage", {"pipeserve.stages.stage"}),
        ("from pipeserve.driver import fleet", {"pipeserve.driver.fleet"}),
        ("from .. import errors", {"pipeserve.errors"}),
        ("from ..driver import fleet", {"pipeserve.driver.fleet"}),
        ("from . import nouns\nfrom .nouns import Chunk", {"pipeserve.core.nouns"}),
        ("import pipeserve.core.nouns as n", {"pipeserve.core.nouns"}),
        ("start('-m', 'pipeserve.stage.worker')", {"pipeserve.stage.worker"}),
        ("from pipeserve import LLM\nimport torch", {"pipeserve"}),
    ],
)
def test_the_rule_sees_every_form(source, used):
    assert used_modules("pipeserve.core.x", False, source) == used


@pytest.mark.parametrize(
    ("arrows", "left"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, ["a", "b", "c"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}, ["a", "b", "c"]),
        ({"a": {"a"}}, []),
    ],
)
def test_circles_are_found(arrows, left):
    assert circles(arrows) == left


WITHOUT_TORCH = """
import importlib, pkgutil, sys
sys.modules["torch"] = None  # an import of it now raises
for name in ("pipeserve.core", "pipeserve.profiling"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_core_and_profiling_load_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pipeserve.core.policies.uniform" in done.stdout.split()
