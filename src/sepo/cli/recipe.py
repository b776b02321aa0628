"""`sepo recipe`: the settings of a recipe, and the recipes that come with the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sepo.command import print_plan
from sepo.errors import UserError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

HELP = "print every setting of a recipe, or a recipe that comes with the package"


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("name", nargs="?", help="print this built-in recipe: sepo recipe quickstart > mine.yaml")
    group.add_argument("--list", action="store_true", help="list the recipes and grids that come with the package")
    group.add_argument("--schema", action="store_true", help="print a JSON schema, for completion in editors")


def run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        from sepo.recipe.reading import builtin_recipes

        print_plan("built in", [{"name": name, "what": _about(path)} for name, path in builtin_recipes().items()])
    elif arguments.schema:
        from sepo.recipe.settings import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
    elif arguments.name is not None:
        print(_built_in(arguments.name), end="")
    else:
        print(describe_recipe())


def _built_in(name: str) -> str:
    """The text of a built-in recipe or grid.

    Raises:
        UserError: there is none of that name.
    """
    from sepo.recipe.reading import builtin_recipes, find_builtin

    path = find_builtin(name)
    if path is None:
        raise UserError(f"no built-in recipe '{name}'{nearest(name, builtin_recipes())}: see `sepo recipe --list`")
    return path.read_text(encoding="utf-8")


def _about(path: Path) -> str:
    """What a recipe says of itself: the first sentence of the comment at its head."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    text = " ".join(lines)
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def describe_recipe(model: type[BaseModel] | None = None, indent: int = 0) -> str:
    """Return a YAML text of all settings at their defaults, each with its description as a comment."""
    import yaml

    from sepo.recipe.reading import settings_class
    from sepo.recipe.settings import Recipe

    lines = []
    pad = "  " * indent
    for name, info in (model or Recipe).model_fields.items():
        inner = settings_class(info.annotation)
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        if inner is not None and default is not None:
            lines.append(f"{pad}{name}:  # {info.description}")
            lines.append(describe_recipe(inner, indent + 1))
        elif inner is not None:
            lines.append(f"{pad}{name}: null  # {info.description}; keys if given:")
            lines += [f"{pad}  # {line}" for line in describe_recipe(inner).splitlines()]
        else:
            shown = "REQUIRED" if info.is_required() else yaml.safe_dump(default, default_flow_style=True).strip()
            lines.append(f"{pad}{name}: {shown.removesuffix('...').strip()}  # {info.description}")
    return "\n".join(lines)
