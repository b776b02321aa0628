"""Run one grid in several processes: split its seeds into parts, then join the results.

    python benchmarks/grid_parts.py split GRID OUT PARTS [KEY=VALUE ...]    OUT/part-0.yaml, ...
    sepo compare OUT/part-0.yaml & ...                                      OUT/part-0/compare.json, ...
    python benchmarks/grid_parts.py join OUT                                OUT/compare.md, compare.json, pictures

A comparison locks its work folder, so each part has its own. Stages that depend on no seed (the data, the reference's
scoring) run once in each part; with an oracle a seed they cost little. Interrupted parts contribute their finished
runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from sepo.errors import UserError
from sepo.models.names import resolve_model
from sepo.recipe.reading import find_file, parse_override
from sepo.study.grid import grid_values, load_grid
from sepo.study.results import reading_notes, write_comparison


def split(grid: Path, out: Path, parts: int, overrides: list[str]) -> list[Path]:
    """Write a grid file for each part, with every n-th seed and all overrides; at most one part a seed.

    Fetches and converts the grid's models once, for all parts.

    Raises:
        UserError: the grid or an override is wrong, or the grid has a `sweep_seed`.
    """
    path = find_file(grid, "grid")
    whole, settings = load_grid(path, overrides)
    if whole.sweep_seed is not None:
        raise UserError(f"{path}: one seed decides the sweep for all seeds: leave sweep_seed out, or use one process")
    recipes = [setting.recipe for group in settings.values() for setting in group]
    models = {(one.model, one.revision) for recipe in recipes for one in (recipe.reference, recipe.policy)}
    for model, revision in models:
        if model is not None:
            resolve_model(model, revision=revision)
    values, left = grid_values(path, overrides)
    for override in left:
        key, value = parse_override(override)
        values.setdefault("set", {})[key] = value
    if whole.base is not None:
        values["base"] = str((path.parent / whole.base).resolve())
    values.pop("work_dir", None)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(min(parts, len(whole.seeds))):
        name = f"part-{index}"
        own = {"name": whole.name, "seeds": whole.seeds[index::parts], "output_dir": str((out / name).resolve())}
        files.append(out / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**values, **own}, sort_keys=False), encoding="utf-8")
    return files


def join(out: Path) -> list[str]:
    """Write the results of all parts as one comparison; returns notes on how to read them.

    Raises:
        UserError: no part has a result yet.
    """
    parts = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(out.glob("part-*/compare.json"))
    }
    if not parts:
        raise UserError(f"no part in '{out}' has a result: see its log")
    runs = [{**run, "folder": f"{name}/{run['folder']}"} for name, one in parts.items() for run in one["runs"]]
    # Seed by seed, as one process would run them: the first variant is the baseline.
    runs.sort(key=lambda run: run["seed"])
    shared = {item["stage"]: item for one in parts.values() for item in one["shared"]}
    tables = ("rows", "differences", "runs", "shared")
    head = {name: value for name, value in next(iter(parts.values())).items() if name not in tables}
    results = write_comparison(head, runs, list(shared.values()), out)
    return [f"{len(runs)} runs of {len(parts)} parts", *reading_notes(results["rows"], results["kl"])]


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["split"] and len(sys.argv) >= 5:
            print(*split(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]), sep="\n")
        elif sys.argv[1:2] == ["join"] and len(sys.argv) == 3:
            print(*join(Path(sys.argv[2])), sep="\n")
        else:
            sys.exit(__doc__)
    except UserError as error:
        print(f"grid_parts: {error}", file=sys.stderr)
        sys.exit(2)
