"""Recipes and grids that come with the package, by name: `sepo run quickstart`, `sepo recipe quickstart > mine`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sepo.errors import UserError, nearest


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


def read(name: str) -> str:
    """The text of a built-in recipe or grid.

    Raises:
        UserError: there is none of that name.
    """
    path = find(name)
    if path is None:
        raise UserError(f"no built-in recipe '{name}'{nearest(name, names())}: see `sepo recipe --list`")
    return path.read_text(encoding="utf-8")


def about(path: Path) -> str:
    """What a recipe says of itself: the first sentence of the comment at its head."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    text = " ".join(lines)
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
