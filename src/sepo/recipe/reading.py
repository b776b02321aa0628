"""Read a recipe file and `key=value` overrides into a `Recipe`. Errors name the key."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sepo.errors import UserError, nearest, one_line, wrong_type
from sepo.files import expand_home
from sepo.recipe.settings import Recipe, Settings


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a file, a built-in name, or None for all defaults) and apply overrides such as `oracle.beta=0.2`.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, or a value is impossible; the message
            names the key and, for a misspelt one, the nearest valid key.
    """
    if not isinstance(overrides, list | tuple) or not all(isinstance(one, str) for one in overrides):
        raise wrong_type("overrides", overrides, "a list of texts, such as ['oracle.beta=0.2']")
    values: dict[str, Any] = {}
    where = "command line"
    if path is not None:
        path = find_file(path, "recipe")
        where = str(path)
        values = read_settings(path, "recipe")
        if "variants" in values:
            raise UserError(f"{path} has variants, so it is a grid: run it with `sepo compare`, or name its base here")
        values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "sepo")
    for override in overrides:
        set_key(values, *parse_override(override), f"override '{override}'")
    return parse_recipe(values, where)


def find_file(name: str | Path, kind: str) -> Path:
    """Find a recipe or grid by path, or by its name in the package. Raises UserError."""
    path = Path(expand_home(name, f"the {kind}"))
    if path.is_file():
        return path
    if (found := find_builtin(str(name))) is not None:
        return found
    near = nearest(str(name), builtin_recipes())
    raise UserError(f"no {kind} at '{name}'{near}: expected a YAML file, or a name that `sepo recipe --list` shows")


def builtin_recipes() -> dict[str, Path]:
    """The files that come with the package, by name: recipes first, then the grids of `experiments/`."""
    folder = Path(str(resources.files("sepo.recipes")))
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("experiments/*.yaml"))]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_builtin(name: str) -> Path | None:
    """The file of a built-in recipe or grid; `experiments/` may be left out of a grid's name."""
    known = builtin_recipes()
    return known.get(name) or known.get(f"experiments/{name}")


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Read a mapping from a YAML file; `kind` names it in error messages."""
    values = _read_yaml(_decoded(path), str(path)) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def _decoded(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16, which PowerShell's `>` writes."""
    content = path.read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 (is it Latin-1?): save the file as UTF-8") from None


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a mapping of settings; `where` names its origin in error messages."""
    _check_values(values, where)
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None
    except TypeError:
        raise UserError(f"{where}: keys must be words, found {sorted(map(str, values))}") from None


_MOST_VALUES = 20_000


def _check_values(values: Any, where: str) -> None:
    """Refuse what YAML can write but no recipe can mean: texts that no file name holds, and values without end
    (an alias inside itself, or aliases of aliases that grow to billions).
    """
    stack, seen = [values], 0
    while stack:
        value = stack.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise UserError(f"{where}: holds more than {_MOST_VALUES:,} values: expected a recipe, see `sepo recipe`")
        if isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value
        elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{where}: {short_text(value)} holds a character that is no text: expected UTF-8 without NUL"
            )


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every setting included; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def settings_class(annotation: Any) -> type[Settings] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-7 is a number, as everyone who writes a learning rate expects (YAML 1.1 wants 5.0e-7), 010 is
    not 8, 1:30 is not 90, and a key that occurs twice is an error instead of its last value.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in keys[:number]:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' occurs twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds no objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = one_line(getattr(error, "problem", None) or error)
        raise UserError(f"{where}{place}: not valid YAML ({problem}){_advice(problem)}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: not valid YAML ({error})") from None


def _advice(problem: str) -> str:
    """What to do about a problem that YAML names in its own terms."""
    if "'\\t'" in problem:
        return ": indent with spaces; YAML takes no tabs there"
    if "escape" in problem:
        return ": in double quotes a backslash begins an escape, so write Windows paths in single quotes or with /"
    return ": the file is UTF-16 without its mark; save it as UTF-8" if "#x0000" in problem else ""


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value` into the key and its YAML value."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}': expected key=value, for example oracle.beta=0.2")
    return key.strip(), _read_yaml(text, f"override '{override}'")


def set_key(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a setting named with dots (`oracle.beta`) in a nested mapping; `where` names its origin in error messages."""
    *parents, last = key.strip().split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise UserError(f"{where}: '{parent}' is a value, not a group of settings")
    target[last] = value


def explain(error: ValidationError, root: type[BaseModel] | None = None) -> str:
    """One line for the first problem pydantic found, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    alternatives = _alternatives(problems, root or Recipe)
    path = ".".join(str(part) for part in (first["loc"] if len(alternatives) < 2 else first["loc"][:-1]))
    if first["type"] == "extra_forbidden":
        owner = _owner(first["loc"][:-1], root or Recipe)
        choices = list(owner.model_fields) if owner else []
        text = f"unknown key '{path}'{_meant(str(first['loc'][-1]), owner)}"
        if choices:
            text += f"; valid keys: {', '.join(choices)}"
    else:
        messages = [problem["msg"].removeprefix("Value error, ") for problem in alternatives]
        text = f"{path} is {short_text(first['input'])}: {' or '.join(text[0].lower() + text[1:] for text in messages)}"
        text += _share(first)
    more = len(problems) - len(alternatives)
    return text + (f" (and {more} more problems)" if more else "")


def _share(problem: Any) -> str:
    """What to write for a percentage: `30%`, or 30 where at most 1 is allowed."""
    value, most = problem["input"], problem.get("ctx", {})
    per_cent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    of_one = 1 in (most.get("le"), most.get("lt")) and isinstance(value, int | float) and 1 < value <= 100
    number = float(per_cent[1]) if per_cent else value
    return f" (a share: {number / 100:g} for {number:g} %)" if per_cent or of_one else ""


def _alternatives(problems: list[Any], root: type[BaseModel]) -> list[Any]:
    """The first problem, and those of the other types that the same setting may have.

    pydantic names the type in the last part of the path: policy.training.learning_rate.float.
    """
    first = problems[0]
    above = first["loc"][:-1]
    if not first["loc"] or isinstance(first["loc"][-1], int) or _owner(above, root) is not None:
        return [first]
    return [problem for problem in problems if problem["loc"][:-1] == above and problem["input"] is first["input"]]


# Names that other trainers give to settings.
_OTHER_NAMES = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "bs": "batch_size",
    "per_device_train_batch_size": "batch_size", "model_name": "model", "model_name_or_path": "model",
    "dataset": "source", "dataset_name": "source", "max_seq_length": "max_length", "lora_r": "r",
    "gradient_accumulation_steps": "batch_size", "output": "output_dir",
}  # fmt: skip


def _meant(key: str, owner: type[BaseModel] | None) -> str:
    """The setting that an unknown key may mean: by its name elsewhere, in a group below, or by its spelling."""
    if owner is None:
        return ""
    known = _OTHER_NAMES.get(key.lower(), key)
    if place := _below(known, owner):
        return f" (did you mean '{place}'?)"
    return nearest(key, owner.model_fields)


def _below(key: str, owner: type[BaseModel]) -> str:
    """The path of a setting in a group, or in the groups below it; empty if there is none or there are several."""
    if key in owner.model_fields:
        return key
    places = []
    for name, info in owner.model_fields.items():
        group = settings_class(info.annotation)
        if group is not None and (place := _below(key, group)):
            places.append(f"{name}.{place}")
    return places[0] if len(places) == 1 else ""


def _owner(path: Sequence[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    owner: type[BaseModel] | None = root
    for part in path:
        info = owner.model_fields.get(str(part)) if owner else None
        owner = settings_class(info.annotation) if info else None
    return owner


def short_text(value: Any) -> str:
    try:
        text = reprlib.repr(value)  # looks no deeper than it shows
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
