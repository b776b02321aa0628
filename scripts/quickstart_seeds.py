"""Run the quickstart at several seeds, an oracle each, beside a control with as many random key tokens.

    python scripts/quickstart_seeds.py --out DIR [--seeds 5] [key=value ...]

For every seed it runs `sepo run quickstart` in its own process and measures the wall-clock time, then the same run
with random key tokens, which reuses oracle and scores. Prints the tables of results/quickstart.md: the gain of each
seed, and the seconds and FLOPs of every stage beside the machine's matmul rate. Seeds with a result in DIR are reused.
About eight minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sepo.files import write_json, write_text
from sepo.planning.plan import Planner, plan_stages
from sepo.planning.sizes import method_sizes
from sepo.planning.stages import cost_of
from sepo.planning.throughput import matmul_rate
from sepo.recipe.reading import load_recipe
from sepo.runs.method import Method
from sepo.stages.stage import StageResult

CONTROL = ("select.rule_chosen=random", "select.rule_rejected=random")


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the quickstart in its own process; returns metrics, seconds, and matmul rates before and after."""
    rate = matmul_rate(torch.device("cpu"), 2.0)
    started = time.monotonic()
    command = [sys.executable, "-m", "sepo", "run", "quickstart", f"output_dir={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    metrics = json.loads((folder / "metrics.json").read_text())
    return {"seconds": seconds, "rates": [rate, matmul_rate(torch.device("cpu"), 2.0)], "metrics": metrics}


def flops(folder: Path) -> dict[str, float]:
    """FLOPs of every stage of a run, counted as in a dry run."""
    recipe = load_recipe(str(folder / "recipe.yaml"), [])
    planner = Planner(done={"data": StageResult(folder / "pairs", "")})
    method = Method(recipe, planner)
    plan_stages(method)
    sizes = method_sizes(method, "cpu")
    costs = {name: cost_of(stage, sizes) for name, stage in planner.stages.items()}
    return {name: sum(estimate.flops for estimate in cost.estimates or ()) for name, cost in costs.items()}


def one_seed(out: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run a seed and its control, or read their stored results."""
    stored = out / f"seed-{seed}.json"
    if stored.is_file():
        return json.loads(stored.read_text())
    folder = out / f"seed-{seed}"
    result = {"seed": seed, "sepo": run(folder, [f"seed={seed}", *overrides]), "flops": flops(folder)}
    shutil.copy(folder / "eval" / "examples.parquet", out / f"examples-{seed}.parquet")
    result["random"] = run(folder, [f"seed={seed}", *overrides, *CONTROL])
    write_json(stored, result)
    shutil.rmtree(folder)
    return result


def gained(metrics: dict[str, Any]) -> float:
    """Rise of the gold reward in standard errors."""
    return metrics["gold_reward/difference"] / metrics["gold_reward/difference_se"]


def seeds_table(results: list[dict[str, Any]]) -> str:
    """One row a seed, then the median and the range of each column."""
    columns: dict[str, list[float]] = {
        "oracle accuracy": [r["sepo"]["metrics"]["oracle/accuracy"] for r in results],
        "AUC": [r["sepo"]["metrics"]["fidelity/auc"] for r in results],
        "gold before": [r["sepo"]["metrics"]["gold_reward/base"] for r in results],
        "**after − before**": [r["sepo"]["metrics"]["gold_reward/difference"] for r in results],
        "in s.e.": [gained(r["sepo"]["metrics"]) for r in results],
        "KL, nats": [r["sepo"]["metrics"]["kl"] for r in results],
        "tokens before": [r["sepo"]["metrics"]["length/base"] for r in results],
        "after": [r["sepo"]["metrics"]["length/policy"] for r in results],
        "random tokens instead": [r["random"]["metrics"]["gold_reward/difference"] for r in results],
        "in s.e. ": [gained(r["random"]["metrics"]) for r in results],
        "their KL": [r["random"]["metrics"]["kl"] for r in results],
        "seconds": [r["sepo"]["seconds"] for r in results],
    }
    forms = dict.fromkeys(columns, "{:.1f}") | {
        "oracle accuracy": "{:.2f}", "AUC": "{:.3f}", "gold before": "{:.3f}", "**after − before**": "{:+.3f}",
        "random tokens instead": "{:+.3f}", "seconds": "{:.0f}",
    }  # fmt: skip

    def row(title: str, values: list[float]) -> str:
        cells = [form.format(value) for form, value in zip(forms.values(), values, strict=True)]
        return f"| {title} | {' | '.join(cells)} |"

    rows = [row(str(r["seed"]), [values[i] for values in columns.values()]) for i, r in enumerate(results)]
    for name, pick in (("median", statistics.median), ("lowest", min), ("highest", max)):
        rows.append(row(f"**{name}**", [float(pick(values)) for values in columns.values()]))
    return "\n".join([f"| seed | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *rows])


def seconds_table(results: list[dict[str, Any]]) -> str:
    """Seconds and FLOPs of each stage: medians over the seeds."""
    rate = statistics.median(rate for result in results for rate in result["sepo"]["rates"])
    lines = [
        f"matmul in float32: {rate / 1e9:.0f} GFLOP/s (median around the runs)",
        "",
        "| stage | seconds | TFLOP | share of the matmul rate |",
        "|---|---:|---:|---:|",
    ]
    names = [name for name in results[0]["flops"] if f"seconds/{name}" in results[0]["sepo"]["metrics"]]
    total = 0.0
    for name in names:
        seconds = statistics.median(result["sepo"]["metrics"][f"seconds/{name}"] for result in results)
        work = statistics.median(result["flops"][name] for result in results)
        total += seconds
        share = f"{work / seconds / rate:.0%}" if work and seconds else ""
        lines.append(f"| {name} | {seconds:.0f} | {work / 1e12:.2f} | {share} |")
    whole = statistics.median(result["sepo"]["seconds"] for result in results)
    work = statistics.median(sum(result["flops"].values()) for result in results)
    lines.append(f"| start-up, libraries, report | {whole - total:.0f} | | |")
    lines.append(f"| **all** | **{whole:.0f}** | **{work / 1e12:.1f}** | {work / whole / rate:.0%} |")
    lines += ["", f"seconds × GFLOP/s: {whole * rate / 1e9:,.0f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results of each seed")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default 5)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in all runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(args.seeds):
        results.append(one_seed(args.out, seed, args.overrides))
        text = f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n\n{seeds_table(results)}\n\n"
        write_text(args.out / "quickstart.md", text + seconds_table(results) + "\n")
        print(f"\n{text}{seconds_table(results)}\n", flush=True)


if __name__ == "__main__":
    main()
