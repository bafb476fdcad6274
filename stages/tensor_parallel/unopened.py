"""Packages that are imported without running their `__init__`, for the sake of a few files in them.

What such a package brings in may be a hundred times what these files need. So it stays unopened:
files in it are found and imported as ever, and whoever asks it for a name that only its `__init__`
has, has that run then.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def leave_unopened(*names: str) -> None:
    """From now on; outer packages first. One that is imported already stays as it is."""
    for name in names:
        if name not in sys.modules:
            spec = find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"there is no package {name}", name=name)
            package = sys.modules[name] = module_from_spec(spec)
            package.__class__ = _Unopened
            parent, _, own = name.rpartition(".")
            setattr(sys.modules[parent], own, package)


class _Unopened(ModuleType):
    """A package that has found its files, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        """Called for what it has not."""
        if name.startswith("__"):  # which modules may have or not
            raise AttributeError(name)
        file = f"{self.__name__}.{name}"
        if find_spec(file) is not None:
            return import_module(file)
        self.__class__ = ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
