"""`sepo compare`: every method of a grid on one dataset, every pass that can be shared done once.

    data -> reference -> [reference log-probabilities -> oracle -> scores -> selection] -> runs -> table and pictures
              shared by all      shared by those with equal settings                one a setting and seed

The work folder is a run folder (`pipeline.Run`): each pass and each run is a stage named by its fingerprint, so an
interrupted comparison goes on where it stopped, a variant added later costs its own runs only, and grids with the same
work folder share what they have in common. Policies are measured while they are trained,
at several points of the reward-KL frontier, and not kept unless asked for.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sepo.data import tokenizer_fingerprint
from sepo.errors import UserError
from sepo.evaluate.fidelity import fidelity
from sepo.evaluate.frontier import Checkpoints, Judge, start_of
from sepo.evaluate.run import oracle_accuracy, unique_prompts
from sepo.grid import Grid, Setting, number_of_runs
from sepo.loading import source_fingerprint
from sepo.logps import table_pairs
from sepo.models import (
    choose_device,
    describe_model,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from sepo.objectives import SELECTIVE, WITH_REFERENCE, kl_direction
from sepo.packing import read_length
from sepo.pipeline import Run, check_inputs, digest, environment, matmul_rate, open_run
from sepo.recipe import EMBEDDED_DATA, Recipe
from sepo.report.comparison import (
    best_setting,
    comparison_markdown,
    differences,
    save_comparison_figures,
    summarise_runs,
)
from sepo.stages import (
    check_same_tokenizer,
    embedded_data,
    logps_pass,
    objective_settings,
    oracle_seeds,
    prepare_data,
    say,
    score_pairs,
    select,
    train_model,
    train_oracle,
    train_reference,
)
from sepo.tables import flat, read_table, write_text


def compare(grid: Grid, settings: dict[str, list[Setting]]) -> dict[str, Any]:
    """Run a grid, reusing what stands, and write `compare.json`, `compare.md` and the pictures into its folder.

    The results are written after every run, so a comparison can be read while it goes on.

    Returns:
        what `compare.json` holds: name, kl, gold, rows (`report.comparison.summarise_runs`), differences, runs with
        all their checkpoints, shared passes, environment.

    Raises:
        UserError: anything about the grid or its recipes that can be known before a model is loaded.
    """
    check_grid(settings)
    check_results_folder(grid)
    first = next(iter(settings.values()))[0].recipe
    with open_run(first) as run:
        grid.results_folder.mkdir(parents=True, exist_ok=True)
        write_text(grid.results_folder / "grid.json", json.dumps(grid.model_dump(mode="json"), indent=2) + "\n")
        work = _Comparison(run, grid, first)
        for setting, seed, reported in work.schedule(settings):
            work.add(setting, seed, reported)
        return work.results()


def check_grid(settings: dict[str, list[Setting]]) -> None:
    """Check every recipe of a grid before anything expensive; see `pipeline.check_inputs`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare runs in one process: start it without torchrun or accelerate")
    first = next(iter(settings.values()))[0].recipe.reference
    for setting in (setting for group in settings.values() for setting in group):
        recipe = setting.recipe
        if recipe.eval.prompts == 0 or not (
            recipe.data.held_out or recipe.data.held_out_split or recipe.data.held_out_source
        ):
            raise UserError("compare measures on held-out prompts: set eval.prompts and data.held_out above 0")
        check_inputs(recipe)
        if recipe.reference.model != first.model:
            # The pairs are tokenised once, for all variants.
            check_same_tokenizer(
                f"{setting.variant}'s reference",
                load_tokenizer(recipe.reference.model, revision=recipe.reference.revision),
                "the other variants' reference",
                load_tokenizer(first.model, revision=first.revision),
            )


def check_results_folder(grid: Grid) -> None:
    """Refuse a folder of results, apart from the work folder (`open_run` looks at that), which holds something else."""
    folder = grid.results_folder
    if folder == grid.work_folder or not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"'{folder}' is a file: set output_dir to a new folder")
    if any(folder.iterdir()) and not (folder / "grid.json").is_file():
        raise UserError(f"'{folder}' is not empty and holds no comparison: set output_dir to a new folder")


class _Comparison:
    """The stages of a comparison in its work folder, and the results so far."""

    def __init__(self, run: Run, grid: Grid, recipe: Recipe):
        self.run, self.grid, self.recipe = run, grid, recipe
        self.runs: list[dict[str, Any]] = []
        self.shared: dict[str, dict[str, Any]] = {}
        self._bases: dict[str, torch.nn.Module] = {}

    def schedule(self, settings: dict[str, list[Setting]]) -> Iterator[tuple[Setting, int, bool]]:
        """Yield the runs in order; the best setting of a sweep is known only when its runs are done."""
        grid = self.grid
        chosen: dict[str, Setting] = {}
        for variant, group in settings.items():
            if grid.sweep_seed is None or len(group) == 1:
                continue
            for setting in group:
                yield setting, grid.sweep_seed, False
            rows = summarise_runs([one for one in self.runs if one["variant"] == variant], grid.kl)
            label = best_setting(rows, variant)
            chosen[variant] = next(setting for setting in group if setting.label == label)
            say(f"[{variant}] best of {len(group)} settings: {label}")
        # Seed by seed, so that an unfinished comparison has all methods at some seeds.
        for seed in grid.seeds:
            for variant, group in settings.items():
                for setting in [chosen[variant]] if variant in chosen else group:
                    yield setting, seed, True

    # --- shared passes ----------------------------------------------------------------------------------------------

    def _stage(self, kind: str, what: str, depends: dict[str, Any], outputs: Sequence[str], work) -> tuple[str, Path]:
        """One shared pass in a folder named after its fingerprint; returns (fingerprint, folder)."""
        key = digest({"stage": kind, **depends})
        folder = self.run.path("shared", f"{kind}-{key[:10]}")
        name = f"{kind}-{key[:10]}"
        record = self.run.stage(name, depends, [folder / output for output in outputs], lambda: work(folder))
        self.shared[name] = {"stage": name, "what": what, "seconds": record["seconds"], **(record["results"] or {})}
        return key, folder

    def data(self) -> tuple[str, Path]:
        recipe = self.recipe
        start = resolve_model(recipe.reference.model, revision=recipe.reference.revision)
        tokenizer = load_tokenizer(start)
        source = str(embedded_data()) if recipe.data.source == EMBEDDED_DATA else recipe.data.source
        depends = {
            "data": recipe.data.model_dump(mode="json"),
            "seed": recipe.seed,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": digest(tokenizer.chat_template),
            "sources": [source_fingerprint(name) for name in (source, recipe.data.held_out_source) if name is not None],
        }

        def work(folder: Path) -> dict[str, Any]:
            counts = prepare_data(recipe.data, tokenizer, folder, recipe.seed)
            return {"train": counts["train"], "held_out": counts["held_out"]}

        return self._stage("data", recipe.data.source, depends, ["train", "held_out"], work)

    def reference(self, recipe: Recipe) -> tuple[str, str]:
        start = resolve_model(recipe.reference.model, revision=recipe.reference.revision)
        sft = recipe.reference.sft
        if sft is None:
            return model_fingerprint(start), start
        depends = {"model": model_fingerprint(start), "sft": sft.model_dump(mode="json"), "seed": recipe.seed}

        def work(folder: Path) -> dict[str, Any]:
            train_reference(start, sft, folder, seed=recipe.seed, device=recipe.device)
            return {}

        key, folder = self._stage("reference", f"SFT on {sft.source}", depends, ["."], work)
        return key, str(folder)

    def logps(self, recipe: Recipe, model: str, model_key: str, data: tuple[str, Path], part: str) -> tuple[str, Path]:
        dtype = "float32" if recipe.dtype == "auto" else recipe.dtype

        def work(folder: Path) -> dict[str, Any]:
            logps_pass(
                model,
                data[1] / part,
                folder,
                device=recipe.device,
                dtype=dtype,
                tokens_per_row=recipe.tokens_per_row,
                description=f"log-probabilities, {part}",
            )
            return {}

        depends = {"model": model_key, "dtype": dtype, "data": data[0], "part": part}
        return self._stage("logps", f"{Path(model).name}, {part} pairs", depends, ["."], work)

    def oracle(self, recipe: Recipe, seed: int, data: tuple[str, Path]) -> tuple[str, str]:
        """One oracle; where `count` asks for several, the one of this seed among them."""
        settings = recipe.oracle
        if settings.model is not None:
            model = resolve_model(settings.model)
            return model_fingerprint(model), model
        reference_key, reference = self.reference(recipe)
        store = self.logps(recipe, reference, reference_key, data, "train")
        depends = {"oracle": settings.model_dump(mode="json", exclude={"count"}), "logps": store[0], "seed": seed}

        def work(folder: Path) -> dict[str, Any]:
            train, logps = data[1] / "train", store[1]
            results = train_oracle(reference, train, logps, folder, settings, seed=seed, device=recipe.device)
            return {"pairs": results["pairs"]}

        what = f"DPO on {settings.sample:.0%} of the pairs, beta {settings.beta:g}, seed {seed}"
        key, folder = self._stage("oracle", what, depends, ["."], work)
        return key, str(folder)

    def scores(self, recipe: Recipe, seed: int, data: tuple[str, Path]) -> tuple[str, Path]:
        oracles = [self.oracle(recipe, one, data) for one in oracle_seeds(seed, recipe.oracle.count)]
        reference_key, reference = self.reference(recipe)
        roles = {"oracle" + (f"-{i}" if i else ""): oracle for i, oracle in enumerate(oracles)}
        stores = {
            (role, part): self.logps(recipe, model, key, data, part)
            for role, (key, model) in {**roles, "reference": (reference_key, reference)}.items()
            for part in ("train", "held_out")
        }
        depends = {name: key for name, (key, _) in ((f"{role}-{part}", s) for (role, part), s in stores.items())}

        def work(folder: Path) -> dict[str, Any]:
            for part in ("train", "held_out"):
                logps = [stores[role, part][1] for role in roles]
                score_pairs(data[1] / part, logps, stores["reference", part][1], folder / part)
            metrics = oracle_accuracy(read_table(folder / "held_out", "scores"))
            found = {name: metrics[f"oracle/{name}"] for name in ("accuracy", "accuracy_se", "accuracy_not_longer")}
            if recipe.eval.gold == "vader":
                table = read_table(folder / "train", "scores")
                judged = fidelity(load_tokenizer(reference), table)
                found |= {"auc": judged["auc"], "auc_se": judged["auc_se"]}
            return {name: _defined(value) for name, value in found.items()}

        key, folder = self._stage("scores", "token rewards", depends, ["train", "held_out"], work)
        record = self.shared[folder.name]
        names = ", ".join(Path(model).name for _, model in oracles)
        whose = f"the mean of {names}" if len(oracles) > 1 else names
        record["what"] = f"token rewards of {whose}: held-out accuracy {_text(record, 'accuracy')}" + (
            f", fidelity AUC {_text(record, 'auc')}" if "auc" in record else ""
        )
        return key, folder

    def selection(self, recipe: Recipe, seed: int, data: tuple[str, Path]) -> tuple[str, Path]:
        scores = self.scores(recipe, seed if self.grid.seeds_vary == "oracle" else recipe.seed, data)
        rule = recipe.select.model_dump(mode="json")
        # Only a random selection depends on the seed of the run.
        draw = seed if "random" in (rule["rule_chosen"], rule["rule_rejected"]) else recipe.seed

        def work(folder: Path) -> dict[str, Any]:
            select(scores[1] / "train", folder, **rule, seed=draw)
            kept = _target_tokens(read_table(folder, "selection"))
            return {"target_tokens": kept}

        what = f"{rule['rule_chosen']} {rule['k_chosen']:g} / {rule['rule_rejected']} {rule['k_rejected']:g}"
        what += f", {rule['credit']} credit"
        return self._stage("selection", what, {"scores": scores[0], "select": rule, "seed": draw}, ["."], work)

    # --- runs -------------------------------------------------------------------------------------------------------

    def add(self, setting: Setting, seed: int, reported: bool) -> None:
        """Train and measure one setting at one seed unless that stands, and write the results so far."""
        recipe = setting.recipe
        policy, training = recipe.policy, recipe.policy.training
        data = self.data()
        reference_key, reference = self.reference(recipe)
        start, start_key = reference, reference_key
        if policy.model is not None:
            start = resolve_model(policy.model, revision=policy.revision)
            start_key = model_fingerprint(start)
        targets = self.selection(recipe, seed, data) if policy.objective in SELECTIVE else data
        stored = self.logps(recipe, start, start_key, data, "train") if policy.objective in WITH_REFERENCE else None
        samples = self.start(recipe, start, start_key, seed, data)
        held_logps = self.logps(recipe, start, start_key, data, "held_out") if recipe.eval.gold is None else None
        depends = {
            "policy": policy.model_dump(mode="json"),
            "start": start_key,
            "targets": targets[0],
            "logps": None if stored is None else stored[0],
            "data": data[0],
            "eval": recipe.eval.model_dump(mode="json"),
            "checkpoints": self.grid.checkpoints,
            "seed": seed,
            "dtype": recipe.dtype,  # of the start that it is measured against
        }
        key = f"run-{digest(depends)[:10]}"
        folder = self.run.path("runs", key)

        def work() -> dict[str, Any]:
            table = (
                read_table(targets[1], "selection") if targets is not data else read_table(data[1] / "train", "pairs")
            )
            held_out = read_table(data[1] / "held_out", "pairs")
            judge = Judge(
                self._base(recipe, start, start_key),
                load_tokenizer(start),
                unique_prompts(held_out, recipe.eval.prompts),
                recipe.eval,
                seed,
                json.loads((samples[1] / "start.json").read_text()),
                held_out,
                None if held_logps is None else read_table(held_logps[1], "logps"),
            )
            watch = Checkpoints(judge, self.grid.checkpoints, folder / "points.json", len(table))
            train_model(
                start,
                table,
                folder / "policy",
                training,
                reference_logps=None if stored is None else read_table(stored[1], "logps"),
                lora=policy.lora,
                quantization=policy.quantization,
                seed=seed,
                device=recipe.device,
                callbacks=[watch],
                **objective_settings(policy),
            )
            if not self.grid.keep_models:
                history = folder / "policy" / "trainer_state.json"
                os.replace(history, folder / "trainer_state.json")
                shutil.rmtree(folder / "policy")
            epochs = watch.points[-1]["pairs_seen"] / len(table)
            read = sum(read_length(pair) for pair in table_pairs(table))
            return {"target_tokens": round(epochs * _target_tokens(table)), "read_tokens": round(epochs * read)}

        name = " ".join(part for part in (setting.variant, setting.label, f"seed={seed}") if part)
        record = self.run.stage(key, depends, [folder / "points.json"], work, title=f"run {name}")
        points = json.loads((folder / "points.json").read_text())
        self.runs.append(
            {
                "variant": setting.variant,
                "label": setting.label,
                "seed": seed,
                "reported": reported,
                "objective": policy.objective,
                "folder": str(folder.relative_to(self.run.folder)),
                **record["results"],
                "points": points,
            }
        )
        self.results()

    def _base(self, recipe: Recipe, start: str, start_key: str) -> torch.nn.Module:
        if start_key not in self._bases:
            # In the type of the policy in training: a KL between two types would measure their rounding.
            dtype = "float32" if recipe.dtype == "auto" else recipe.dtype
            self._bases[start_key] = load_model(start, device=recipe.device, dtype=dtype)
        return self._bases[start_key]

    def start(self, recipe: Recipe, start: str, start_key: str, seed: int, data: tuple[str, Path]) -> tuple[str, Path]:
        """Samples of the starting model, which every policy of that seed is paired with."""
        depends = {
            "start": start_key,
            "data": data[0],
            "eval": recipe.eval.model_dump(mode="json"),
            "seed": seed,
            "dtype": recipe.dtype,
        }

        def work(folder: Path) -> dict[str, Any]:
            prompts = unique_prompts(read_table(data[1] / "held_out", "pairs"), recipe.eval.prompts)
            base = self._base(recipe, start, start_key)
            samples = start_of(base, load_tokenizer(start), prompts, recipe.eval, seed)
            write_text(folder / "start.json", json.dumps(samples) + "\n")
            return {name: float(np.mean(values)) for name, values in samples.items()}

        return self._stage("start", f"samples of the starting model, seed {seed}", depends, ["start.json"], work)

    # --- results ----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Write table, JSON and pictures of the runs so far; returns the JSON's content."""
        comparison = {
            "name": self.grid.name,
            "kl": self.grid.kl,
            "gold": self.recipe.eval.gold,
            "environment": environment(),
            "rows": summarise_runs(self.runs, self.grid.kl),
            "differences": differences(self.runs, self.grid.kl),
            "runs": self.runs,
            "shared": list(self.shared.values()),
        }
        folder = self.grid.results_folder
        write_text(folder / "compare.md", comparison_markdown(comparison))
        save_comparison_figures(comparison, folder)
        write_text(folder / "compare.json", json.dumps(_defined(comparison), indent=1) + "\n")
        return comparison


def _target_tokens(table: pa.Table) -> int:
    column = "positions" if "chosen_positions" in table.column_names else "ids"
    return sum(int(flat(table.column(f"{side}_{column}"))[1].sum()) for side in ("chosen", "rejected"))


def _defined(value: Any) -> Any:
    """The same with null for every NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _defined(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(record: dict[str, Any], name: str) -> str:
    value, error = record.get(name), record.get(f"{name}_se")
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


# --- dry run --------------------------------------------------------------------------------------------------------


def plan_grid(grid: Grid, settings: dict[str, list[Setting]]) -> list[dict[str, str]]:
    """Say what a comparison would do: one row a kind of work, with the number of runs and an estimate of time.

    The data are read and tokenised for the counts; no model is loaded. Times follow from FLOPs as in
    `pipeline.plan_run`.
    """
    check_grid(settings)
    everything = [setting.recipe for group in settings.values() for setting in group]
    first = everything[0]
    tokenizer = load_tokenizer(first.reference.model, revision=first.reference.revision)
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(first.data, tokenizer, Path(folder), first.seed, progress=False)
        train, held_out = (read_table(Path(folder) / part, "pairs") for part in ("train", "held_out"))
    train_tokens, held_tokens = (sum(read_length(pair) for pair in table_pairs(t)) for t in (train, held_out))
    prompts = len(unique_prompts(held_out, first.eval.prompts))
    rate = 0.5 * matmul_rate(choose_device(first.device))

    def parameters(recipe: Recipe, policy: bool) -> int:
        name, revision = recipe.reference.model, recipe.reference.revision
        if policy and recipe.policy.model is not None:
            name, revision = recipe.policy.model, recipe.policy.revision
        return describe_model(load_config(name, revision=revision))["parameters"]

    rows = [_row("data", first.data.source, 1, None)]
    selective = [recipe for recipe in everything if recipe.policy.objective in SELECTIVE]
    oracles = {digest([r.oracle.model_dump(mode="json"), r.reference.model_dump(mode="json")]): r for r in selective}
    copies = len(_all_seeds(grid)) if grid.seeds_vary == "oracle" else 1
    if oracles:
        seconds = 0.0
        for recipe in oracles.values():
            epochs = 0.0 if recipe.oracle.model else recipe.oracle.training.num_train_epochs * recipe.oracle.sample
            each = 6 * epochs * train_tokens + 2 * (train_tokens + held_tokens)
            seconds += recipe.oracle.count * parameters(recipe, False) / rate * each
        number = sum(recipe.oracle.count for recipe in oracles.values())
        rows.append(_row("oracles", "DPO, then token rewards; shared", number * copies, seconds * copies))
    elif any(recipe.policy.objective in WITH_REFERENCE for recipe in everything):
        rows.append(
            _row("reference", "log-probabilities; shared", 1, 2 * parameters(first, True) * train_tokens / rate)
        )
    total = 0.0
    responses = prompts * first.eval.samples
    generated = responses * first.eval.max_new_tokens
    for variant, group in settings.items():
        runs = number_of_runs(grid, {variant: group})
        recipe = group[0].recipe
        training = recipe.policy.training
        pairs = (
            training.max_steps * training.batch_size
            if training.max_steps > 0
            else training.num_train_epochs * len(train)
        )
        flops = (
            6
            * train_tokens
            * pairs
            / len(train)
            * (4 / 3 if kl_direction(recipe.policy.objective, recipe.policy.alpha) else 1)
        )
        # A decoding step costs about 3 times its FLOPs' time; then the start scores what was sampled.
        measured = 2 * (3 + 1) * generated * len(grid.checkpoints)
        if recipe.eval.gold is None:
            measured += 2 * held_tokens * len(grid.checkpoints)
        seconds = runs * parameters(recipe, True) * (flops + measured) / rate
        total += seconds
        swept = f", sweep of {len(group)}" if len(group) > 1 else ""
        rows.append(_row(variant, f"{recipe.policy.objective}, {pairs:,.0f} pairs a run{swept}", runs, seconds))
    runs = sum(int(row["runs"]) for row in rows if row["stage"] in settings)
    rows.append(_row("total", f"{len(grid.checkpoints)} checkpoints a run, {responses} responses each", runs, total))
    return rows


def _all_seeds(grid: Grid) -> set[int]:
    return {*grid.seeds, *([] if grid.sweep_seed is None else [grid.sweep_seed])}


def _row(stage: str, what: str, runs: int, seconds: float | None) -> dict[str, str]:
    if seconds is None:
        time = ""
    else:
        time = f"~{seconds:.0f} s" if seconds < 120 else f"~{seconds / 60:.0f} min"
    return {"stage": stage, "what": what, "runs": str(runs), "time": time}
