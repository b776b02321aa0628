"""Run two commits on the same small job and show where their tables, losses or metrics differ.

    python scripts/compare_commits.py A B                    any commits; "." is the working tree
    python scripts/compare_commits.py A . --recipe recipes/quickstart.yaml [key=value ...]

Each runs this checkout's `golden_run.py` in its own process, on one thread. Exit code 0: every table, loss and metric
is the same to the last bit; 1: the output lists the differences.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def source_of(commit: str, folder: Path) -> Path:
    """Check a commit out into `folder` and return its source folder; "." is the working tree."""
    if commit == ".":
        return HERE.parent / "src"
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], cwd=HERE.parent, check=True)
    return folder / "src"


def run(source: Path, out: Path, recipe: Path | None, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "golden_run.py"), "--out", str(out), *overrides]
    if recipe is not None:
        command += ["--recipe", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{source}: the run ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[tuple[str, str]]:
    """Differences of two descriptions by `golden_run.describe`: (where, how)."""
    found = []
    for name in sorted({*one["tables"], *two["tables"]}):
        a, b = one["tables"].get(name), two["tables"].get(name)
        if a is None or b is None:
            found.append((f"table {name}", f"only in the {'second' if a is None else 'first'}"))
            continue
        if a["rows"] != b["rows"]:
            found.append((f"table {name}", f"{a['rows']} and {b['rows']} rows"))
        for column in sorted({*a["columns"], *b["columns"]}):
            x, y = a["columns"].get(column, {}), b["columns"].get(column, {})
            if x.get("digest") != y.get("digest"):
                sums = f", sums {x['sum']:.9g} and {y['sum']:.9g}" if "sum" in x and "sum" in y else ""
                found.append((f"table {name}", f"{column} differs{sums}"))
    for name in sorted({*one["losses"], *two["losses"]}):
        a, b = one["losses"].get(name, []), two["losses"].get(name, [])
        if len(a) != len(b):
            found.append((f"losses {name}", f"{len(a)} and {len(b)} steps"))
        apart = [(step, x, y) for step, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y]
        if apart:
            step, x, y = apart[0]
            most = max(abs(x - y) for _, x, y in apart)
            found.append((f"losses {name}", f"differ from step {step}: {x:.9g} and {y:.9g}; at most by {most:.2g}"))
    for name in sorted({*one["metrics"], *two["metrics"]}):
        x, y = one["metrics"].get(name), two["metrics"].get(name)
        if x != y:
            found.append((f"metric {name}", f"{x} and {y}"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--recipe", type=Path, help="run this recipe instead of the small one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    arguments = parser.parse_args()
    recipe = None if arguments.recipe is None else arguments.recipe.resolve()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        try:
            described = []
            for name, commit in (("a", arguments.first), ("b", arguments.second)):
                print(f"running {commit}", file=sys.stderr, flush=True)
                source = source_of(commit, place / name)
                described.append(run(source, place / f"out-{name}", recipe, arguments.overrides))
        finally:
            for name in ("a", "b"):
                subprocess.run(
                    ["git", "worktree", "remove", "--force", str(place / name)],
                    cwd=HERE.parent, capture_output=True, check=False,
                )  # fmt: skip
    found = differences(*described)
    for where, how in found:
        print(f"{where:36s} {how}")
    tables, losses = (len(described[0][kind]) for kind in ("tables", "losses"))
    if not found:
        print(f"equal: {tables} tables, the losses of {losses} trainings, {len(described[0]['metrics'])} metrics")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
