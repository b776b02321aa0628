"""Three rounds against one offline pass on as many answers, at equal KL, beside best of n and steering.

    python scripts/rounds_study.py details --bench DIR --out OUT --seeds 0 1 2 3 4 5     # a planted task of the bench
    python scripts/rounds_study.py sentiment --out OUT --seeds 0 1 2 3 4 5               # an embedded task
    python scripts/rounds_study.py details --out OUT --seeds 0 1 2 3 4 5 --read          # the table again, nothing run

*Offline*: the start answers all prompts 8 times, and one training reads the pairs (best against worst). *Rounds*: each
of three rounds answers a third of the prompts with the policy at hand, trains an oracle on its pairs and goes on. Both
see each prompt once, with equal settings and passes over the pairs. A curve joins the checkpoints (offline) or the ends
of the rounds; differences are read at equal KL, by seed and prompt. Beside them: best of n of the start's answers, by
the offline oracle and by the gold reward, and the start steered by this oracle. Finished parts in OUT are reused.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sepo import run_recipe
from sepo.bench.credit.checks import CHECKS
from sepo.bench.credit.grids import TASKS, bench_of
from sepo.bench.credit.run import prepare
from sepo.data.tables import write_parquet
from sepo.errors import UserError
from sepo.evaluate import GENERATIONS
from sepo.files import write_json, write_text
from sepo.recipe.reading import parse_recipe
from sepo.recipe.settings import Recipe
from sepo.report.statistics import over_seeds
from sepo.study.beside import against_baselines, baselines_section
from sepo.study.comparison import compare
from sepo.study.crossed import paired_difference
from sepo.study.curves import at_kl, at_kl_by_prompt, quality, reaches
from sepo.study.grid import Baselines, Grid, Setting

ROUNDS = 3
ON_POLICY = {"samples": 8, "temperatures": [0.7, 1.0], "min_gap": 0.1}
OBJECTIVES = {"sepo": {}, "simpo": {"objective": "simpo"}}
BASELINES = Baselines(best_of=[2, 4, 8], steer=[0.5, 1.0, 2.0])
CHECKPOINTS = [0.15, 0.3, 0.6, 1.0]
PROMPTS, EPOCHS = 300, 2  # of the planted tasks
SHARE, EMBEDDED_EPOCHS = 0.4, 3  # of the embedded tasks: the share of the pairs whose prompts are answered


def settings_of(task: str, bench: Path, seed: int, objective: str) -> dict[str, Any]:
    """The settings of both arms: those of the bench, with answers of the policy instead of its pairs."""
    values = copy.deepcopy(bench_of(task, bench).recipe)
    new_tokens = values["eval"]["max_new_tokens"]
    share = 1.0 if task in CHECKS else SHARE
    values["data"] |= {"sample": share, "on_policy": {**ON_POLICY, "gold": values["eval"]["gold"]}}
    values["data"]["on_policy"]["max_new_tokens"] = new_tokens
    values["policy"] |= OBJECTIVES[objective]
    if task in CHECKS:
        values["data"]["source"] = str(some_prompts(Path(values["data"]["source"])))
    values["policy"]["training"]["num_train_epochs"] = EPOCHS if task in CHECKS else EMBEDDED_EPOCHS
    return {**values, "seed": seed, "eval": {**values["eval"], "examples": 0, "pairs": 0}}


def some_prompts(source: Path) -> Path:
    """The pairs of the first prompts of a planted task, as a file of their own; both arms answer these prompts."""
    table = pq.read_table(source)
    prompts = [json.dumps(prompt, sort_keys=True) for prompt in table.column("prompt").to_pylist()]
    kept = set(list(dict.fromkeys(prompts))[:PROMPTS])
    out = source.parent / f"train-{PROMPTS}.parquet"
    if not out.is_file():
        write_parquet(out, table.filter(pa.array([prompt in kept for prompt in prompts])))
    return out


def rounds_recipe(values: Mapping[str, Any], name: str, out: Path) -> Recipe:
    """The recipe of the rounds."""
    rounds = {"number": ROUNDS, "prompts": "split"}
    return parse_recipe({**values, "name": name, "output_dir": str(out), "rounds": rounds}, "rounds study")


def offline_points(values: Mapping[str, Any], name: str, out: Path, kl: float) -> dict[str, Any]:
    """Sample with the start, train once on the pairs, and measure on the way.

    Returns:
        the checkpoints, the points of the baselines, and the number of pairs.
    """
    source = parse_recipe({**values, "name": name, "output_dir": str(out / "answers")}, "rounds study")
    run_recipe(source, until="data")
    pairs = out / "answers" / "sampled_pairs"
    data = {**values["data"], "source": str(pairs / "data" / "train.parquet"), "on_policy": None, "held_out": 0.0}
    data |= {"held_out_source": str(pairs / "held_out.parquet")}
    work = {"name": name, "output_dir": str(out / "grid")}
    recipe = parse_recipe({**values, "data": data, **work}, "rounds study")
    seed = recipe.seed
    grid = Grid(
        **work, seeds=[seed], checkpoints=CHECKPOINTS, kl=kl, baselines=BASELINES, variants={"offline": {"set": {}}}
    )
    results = compare(grid, {"offline": [Setting("offline", "", recipe)]})
    counts = json.loads((pairs / "pairs.json").read_text(encoding="utf-8"))
    return {
        "points": results["runs"][0]["points"],
        "baselines": results["baselines"],
        "pairs": [counts["pairs"]],
        "epochs": [results["runs"][0]["points"][-1]["pairs_seen"] / counts["pairs"]],
    }


def round_points(recipe: Recipe) -> dict[str, Any]:
    """Run the rounds; the end of each is a point of their curve.

    A policy that went too far may leave no pair for its next round (all answers cut off). The rounds before count then,
    and `ended` says why no further one came.
    """
    ended = ""
    try:
        run_recipe(recipe)
    except UserError as error:
        ended = str(error)
    folder, points, pairs = recipe.run_folder, [], []
    for number in range(1, ROUNDS + 1):
        answers = folder / f"round-{number}" / "eval" / GENERATIONS
        if not answers.is_file():
            break
        table = pq.read_table(answers)
        gains = np.subtract(table.column("policy_gold").to_numpy(), table.column("base_gold").to_numpy())
        by_prompt = gains.reshape(-1, recipe.eval.samples).mean(1)
        points.append(
            {
                "kl": float(np.mean(table.column("policy_kl").to_numpy())),
                "gold_difference": float(gains.mean()),
                "by_prompt": by_prompt.round(6).tolist(),
                "length": float(np.mean(table.column("policy_tokens").to_numpy())),
            }
        )
        counts = folder / f"round-{number}" / "sampled_pairs" / "pairs.json"
        pairs.append(json.loads(counts.read_text(encoding="utf-8"))["pairs"])
    if not points:
        raise UserError(ended)
    found = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))["rounds"]
    accuracy = [row.get("oracle/new_accuracy") for row in found]
    return {"points": points, "pairs": pairs, "oracle_new_accuracy": accuracy, "ended": ended}


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Both arms of a seed, or their stored results."""
    stored = options.out / f"{options.task}-{options.objective}-{seed}.json"
    if stored.is_file():
        return json.loads(stored.read_text(encoding="utf-8"))
    if options.task in CHECKS:
        prepare(options.task, options.bench / "tasks" / options.task)
    values = settings_of(options.task, options.bench, seed, options.objective)
    work = options.out / "work" / f"{options.task}-{options.objective}-{seed}"
    name = f"{options.task}-{seed}"
    offline = offline_points(values, name, work / "offline", options.kl)
    rounds = round_points(rounds_recipe(values, name, work / "rounds"))
    result = {"seed": seed, "offline": offline, "rounds": rounds}
    write_json(stored, result, indent=1)
    return result


def difference_at(results: Sequence[Mapping[str, Any]], kl: float | None) -> dict[str, Any]:
    """Rounds minus offline at a KL (None: at their ends), over seeds and prompts."""
    both = [(result["rounds"]["points"], result["offline"]["points"]) for result in results]
    by_prompt = [(at_kl_by_prompt(first, kl), at_kl_by_prompt(second, kl)) for first, second in both]
    gaps = [a - b if a is not None and b is not None and len(a) == len(b) else None for a, b in by_prompt]
    row = paired_difference(gaps, [at_kl(first, kl)[0] - at_kl(second, kl)[0] for first, second in both])
    return {**row, "kl": kl, "reached": sum(reaches(a, kl) and reaches(b, kl) for a, b in both), "seeds": len(both)}


def verdict(row: Mapping[str, Any], at: str) -> str:
    """A difference in words."""
    if row["low"] is None:
        return f"**Not known** at {at}: three seeds or more are needed."
    span = f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}), MDD {row['detectable']:.3f}"
    if row["low"] > 0:
        return f"**Shown** at {at}: rounds gain more than one offline pass, {span}."
    if row["high"] < 0:
        return f"**Refuted** at {at}: rounds gain less than one offline pass, {span}."
    return f"**Inconclusive** at {at}: {span}."


def page(options: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> str:
    """The table of a task."""
    differences = [difference_at(results, kl) for kl in (options.kl, options.kl / 2, 2 * options.kl, None)]
    lines = [f"## {options.task}, {options.objective}", "", verdict(differences[0], f"KL {options.kl:g}"), ""]
    lines += [
        "| at | rounds − offline | 95 % interval | MDD | seeds | both reached it |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in differences:
        at = "the end" if row["kl"] is None else f"KL {row['kl']:g}"
        span = "–" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        detectable = "–" if row["detectable"] is None else f"{row['detectable']:.3f}"
        cells = [at, f"{row['difference']:+.3f}", span, detectable, str(row["seeds"]), str(row["reached"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | seeds | pairs | gain | KL | tokens an answer | oracle's accuracy on the new policy's answers |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    lines.append(_ends("offline", [result["offline"] for result in results], 0, -1))
    for number in range(ROUNDS):
        arms = [result["rounds"] for result in results if len(result["rounds"]["points"]) > number]
        if not arms:
            break
        lines.append(_ends(f"round {number + 1}", arms, number, number))
    curves = {arm: {result["seed"]: result[arm]["points"] for result in results} for arm in ("rounds", "offline")}
    rows = against_baselines(curves, [point for result in results for point in result["offline"]["baselines"]])
    return "\n".join([*lines, *("#" * line.startswith("## ") + line for line in baselines_section(rows)), ""])


def _ends(name: str, arms: Sequence[Mapping[str, Any]], number: int, place: int) -> str:
    """The row of an arm at one of its points, as means over seeds with standard errors."""
    points = [arm["points"][place] for arm in arms]
    accuracy = [of[number] for arm in arms if (of := arm.get("oracle_new_accuracy")) and of[number] is not None]
    cells = [name, str(len(arms)), f"{np.mean([arm['pairs'][number] for arm in arms]):.0f}"]
    for values, form in (
        ([quality(point) for point in points], "+.3f"),
        ([point["kl"] for point in points], ".2f"),
        ([point["length"] for point in points], ".1f"),
        (accuracy, ".3f"),
    ):
        mean, error = over_seeds(values)
        cells.append(
            "–" if not values else f"{mean:{form}}" + (f" ± {error:{form.strip('+')}}" if error == error else "")
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--bench", type=Path, default=Path("bench"), help="folder of the bench, with tasks/TASK/start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--objective", choices=list(OBJECTIVES), default="sepo")
    parser.add_argument("--kl", type=float, default=1.0, help="where the arms are compared, nats an answer")
    parser.add_argument("--read", action="store_true", help="read the stored results only")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        if options.read and not (options.out / f"{options.task}-{options.objective}-{seed}.json").is_file():
            continue
        results.append(one_seed(options, seed))
        text = page(options, results)
        write_text(options.out / f"{options.task}-{options.objective}.md", text)
        write_json(options.out / f"{options.task}-{options.objective}.json", results, indent=1)
    print(text)


if __name__ == "__main__":
    main()
