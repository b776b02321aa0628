"""`sepo compare`: train every method of a grid on one dataset; stages with equal inputs run once.

The work folder is a run folder (`folder.Run`). The stages that a run reads (`runs.method`) go to `shared/`, its
training to `runs/`, each in a folder named by the digest of what it depends on. So an interrupted comparison
continues, a variant that is added later costs only its own runs, and grids with the same work folder share stages.
Policies are measured while they train, at several points of the reward-KL frontier, and are deleted unless the grid
keeps them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sepo import engines, sft, sharded
from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.splits import prompt_numbers
from sepo.data.tables import read_table
from sepo.errors import UserError, one_line
from sepo.files import check_writable, digest, write_json
from sepo.forward.scoring import NonFiniteError, Types
from sepo.judging import stages as judging_stages
from sepo.judging.in_run import judge_in_words
from sepo.judging.judge import scorer_of
from sepo.judging.scorers import Scorer
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.numbers import MISSING
from sepo.processes import log
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import Recipe
from sepo.report.edges import measured
from sepo.runs.folder import Run, environment, open_run
from sepo.runs.method import Extension, Method, Walker
from sepo.runs.pipeline import check_inputs, check_method_pairs
from sepo.stages import train
from sepo.stages.reference import hash_model
from sepo.stages.stage import Model, Stage, StageResult
from sepo.study import baselines, stages
from sepo.study.baselines import check_baselines
from sepo.study.crossed import StdComponents
from sepo.study.grid import Assumed, Grid, Setting
from sepo.study.results import (
    best_setting,
    power_line,
    reading_notes,
    summarise_runs,
    typical_std,
    write_comparison,
)
from sepo.targets import stages as target_stages
from sepo.training.fit import pairs_to_see
from sepo.training.trainer import NonFiniteLossError
from sepo.transfer import stages as transfer_stages

FAILED = "failed.json"  # in the folder of a run that diverged
# Recipes of a comparison may have a judge, which measures policies while they train, but no stages after the
# evaluation.
EXTENSION = (
    Extension(judging_stages.check, targets=target_stages)
    .and_also(Extension(transfer_stages.check, transfer=transfer_stages))
    .and_also(Extension(sharded.check))
    .and_also(Extension(sft.check, fine_tune=sft.train_reference))
)


_SECONDS_BETWEEN_FIGURES = 60.0


def compare(grid: Grid, settings: dict[str, list[Setting]], *, retry_failed: bool = False) -> dict[str, Any]:
    """Run a grid, reusing results that are up to date, and write `compare.json`, `compare.md` and pictures.

    The results are written after every run, so an unfinished comparison can be read. A training that diverges is
    recorded as failed, and the grid goes on.

    Args:
        retry_failed: train again what failed in an earlier call.

    Returns:
        the content of `compare.json`: name, kl, gold, rows (`results.summarise_runs`), differences, runs with their
        checkpoints, shared stages, environment.

    Raises:
        UserError: bad input, before any model is loaded.
    """
    check_grid(settings)
    check_baselines(grid, settings)
    check_results_folder(grid)
    first = next(iter(settings.values()))[0].recipe
    with engines.use(first.engine, first.run_folder, passes=True), open_run(first) as run:
        grid.results_folder.mkdir(parents=True, exist_ok=True)
        write_json(grid.results_folder / "grid.json", grid.model_dump(mode="json"))
        work = _Comparison(run, grid, first, retry_failed)
        check_same_pairs(settings, lambda recipe: work.method(recipe, recipe.seed).policy_pairs.results["train"])
        held_out = read_table(work.pairs.folder / "held_out", "pairs")
        prompts = len(set(prompt_numbers(held_out).tolist()))
        check_prompts(grid, first, prompts)
        log(f"  {can_tell(grid, first, prompts)}")
        for setting, seed, reported in schedule(grid, settings, work.choose):
            work.add(setting, seed, reported)
        results = work.results(last=True)
        if not work.runs:
            raise UserError(f"every run failed; the first: {work.failed[0]['error']}")
        results = work.with_baselines(settings, results)
        for note in reading_notes(results["rows"], grid.kl):
            log(f"  {note}")
        if found := typical_std(results["differences"]):
            counted = next(row["prompts"] for row in results["differences"] if row["prompts"])
            log(f"  {power_line(len(grid.seeds), counted, found, 'measured')}")
        run.log_unused("shared/*", "runs/*")
        return results


def check_grid(settings: dict[str, list[Setting]]) -> None:
    """Check every recipe of a grid before any model is loaded. Raises UserError."""
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
        if recipe.data.on_policy is not None:
            raise UserError(
                "compare trains all variants on the same pairs: make them with `sepo sample` and `sepo pairs`, and "
                "name them in data.source, without data.on_policy"
            )
        if recipe.policy.target_kl is not None:
            raise UserError(
                "compare trains all variants on the same number of pairs and compares them at a KL: leave "
                "policy.target_kl out, and set the grid's kl"
            )
        check_inputs(recipe, EXTENSION)
        if recipe.reference.model != first.model:
            # The pairs are tokenised once, for all variants.
            check_same_tokenizer(
                f"{setting.variant}'s reference",
                load_tokenizer(recipe.reference.model, revision=recipe.reference.revision),
                "the other variants' reference",
                load_tokenizer(first.model, revision=first.revision),
            )


def check_same_pairs(settings: dict[str, list[Setting]], pairs: Callable[[Recipe], int]) -> None:
    """Raise a UserError unless all runs see the same number of pairs; a last batch counts the pairs that it holds.

    Args:
        pairs: gives the pairs of one epoch of a recipe's policy.
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
    """Raise a UserError if there are too few prompts to decide a sweep on prompts of its own.

    Args:
        prompts: number of distinct held-out prompts.
    """
    if not grid.sweep_prompts:
        return
    if grid.sweep_seed is None:
        raise UserError(
            "sweep_prompts are the prompts that a sweep is decided on: set sweep_seed, or leave sweep_prompts out"
        )
    if recipe.eval.gold is None:
        raise UserError("sweep_prompts needs eval.gold: without it a sweep is decided on all held-out pairs")
    if recipe.eval.prompts + grid.sweep_prompts > prompts:
        raise UserError(
            f"eval.prompts {recipe.eval.prompts} and sweep_prompts {grid.sweep_prompts} are more than the {prompts} "
            "prompts that are held out: set fewer, or raise data.held_out"
        )


def can_tell(grid: Grid, recipe: Recipe, prompts: int) -> str:
    """The minimum detectable difference of a grid, in one line: by `assume`, an earlier result, or the default.

    Args:
        prompts: number of distinct held-out prompts.
    """
    earlier = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no result yet, or of an earlier release
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
    """Refuse a folder of results that holds other things; `open_run` checks the work folder."""
    folder = grid.results_folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: set output_dir to a new folder")
    check_writable(folder, "set output_dir to another folder")
    if folder == grid.work_folder or not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "grid.json").is_file():
        raise UserError(f"'{folder}' is not empty and holds no comparison: set output_dir to a new folder")


class Passes:
    """Walks the stages of all runs; stages with equal inputs share a folder in `shared/`, named by their digest.

    Attributes:
        listed: each stage with its results, seconds and memory.
    """

    def __init__(self, run: Run):
        self.run = run
        self.listed: dict[str, dict[str, Any]] = {}
        self._done: dict[str, StageResult] = {}

    def model(self, name: str, revision: str | None = None) -> Model:
        return hash_model(name, revision)

    def do(self, stage: Stage, role: str) -> StageResult:
        name = f"{stage.kind}-{digest(stage.key())[:10]}"
        if name in self._done:
            return self._done[name]
        done = self.run.do(stage, self.run.path("shared", name), name=name, title=name)
        figures = {
            key: value for key, value in done.results.items() if value is None or isinstance(value, int | float | str)
        }
        what = stage.what
        if "oracle/accuracy" in figures:
            what += f": held-out accuracy {_text(figures, 'oracle/accuracy')}" + (
                f", fidelity AUC {_text(figures, 'fidelity/auc')}" if "fidelity/auc" in figures else ""
            )
        row = {"stage": name, "what": what, "seconds": done.seconds, **figures}
        if done.memory_gb is not None:
            row["memory_gb"] = done.memory_gb
        self.listed[name], self._done[name] = row, done
        return done


class Bases:
    """The models that policies start from; each stays in memory after its first use."""

    def __init__(self) -> None:
        self._models: dict[tuple, torch.nn.Module] = {}

    def load(self, recipe: Recipe, start: Model) -> torch.nn.Module:
        types = stages.training_types(recipe, start)
        key = (start.content, *types.values())
        if key not in self._models:
            self._models[key] = load_model(start.folder, device=recipe.device, **types)
        return self._models[key]


def method_of(recipe: Recipe, walker: Walker, grid: Grid, seed: int, pairs: StageResult | None = None) -> Method:
    """The method of one run of a grid."""
    oracle_seed = seed if grid.seeds_vary == "oracle" else recipe.seed
    return Method(recipe, walker, seed=seed, oracle_seed=oracle_seed, extension=EXTENSION, pairs=pairs)


def run_stage(
    method: Method,
    grid: Grid,
    reported: bool,
    bases: Bases | None = None,
    scorer: Callable[[], Scorer | None] | None = None,
) -> Stage:
    """The training of one run; the stages that it reads are done first.

    Args:
        reported: False for a run of a sweep, which may be measured on other prompts.
    """
    recipe, start = method.recipe, method.policy_start
    measured = measured_of(method, grid, 0 if reported else grid.sweep_prompts, bases, scorer)
    unjudged = recipe.eval.gold is None and recipe.eval.judge is None
    reference = train.needs_reference(recipe)
    # Policies are measured without autocast, so in other types than they may train in.
    measured_in = Types(**stages.training_types(recipe, start))
    return stages.run_stage(
        recipe,
        start,
        method.selection if _reads_selection(recipe) else None,
        method.policy_start_logps if reference else None,
        method.policy_pairs,
        method.walker.do(stages.start_stage(recipe, start, method.policy_pairs, measured), "start"),
        method.start_logps(measured_in) if unjudged else None,
        measured,
    )


def measured_of(
    method: Method, grid: Grid, choosing: int, bases: Bases | None, scorer: Callable[[], Scorer | None] | None
) -> stages.Measured:
    """How the runs of a method are measured."""
    recipe, start = method.recipe, method.policy_start
    return stages.Measured(grid, method.seed, choosing, lambda: (bases or Bases()).load(recipe, start), scorer)


def baselines_stage(
    method: Method,
    grid: Grid,
    guided: bool,
    bases: Bases | None = None,
    scorer: Callable[[], Scorer | None] | None = None,
) -> Stage:
    """The baselines of one seed; the stages that they read are done first.

    Args:
        guided: the method has an oracle that chooses and steers.
    """
    assert grid.baselines is not None
    how = measured_of(method, grid, 0, bases, scorer)
    guide = baselines.guide_of(method) if guided else None
    start = stages.start_stage(method.recipe, method.policy_start, method.policy_pairs, how)
    samples = method.walker.do(start, "start")
    return baselines.stage(method, grid.baselines, guide, method.policy_pairs, samples, how)


def schedule(
    grid: Grid, settings: dict[str, list[Setting]], choose: Callable[[str, list[Setting]], Setting | None]
) -> Iterator[tuple[Setting, int, bool]]:
    """Yield the runs in order: setting, seed, and whether the run is reported.

    Args:
        choose: picks the reported setting of a variant after its sweep; None if every setting failed.
    """
    chosen: dict[str, Setting | None] = {}
    for variant, group in settings.items():
        if grid.sweep_seed is None or len(group) == 1:
            continue
        for setting in group:
            yield setting, grid.sweep_seed, False
        chosen[variant] = choose(variant, group)
    # Seed by seed, so an unfinished comparison has all methods at some seeds.
    for seed in grid.seeds:
        for variant, group in settings.items():
            reported = [chosen[variant]] if variant in chosen else group
            yield from ((setting, seed, True) for setting in reported if setting is not None)


class _Comparison:
    """The runs of a comparison and their results."""

    def __init__(self, run: Run, grid: Grid, recipe: Recipe, retry_failed: bool):
        self.run, self.grid, self.recipe, self.retry_failed = run, grid, recipe, retry_failed
        self.passes, self.bases = Passes(run), Bases()
        self.pairs = Method(recipe, self.passes).pairs  # all variants share them
        self.runs: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.baselines: list[dict[str, Any]] = []
        self._judge: Scorer | None = None
        # Figures of an earlier command are drawn anew after a minute or at the end, not at once.
        self._drawn = time.monotonic() if (grid.results_folder / "frontier.png").exists() else float("-inf")

    def method(self, recipe: Recipe, seed: int) -> Method:
        return method_of(recipe, self.passes, self.grid, seed, self.pairs)

    def choose(self, variant: str, group: list[Setting]) -> Setting | None:
        """The best setting of a finished sweep; None if every setting failed."""
        rows = summarise_runs([one for one in self.runs if one["variant"] == variant], self.grid.kl)
        if not rows:
            log(f"[{variant}] every setting of the sweep failed: not reported")
            return None
        label = best_setting(rows, variant)
        log(f"[{variant}] best of {len(group)} settings: {label}")
        return next(setting for setting in group if setting.label == label)

    def add(self, setting: Setting, seed: int, reported: bool) -> None:
        """Train and measure one setting at one seed, unless its result is up to date; then write all results."""
        method = self.method(setting.recipe, seed)
        check_method_pairs(method)
        stage = run_stage(method, self.grid, reported, self.bases, self._scorer)
        key = f"run-{digest({name: value for name, value in stage.key().items() if name != 'stage'})[:10]}"
        name = " ".join(part for part in (setting.variant, setting.label, f"seed={seed}") if part)
        folder = self.run.path("runs", key)
        run: dict[str, Any] = {
            "variant": setting.variant,
            "label": setting.label,
            "seed": seed,
            "reported": reported,
            "objective": setting.recipe.policy.objective,
            "folder": str(folder.relative_to(self.run.folder)),
        }
        earlier = folder / FAILED
        if self.retry_failed:
            earlier.unlink(missing_ok=True)
        try:
            if earlier.is_file():
                self.run.used[key] = folder
                raise NonFiniteError(json.loads(earlier.read_text(encoding="utf-8"))["error"])
            made = self.run.do(stage, folder, name=key, title=f"run {name}")
        except (NonFiniteLossError, NonFiniteError) as error:
            log(f"[run {name}] failed: {one_line(error)}; the grid goes on (--retry-failed trains it again)")
            write_json(earlier, {"error": one_line(error)})
            shutil.rmtree(folder / "policy", ignore_errors=True)
            self.failed.append({**run, "error": one_line(error)})
        else:
            points = json.loads((made.folder / stages.POINTS).read_text(encoding="utf-8"))
            self.runs.append({**run, **made.results, "points": points})
        self.results()

    def with_baselines(self, settings: dict[str, list[Setting]], results: dict[str, Any]) -> dict[str, Any]:
        """Measure the baselines at every seed, and write all results; the results as given without baselines."""
        if self.grid.baselines is None:
            return results
        setting = baselines.setting_with_oracle(settings)
        recipe = self.recipe if setting is None else setting.recipe
        for seed in self.grid.seeds:
            method = self.method(recipe, seed)
            stage = baselines_stage(method, self.grid, setting is not None, self.bases, self._scorer)
            points = baselines.read_points(self.passes.do(stage, "baselines").folder)
            self.baselines += [{**point, "seed": seed} for point in points]
        return self.results(last=True)

    def _scorer(self) -> Scorer | None:
        """The judge of all runs; it stays in memory. None without a judge, or for a judge behind a server."""
        judge = self.recipe.eval.judge
        if self._judge is None and judge is not None and judge.server is None:
            self._judge = scorer_of(judge, self.recipe.device)
        return self._judge

    def results(self, last: bool = False) -> dict[str, Any]:
        """Write table, JSON and pictures of the finished runs; returns the content of the JSON."""
        head = {
            "name": self.grid.name,
            "kl": self.grid.kl,
            "also_at": self.grid.also_at,
            "gold": self.recipe.eval.gold,
            **({} if self.recipe.eval.judge is None else {"judge": judge_in_words(self.recipe.eval.judge)}),
            "environment": environment(),
            "failed": self.failed,
            **({"baselines": self.baselines} if self.baselines else {}),
        }
        # Drawing takes as long as a tiny run, so the figures follow at most once a minute.
        if figures := last or time.monotonic() - self._drawn > _SECONDS_BETWEEN_FIGURES:
            self._drawn = time.monotonic()
        return write_comparison(head, self.runs, list(self.passes.listed.values()), self.grid.results_folder, figures)


def _text(record: dict[str, Any], name: str) -> str:
    value = measured(record, name)
    return MISSING if value is None else value.text(".3f")


def _reads_selection(recipe: Recipe) -> bool:
    """Does training read the key tokens or the pair weights of a selection?"""
    return OBJECTIVES[recipe.policy.objective].reads_selection or recipe.select.confidence > 0
