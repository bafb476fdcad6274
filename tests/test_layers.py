"""Who may import whom (docs/design.md), imports inside functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "pipeserve.stages": ROOT / "stages",
    "pipeserve.profiling": ROOT / "profiling",
    "pipeserve.launch": ROOT / "launch",
    "pipeserve.configs": ROOT / "configs",
    "pipeserve.core": ROOT / "pipeserve" / "core",
}
ERRORS = "pipeserve.errors"
ALLOWED = {
    "pipeserve.errors": set(),
    "pipeserve.core": {ERRORS},
    "pipeserve.configs": {ERRORS, "pipeserve.core"},
    "pipeserve.stages": {ERRORS},
    "pipeserve.profiling": {ERRORS, "pipeserve.core"},
    "pipeserve": {ERRORS, "pipeserve.core", "pipeserve.configs", "pipeserve.stages"},
    "pipeserve.launch": {
        ERRORS,
        "pipeserve",
        "pipeserve.core",
        "pipeserve.configs",
        "pipeserve.stages",
        "pipeserve.profiling",
    },
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
    "types",
    "typing",
}


def modules() -> dict[str, Path]:
    """Every module of the project by import name; the links in pipeserve/ are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            found[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    for path in (ROOT / "pipeserve").glob("*.py"):
        found[f"pipeserve.{path.stem}"] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(name: str, path: Path, source: str, types_too: bool = True) -> set[str]:
    """Full names of all that a module imports; `from a import b` counts as a.b.

    Without `types_too`, what stands under `if TYPE_CHECKING:`, and so never runs, is left out.
    """
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    tree = ast.parse(source)
    skipped = set() if types_too else for_types_alone(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def for_types_alone(tree: ast.AST) -> set[ast.AST]:
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    return {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}


def part_of(name: str) -> str | None:
    """The part of the project that a module belongs to; None for a foreign one."""
    for part in (*FOLDERS, ERRORS):
        if name == part or name.startswith(part + "."):
            return part
    return "pipeserve" if name.split(".")[0] == "pipeserve" else None


def parts_used(name: str, path: Path, source: str, types_too: bool = True) -> set[str]:
    """Other parts of the project that a module imports from."""
    used = {part_of(imported) for imported in imports(name, path, source, types_too)}
    return used - {None, part_of(name)}


@pytest.mark.parametrize(("name", "path"), sorted(modules().items()))
def test_imports_go_one_way(name, path):
    forbidden = parts_used(name, path, path.read_text("utf-8")) - ALLOWED[part_of(name)]
    assert not forbidden, f"{name} may not import {sorted(forbidden)}"


def test_only_two_programs_see_runtime_and_profiler():
    """The command line hands one to the other; an emulated stage is the runtime's loop around the
    simulator's times. Naming the runtime's types in annotations is not seeing it."""
    both = set()
    for name, path in modules().items():
        used = parts_used(name, path, path.read_text("utf-8"), types_too=False)
        if used >= {"pipeserve", "pipeserve.profiling"}:
            both.add(name)
    assert both <= {"pipeserve.launch.cli", "pipeserve.launch.emulated.stage"}


@pytest.mark.parametrize(
    ("name", "path"),
    sorted(item for item in modules().items() if part_of(item[0]) == "pipeserve.core"),
)
def test_the_core_is_pure(name, path):
    source = path.read_text("utf-8")
    foreign = {i.split(".")[0] for i in imports(name, path, source) if part_of(i) is None}
    assert foreign <= PURE, f"{name} imports {sorted(foreign - PURE)}"
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize(
    ("name", "source", "used"),
    [
        ("pipeserve.core.x", "def f():\n    import pipeserve.stages.llama", {"pipeserve.stages"}),
        ("pipeserve.core.x", "from pipeserve import driver", {"pipeserve"}),
        ("pipeserve.core.x", "from ..launch import cli", {"pipeserve.launch"}),
        ("pipeserve.core.x", "from .. import errors", {ERRORS}),
        ("pipeserve.core.x", "from . import nouns\nfrom .nouns import Chunk", set()),
        ("pipeserve.stages.x", "import pipeserve.core.nouns as n", {"pipeserve.core"}),
        ("pipeserve.launch.cli", "from pipeserve import LLM\nimport torch", {"pipeserve"}),
        ("pipeserve.stages.x", "import pipeserve\nimport pipeserve.errors", {"pipeserve", ERRORS}),
    ],
)
def test_the_rule_sees_every_form_of_import(name, source, used):
    assert parts_used(name, Path("x.py"), source) == used


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
