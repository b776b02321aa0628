"""Modules of releases before 0.2 under the names that they had, with a word of where they are now.

`from sepo.trainer import PreferenceTrainer` goes on working: the old name is another name of the new module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

MOVED = {
    "sepo.loading": "sepo.data.loading",
    "sepo.tables": "sepo.data.tables",
    "sepo.rewards": "sepo.credit.rewards",
    "sepo.selection": "sepo.credit.selection",
    "sepo.packing": "sepo.forward.packing",
    "sepo.logps": "sepo.forward.logps",
    "sepo.objectives": "sepo.training.objectives",
    "sepo.trainer": "sepo.training.trainer",
    "sepo.pipeline": "sepo.runs.pipeline",
    "sepo.compare": "sepo.runs.compare",
    "sepo.grid": "sepo.recipe.grid",
    "sepo.evaluate.run": "sepo.evaluate.measure",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {MOVED[spec.name]}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        pass


def names_of(package: str, modules: dict[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: names by the module that holds them, imported when they are first used."""

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(modules[name]), name)

    return find


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
