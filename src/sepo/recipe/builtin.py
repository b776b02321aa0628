"""Recipes and grids that come with the package, by name: `sepo run quickstart`, `sepo recipe quickstart > mine`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def folder() -> Path:
    """Where the package keeps them."""
    return Path(str(resources.files("sepo.recipes")))


def names() -> dict[str, Path]:
    """Files by name: recipes first, then the grids of `experiments/`."""
    files = [*sorted(folder().glob("*.yaml")), *sorted(folder().glob("experiments/*.yaml"))]
    return {file.relative_to(folder()).with_suffix("").as_posix(): file for file in files}


def find(name: str) -> Path | None:
    """The file of a built-in recipe or grid; `experiments/` may be left out of a grid's name."""
    known = names()
    return known.get(name) or known.get(f"experiments/{name}")
