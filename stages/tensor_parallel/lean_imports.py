"""Imports of a few files without all that would come with them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def leave_unopened(*packages: str) -> None:
    """From now on these do not run their `__init__`; outer ones first. Files in them are imported
    as ever, and whoever asks one for a name that only its `__init__` has, has that run then. One
    that is imported already stays as it is."""
    for name in packages:
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


@contextmanager
def missing(*modules: str) -> Iterator[None]:
    """Meanwhile these cannot be imported, as where they are not installed: for what can do without.
    Those that are imported already stay."""
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
