"""The grid of `sepo compare`: a base recipe, its variants, and the runs of each.

    name: objectives
    base: ../quickstart.yaml               # relative to this file; all defaults without it
    set: {data.sample: 0.5}                # for all variants, on top of the base
    sweep_seed: 0                          # sweep each variant at this seed, ...
    seeds: [1, 2, 3]                       # ... and run its best setting at these
    checkpoints: 4                         # points a run on the reward-KL frontier
    kl: 3.0                                # compare at this KL from the start
    sweep_prompts: 50                      # decide the sweep on other prompts than those reported
    variants:
      sepo: {sweep: {policy.gamma: [1.0, 2.0, 2.5]}}
      dpo:
        set: {policy.objective: dpo}
        sweep: {policy.beta: [0.01, 0.05, 0.1]}

`set` and `sweep` name settings of a recipe, with dots or nested. A sweep runs every combination of its lists. Without
`sweep_seed` every setting runs at every seed.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from sepo.errors import UserError
from sepo.recipe.reading import explain, find_file, load_recipe, parse_override, parse_recipe, read_settings, set_key
from sepo.recipe.settings import PathText, Recipe, Settings

Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _shares(points: Any) -> Any:
    """Shares of a run in ascending order, with its end, from a list or a number."""
    if isinstance(points, int) and not isinstance(points, bool) and points >= 1:
        return [(index + 1) / points for index in range(points)]
    if isinstance(points, list) and points and all(isinstance(share, int | float) for share in points):
        return sorted({*points, 1.0})
    raise ValueError("expected a number of 1 or more, or a list of shares of a run")


def _ascending(values: list[float]) -> list[float]:
    return sorted(set(values))


class Variant(Settings):
    """One method: the settings that it changes, and those that it sweeps over."""

    set: dict[str, Any] = Field(default_factory=dict, description="settings that make the variant")
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="settings to sweep over, each with its values; every combination is run"
    )


class Assumed(Settings):
    """Standard deviations of the difference between two methods, for the minimum detectable difference of a plan."""

    seed: float = Field(0.03, ge=0, description="of a seed's mean over prompts (another oracle, another order)")
    prompt: float = Field(0.1, ge=0, description="of a prompt's mean over seeds")
    rest: float = Field(0.4, gt=0, description="of one answer to one prompt at one seed, beyond seed and prompt")


class Baselines(Settings):
    """Policies without training, each a point beside the curves of the trained ones (docs/compare.md)."""

    best_of: list[Annotated[int, Field(ge=2, le=1024)]] = Field(
        default_factory=list,
        description="the best of so many answers of the start, by the oracle and by the gold reward",
    )
    steer: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list, description="the start, steered by the oracle's token rewards with these strengths"
    )

    @model_validator(mode="after")
    def _some(self) -> Baselines:
        for name, values in (("best_of", self.best_of), ("steer", self.steer)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists a value twice")
        if not self.best_of and not self.steer:
            raise ValueError("name best_of, steer or both")
        return self


class Grid(Settings):
    """A comparison, read from one YAML file."""

    name: str = Field(pattern=_NAME, description="name of the comparison")
    output_dir: PathText | None = Field(None, description="folder of the results; default: runs/NAME")
    work_dir: PathText | None = Field(
        None,
        description="folder of the shared stages and the runs; grids with the same folder share stages; "
        "default: output_dir",
    )
    base: PathText | None = Field(None, description="recipe that the variants start from, relative to the grid file")
    set: dict[str, Any] = Field(default_factory=dict, description="settings of all variants, on top of the base")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="seeds of the reported runs")
    sweep_seed: Seed | None = Field(
        None, description="sweep at this seed, and run only the best setting of each variant at `seeds`"
    )
    seeds_vary: Literal["policy", "oracle"] = Field(
        "oracle",
        description="what a seed changes: oracle, policy and samples, or only policy and samples",
    )
    sweep_prompts: int = Field(
        0,
        ge=0,
        description="number of held-out prompts on which a sweep is decided, apart from the reported "
        "eval.prompts; 0: the "
        "reported prompts",
    )
    checkpoints: Annotated[list[Share], BeforeValidator(_shares)] = Field(
        4,
        validate_default=True,
        description="when a run is measured: a number of evenly spaced checkpoints, or a list of shares of the "
        "run, such as "
        "[0.25, 1.0]",
    )
    checkpoints_at_kl: Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_ascending)] = Field(
        default_factory=list,
        description="measure where a run passes these KLs (nats a response) and at its end, instead of checkpoints",
    )
    kl: float | None = Field(None, gt=0, description="compare at this KL; default: at the end of each run")
    also_at: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list, description="further KLs at which the differences are listed"
    )
    assume: Assumed | None = Field(
        None,
        description="standard deviations of differences for the plan; default: from an earlier result, or seed "
        "0.03, prompt "
        "0.1, rest 0.4",
    )
    keep_models: bool = Field(False, description="keep the trained policies")
    baselines: Baselines | None = Field(
        None, description="points without training beside the curves: {best_of: [2, 4, 8], steer: [0.5, 1, 2]}"
    )
    variants: Annotated[dict[Annotated[str, Field(pattern=_NAME)], Variant], Field(min_length=1)] = Field(
        description="the methods to compare, by name"
    )

    @property
    def shares(self) -> list[float]:
        """Shares of a run after which it is measured."""
        return [1.0] if self.checkpoints_at_kl else self.checkpoints

    @property
    def measurements(self) -> int:
        """Largest number of measurements of a run."""
        return len(self.shares) + len(self.checkpoints_at_kl)

    @property
    def results_folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def work_folder(self) -> Path:
        return self.results_folder if self.work_dir is None else Path(self.work_dir)


@dataclass(frozen=True)
class Setting:
    """One variant at one point of its sweep; `label` names the point ("policy.beta=0.1"), "" without a sweep."""

    variant: str
    label: str
    recipe: Recipe


def grid_values(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values of a grid file, with the overrides of the grid itself; and the overrides of its recipes.

    `name` and `output_dir` belong to the grid.
    """
    values = read_settings(path, "grid")
    values.setdefault("name", path.stem)
    left = []
    for override in overrides:
        key, value = parse_override(override)
        # `base` is relative to the grid file, so it cannot be set from a shell.
        if key.split(".")[0] in set(Grid.model_fields) - {"base"}:
            set_key(values, key, value, f"override '{override}'")
        else:
            left.append(override)
    return values, left


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Grid, dict[str, list[Setting]]]:
    """Read a grid file; returns the grid and the checked settings of each variant.

    Args:
        overrides: `key=value` for settings of the grid (`seeds=[1,2]`), or for recipe settings of all variants.

    Raises:
        UserError: as in `load_recipe`, or two variants train on different data or different numbers of pairs.
    """
    path = find_file(path, "grid")
    values, overrides = grid_values(path, overrides)
    if "variants" not in values:
        raise UserError(f"{path} has no variants, so it is no grid: run a recipe with `sepo run` (docs/compare.md)")
    try:
        grid = Grid(**values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Grid)}") from None
    except TypeError:
        raise UserError(f"{path}: keys must be words, found {sorted(map(str, values))}") from None
    if len(set(grid.seeds)) < len(grid.seeds):
        raise UserError(f"{path}: seeds are {grid.seeds}: the same seed twice gives the same run twice")
    if grid.checkpoints_at_kl and "checkpoints" in values:
        raise UserError(f"{path}: checkpoints are shares of a run and checkpoints_at_kl are KLs: leave one of them out")
    base = None if grid.base is None else path.parent / grid.base
    start = load_recipe(base).model_dump(mode="json", exclude_unset=True)
    for item in ("name", "output_dir"):
        start.pop(item, None)
    for key, value in grid.set.items():
        _merge(start, key, value, f"{path}, set")
    for override in overrides:
        set_key(start, *parse_override(override), f"override '{override}'")
    # A work folder that several grids share has its own name.
    where = {"name": grid.name if grid.work_dir is None else grid.work_folder.name, "output_dir": str(grid.work_folder)}
    settings = {
        name: [
            Setting(name, label, parse_recipe({**chosen, **where}, f"{path}, {name}"))
            for label, chosen in _choices(start, name, variant, path)
        ]
        for name, variant in grid.variants.items()
    }
    check_same_budget([setting for group in settings.values() for setting in group])
    return grid, settings


def _choices(start: dict[str, Any], name: str, variant: Variant, path: Path) -> list[tuple[str, dict[str, Any]]]:
    where = f"{path}, variants.{name}"
    values = copy.deepcopy(start)
    for key, value in variant.set.items():
        _merge(values, key, value, where)
    choices = []
    for combination in itertools.product(*variant.sweep.values()):
        chosen = copy.deepcopy(values)
        for key, value in zip(variant.sweep, combination, strict=True):
            set_key(chosen, key, value, where)
        label = " ".join(f"{key}={_short(value)}" for key, value in zip(variant.sweep, combination, strict=True))
        choices.append((label, chosen))
    if len({label for label, _ in choices}) < len(choices):
        raise UserError(f"{where}: a sweep lists the same value twice")
    return choices


def _merge(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a setting; a group (`policy: {gamma: 1}`) changes only the settings that it names."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _merge(values, f"{key}.{name}", item, where)
    else:
        set_key(values, key, copy.deepcopy(value), where)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def check_same_budget(settings: list[Setting]) -> None:
    """Raise a UserError if variants read different pairs or train for different numbers of epochs.

    `comparison.check_same_pairs` checks the rest, once the number of pairs is known.
    """

    def epochs(recipe: Recipe) -> float | None:
        training = recipe.policy.training
        return None if training.max_steps > 0 else training.num_train_epochs

    first = settings[0]
    for other in settings[1:]:
        if other.recipe.seed != first.recipe.seed:
            raise UserError(f"variant {other.variant} sets seed: the seeds of a comparison are those of its grid")
        if other.recipe.data != first.recipe.data or other.recipe.eval != first.recipe.eval:
            raise UserError(
                f"variants {first.variant} and {other.variant} have different data or eval settings: "
                "set those for all variants, in the grid's `set`"
            )
        counts = epochs(first.recipe), epochs(other.recipe)
        if None not in counts and counts[0] != counts[1]:
            raise UserError(
                f"variants {first.variant} and {other.variant} see different numbers of pairs "
                f"({counts[0]:g} and {counts[1]:g} epochs): a comparison needs one budget"
            )
