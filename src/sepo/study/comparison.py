"""`sepo compare`: every method of a grid on one dataset, every pass that can be shared done once.

    data -> reference -> [reference log-probabilities -> oracle -> scores -> selection] -> runs -> table and pictures
              shared by all      shared by those with equal settings                one a setting and seed

The work folder is a run folder (`folder.Run`): each pass and each run is a stage of `sepo.stages`, in a folder named by
its fingerprint, so an interrupted comparison goes on where it stopped, a variant added later costs its own runs only,
and grids with the same work folder share what they have in common. Policies are measured while they are trained, at
several points of the reward-KL frontier, and not kept unless asked for.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.evaluate.statistics import StdComponents
from sepo.files import check_writable, digest, write_json
from sepo.judging.in_run import judge_in_words
from sepo.judging.judge import scorer_of
from sepo.judging.scorers import Scorer
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.runs.folder import Run, environment, open_run
from sepo.runs.pipeline import check_inputs, check_pairs
from sepo.stages import data, logps, oracle, reference, score, select, train, transfer
from sepo.stages.stage import Model, Stage, StageResult
from sepo.study import stages as measured
from sepo.study.grid import Assumed, Grid, Setting
from sepo.study.results import (
    best_setting,
    power_line,
    reading_notes,
    summarise_runs,
    typical_std,
    write_comparison,
)
from sepo.training.fit import pairs_to_see


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
        write_json(grid.results_folder / "grid.json", grid.model_dump(mode="json"))
        work = _Comparison(run, grid, first)
        shared = work.data()
        check_same_pairs(settings, lambda recipe: work.pairs(recipe, shared).results["train"])
        prompts = len(set(map(tuple, read_table(shared.folder / "held_out", "pairs").column("prompt_ids").to_pylist())))
        check_prompts(grid, first, prompts)
        log(f"  {can_tell(grid, first, prompts)}")
        for setting, seed, reported in work.schedule(settings):
            work.add(setting, seed, reported)
        results = work.results()
        for note in reading_notes(results["rows"], grid.kl):
            log(f"  {note}")
        if found := typical_std(results["differences"]):
            counted = next(row["prompts"] for row in results["differences"] if row["prompts"])
            log(f"  {power_line(len(grid.seeds), counted, found, 'measured')}")
        run.log_unused("shared/*", "runs/*")
        return results


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
        if recipe.eval.tasks or recipe.eval.benchmarks:
            raise UserError("compare runs no tasks and no benchmarks: leave eval.tasks and eval.benchmarks out")
        check_inputs(recipe)
        if recipe.reference.model != first.model:
            # The pairs are tokenised once, for all variants.
            check_same_tokenizer(
                f"{setting.variant}'s reference",
                load_tokenizer(recipe.reference.model, revision=recipe.reference.revision),
                "the other variants' reference",
                load_tokenizer(first.model, revision=first.revision),
            )


def check_same_pairs(settings: dict[str, list[Setting]], pairs: Callable[[Recipe], int]) -> None:
    """Raise a UserError unless all runs see as many pairs; a last batch that is not full counts what it holds.

    Args:
        pairs: in one epoch, of a recipe's policy.
    """
    everything = [setting for group in settings.values() for setting in group]
    counts = [pairs_to_see(setting.recipe.policy.training, pairs(setting.recipe)) for setting in everything]
    for other, count in zip(everything, counts, strict=True):
        if count != counts[0]:
            raise UserError(
                f"variants {everything[0].variant} and {other.variant} see different numbers of pairs ({counts[0]:,} "
                f"and {count:,}, of {pairs(other.recipe):,} in an epoch): a comparison needs one budget; set "
                "batch_size to a divisor of the pairs, or num_train_epochs to a whole number without max_steps"
            )


def check_prompts(grid: Grid, recipe: Recipe, prompts: int) -> None:
    """Raise a UserError if a sweep cannot be decided on prompts of its own.

    Args:
        prompts: distinct ones that are held out.
    """
    if not grid.sweep_prompts:
        return
    if grid.sweep_seed is None:
        raise UserError(
            "sweep_prompts are those that a sweep is decided on: set sweep_seed, or leave sweep_prompts out"
        )
    if recipe.eval.gold is None:
        raise UserError("sweep_prompts needs eval.gold: the accuracy is of all held-out pairs")
    if recipe.eval.prompts + grid.sweep_prompts > prompts:
        raise UserError(
            f"eval.prompts {recipe.eval.prompts} and sweep_prompts {grid.sweep_prompts} are more than the {prompts} "
            "prompts that are held out: set fewer, or raise data.held_out"
        )


def can_tell(grid: Grid, recipe: Recipe, prompts: int) -> str:
    """`power_line` of a grid, with the standard deviations of its `assume`, of an earlier result, or the default ones.

    Args:
        prompts: distinct ones that are held out.
    """
    earlier = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing there yet, or of an earlier release
        stored = json.loads((grid.results_folder / "compare.json").read_text(encoding="utf-8"))
        earlier = typical_std(stored["differences"])
    if grid.assume is None and earlier is not None:
        std, source = earlier, "of the results so far"
    else:
        values = grid.assume or Assumed()
        std = StdComponents(values.seed, values.prompt, values.rest / math.sqrt(recipe.eval.samples))
        source = "assumed"
    return power_line(len(grid.seeds), min(prompts, recipe.eval.prompts), std, source)


def check_results_folder(grid: Grid) -> None:
    """Refuse a folder of results, apart from the work folder (`open_run` looks at that), which holds something else."""
    folder = grid.results_folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: set output_dir to a new folder")
    check_writable(folder, "set output_dir to another folder")
    if folder == grid.work_folder or not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "grid.json").is_file():
        raise UserError(f"'{folder}' is not empty and holds no comparison: set output_dir to a new folder")


def oracle_key(recipe: Recipe) -> str:
    """Recipes with one key train the same oracles."""
    return digest([recipe.oracle.model_dump(mode="json"), recipe.reference.model_dump(mode="json")])


class _Comparison:
    """The stages of a comparison in its work folder, and the results so far."""

    def __init__(self, run: Run, grid: Grid, recipe: Recipe):
        self.run, self.grid, self.recipe = run, grid, recipe
        self.runs: list[dict[str, Any]] = []
        self.shared: dict[str, dict[str, Any]] = {}
        self._bases: dict[tuple, torch.nn.Module] = {}
        self._judge: Scorer | None = None
        self._transfers: dict[str, bool] = {}
        self._pairs: dict[str, StageResult] = {}

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
            log(f"[{variant}] best of {len(group)} settings: {label}")
        # Seed by seed, so that an unfinished comparison has all methods at some seeds.
        for seed in grid.seeds:
            for variant, group in settings.items():
                for setting in [chosen[variant]] if variant in chosen else group:
                    yield setting, seed, True

    # --- shared passes ----------------------------------------------------------------------------------------------

    def _share(self, stage: Stage, what: str | None = None) -> StageResult:
        """Do a stage in a folder named by its fingerprint, and list it among the shared passes."""
        name = f"{stage.kind}-{digest({'stage': stage.kind, **stage.depends})[:10]}"
        made = self.run.do(stage, self.run.path("shared", name), name=name, title=name)
        figures = {
            key: value for key, value in made.results.items() if value is None or isinstance(value, int | float | str)
        }
        self.shared[name] = {"stage": name, "what": what or stage.what, "seconds": made.seconds, **figures}
        if made.memory_gb is not None:
            self.shared[name]["memory_gb"] = made.memory_gb
        return made

    def data(self) -> StageResult:
        recipe = self.recipe
        return self._share(data.stage(recipe.data, load_tokenizer(reference.start(recipe).folder), recipe.seed))

    def transfers(self, recipe: Recipe) -> bool:
        """Does the policy have another tokenizer than the oracle?"""
        key = digest([recipe.policy.model, recipe.policy.revision, recipe.reference.model_dump(mode="json")])
        if key not in self._transfers:
            self._transfers[key] = transfer.needed(recipe)
        return self._transfers[key]

    def pairs(self, recipe: Recipe, shared: StageResult) -> StageResult:
        """The pairs that the policy reads: `shared`, or their own where it has another tokenizer."""
        if not self.transfers(recipe):
            return shared
        key = digest([recipe.policy.model, recipe.policy.revision])
        if key not in self._pairs:
            self._pairs[key] = self._share(transfer.pairs_stage(recipe, shared))
        return self._pairs[key]

    def reference(self, recipe: Recipe) -> Model:
        start = reference.start(recipe)
        tuning = reference.stage(recipe, start)
        return start if tuning is None else Model.of(self._share(tuning))

    def logps(self, recipe: Recipe, model: Model, pairs: StageResult, role: str) -> StageResult:
        return self._share(logps.stage(recipe, model, pairs, role))

    def oracle(self, recipe: Recipe, seed: int, pairs: StageResult, swapped: bool = False) -> Model:
        """One oracle, or its opposite; where `count` asks for several, the one of this seed among them."""
        model = self.reference(recipe)
        if (existing := oracle.existing(recipe.oracle, model)) is not None:
            return existing
        stored = self.logps(recipe, model, pairs, "reference")
        return Model.of(self._share(oracle.stage(recipe, model, pairs, stored, seed, swapped)))

    def scores(self, recipe: Recipe, seed: int, pairs: StageResult) -> StageResult:
        small = self.reference(recipe)
        gold = recipe.eval.gold
        words = None if gold is None else score.Words(load_tokenizer(small.folder), gold)
        if recipe.oracle.rewards is not None:
            return self._share(score.given_stage(recipe.oracle, pairs, words))
        seeds = oracle.seeds(seed, recipe.oracle.count)
        oracles = [self.oracle(recipe, one, pairs) for one in seeds]
        read = [self.logps(recipe, model, pairs, "oracle") for model in oracles]
        base: StageResult | list[StageResult]
        if recipe.oracle.contrastive:
            opposites = [self.oracle(recipe, one, pairs, swapped=True) for one in seeds]
            base = [self.logps(recipe, model, pairs, "opposite") for model in opposites]
        else:
            base = self.logps(recipe, small, pairs, "reference")
        made = self._share(score.stage(pairs, read, base, words))
        row = self.shared[made.folder.name]
        names = ", ".join(Path(model.folder).name for model in oracles)
        whose = f"the mean of {names}" if len(oracles) > 1 else names
        row["what"] = f"token rewards of {whose}: held-out accuracy {_text(row, 'oracle/accuracy')}" + (
            f", fidelity AUC {_text(row, 'fidelity/auc')}" if words else ""
        )
        return made

    def selection(self, recipe: Recipe, seed: int, pairs: StageResult) -> StageResult:
        scores = self.scores(recipe, seed if self.grid.seeds_vary == "oracle" else recipe.seed, pairs)
        if self.transfers(recipe):
            gold = recipe.eval.gold
            words = None if gold is None else score.Words(transfer.tokenizers(recipe)[1], gold)
            scores = self._share(transfer.stage(recipe, scores, pairs, self.pairs(recipe, pairs), words))
        return self._share(select.stage(select.settings_of(recipe), scores, seed))

    # --- runs -------------------------------------------------------------------------------------------------------

    def add(self, setting: Setting, seed: int, reported: bool) -> None:
        """Train and measure one setting at one seed unless that stands, and write the results so far."""
        recipe = setting.recipe
        shared = self.data()
        pairs = self.pairs(recipe, shared)
        check_pairs(recipe, shared.folder, policy_folder=pairs.folder if self.transfers(recipe) else None)
        start = train.start(recipe, self.reference(recipe))

        def base() -> torch.nn.Module:
            return self._base(recipe, start)

        unjudged = recipe.eval.gold is None and recipe.eval.judge is None
        choosing = 0 if reported else self.grid.sweep_prompts
        stored = None
        if train.needs_reference(recipe) or unjudged:
            stored = self.logps(recipe, start, pairs, "start")
        stage = measured.run_stage(
            recipe,
            start,
            self.selection(recipe, seed, shared) if train.reads_selection(recipe) else None,
            stored if train.needs_reference(recipe) else None,
            pairs,
            self._share(measured.start_stage(recipe, start, pairs, seed, base, choosing)),
            stored if unjudged else None,
            self.grid.shares,
            self.grid.checkpoints_at_kl,
            seed,
            base,
            self.grid.keep_models,
            choosing,
            self._scorer,
        )
        key = f"run-{digest(stage.depends)[:10]}"
        name = " ".join(part for part in (setting.variant, setting.label, f"seed={seed}") if part)
        made = self.run.do(stage, self.run.path("runs", key), name=key, title=f"run {name}")
        self.runs.append(
            {
                "variant": setting.variant,
                "label": setting.label,
                "seed": seed,
                "reported": reported,
                "objective": recipe.policy.objective,
                "folder": str(made.folder.relative_to(self.run.folder)),
                **made.results,
                "points": json.loads((made.folder / measured.POINTS).read_text(encoding="utf-8")),
            }
        )
        self.results()

    def _base(self, recipe: Recipe, start: Model) -> torch.nn.Module:
        types = measured.training_types(recipe, start)
        key = (start.content, *types.values())
        if key not in self._bases:
            self._bases[key] = load_model(start.folder, device=recipe.device, **types)
        return self._bases[key]

    def _scorer(self) -> Scorer | None:
        """The one judge of all runs, in memory from its first verdict on; None for one behind a server, or none."""
        judge = self.recipe.eval.judge
        if self._judge is None and judge is not None and judge.server is None:
            self._judge = scorer_of(judge, self.recipe.device)
        return self._judge

    # --- results ----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Write table, JSON and pictures of the runs so far; returns the JSON's content."""
        head = {
            "name": self.grid.name,
            "kl": self.grid.kl,
            "also_at": self.grid.also_at,
            "gold": self.recipe.eval.gold,
            **({} if self.recipe.eval.judge is None else {"judge": judge_in_words(self.recipe.eval.judge)}),
            "environment": environment(),
        }
        return write_comparison(head, self.runs, list(self.shared.values()), self.grid.results_folder)


def _text(record: dict[str, Any], name: str) -> str:
    value, error = record.get(name), record.get(f"{name}_se")
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" + ("" if error is None or error != error else f" ± {error:.3f}")
