"""`sepo recipe`: the settings of a recipe, and the recipes that come with the package."""

from __future__ import annotations

import argparse
import json

from sepo.command import print_plan

HELP = "print every setting of a recipe, or a recipe that comes with the package"


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("name", nargs="?", help="print this built-in recipe: sepo recipe quickstart > mine.yaml")
    group.add_argument("--list", action="store_true", help="list the recipes and grids that come with the package")
    group.add_argument("--schema", action="store_true", help="print a JSON schema, for completion in editors")


def run(arguments: argparse.Namespace) -> None:
    from sepo.recipe import builtin

    if arguments.list:
        print_plan("built in", [{"name": name, "what": builtin.about(path)} for name, path in builtin.names().items()])
    elif arguments.schema:
        from sepo.recipe.settings import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
    elif arguments.name is not None:
        print(builtin.read(arguments.name), end="")
    else:
        from sepo.recipe.reading import describe_recipe

        print(describe_recipe())
