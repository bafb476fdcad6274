"""Every script of bench/ still finds what it names in the project.

All of them import and answer `--help`. Those that stand in for parts of the project, or look into
them, run in their smallest form: what they name there, no import would miss.
"""

import ast
import importlib
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted([*BENCH.glob("*.py"), *BENCH.glob("peers/*.py")])
OF_STAGES = ("loading_stage.py", "poisoned_stage.py")
"""Programs that a keeper starts, and nobody else."""


def is_run(path: Path) -> bool:
    return path.name not in OF_STAGES and '__name__ == "__main__"' in path.read_text()


@pytest.fixture
def run_script(monkeypatch):
    """Runs one in this process with these arguments; returns its exit code."""

    def run(path: Path, *arguments: str) -> int | str | None:
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return run


@pytest.mark.parametrize("path", filter(is_run, SCRIPTS), ids=lambda path: path.name)
def test_it_answers_help(run_script, capsys, path):
    assert run_script(path, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: {path.name} ")
    description = ast.get_docstring(ast.parse(path.read_text()))
    assert path.parent.name == "peers" or " ".join(description.split()) in said
