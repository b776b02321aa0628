"""Run the bench: make the tasks, train every rule at every seed, and write the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sepo import processes
from sepo.bench.credit.board import page, picture
from sepo.bench.credit.grids import EMBEDDED, bench_of, grid_of, variants_of
from sepo.bench.credit.start import make_start
from sepo.bench.credit.tasks import SIZES, Sizes, make_task, write_pairs
from sepo.files import write_json, write_text
from sepo.study.comparison import compare


def run_bench(
    tasks: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    weights: Mapping[str, Path],
    sizes: Sizes = SIZES,
) -> str:
    """Do what is missing of a bench and write bench.md and bench.png; returns the leaderboard."""
    for task in tasks:
        if task not in EMBEDDED:
            prepare(task, out / "tasks" / task, sizes)
        grid, settings = grid_of(task, out, variants_of(rules, weights), seeds)
        compare(grid, settings)
        text = write_board([name for name in tasks if (out / name / "compare.json").is_file()], out)
    return text


def prepare(task: str, folder: Path, sizes: Sizes = SIZES, seed: int = 0) -> None:
    """Write the pairs and the start of a planted task, unless they are there."""
    made, wanted = folder / "made.json", {**sizes._asdict(), "seed": seed}
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    processes.log(f"[{task}] pairs, and a start from {sizes.demos:,} demonstrations")
    written = make_task(task, sizes, seed)
    write_pairs(written, folder)
    make_start(written.demos, folder / "start", seed=seed)
    write_json(made, wanted)


def write_board(tasks: Sequence[str], out: Path) -> str:
    """Write the leaderboard of the finished comparisons in `out`."""
    results = {name: json.loads((out / name / "compare.json").read_text(encoding="utf-8")) for name in tasks}
    of_task = {name: (result["runs"], bench_of(name, out).kl) for name, result in results.items()}
    text = page(of_task)
    write_text(out / "bench.md", text)
    picture(of_task, out / "bench.png")
    return text
