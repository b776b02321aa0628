"""The inputs of `sepo analyse`, the whole analysis, and the ranking of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.analyse.measures import agreement, by_class, by_position, concentration, length_effects, overview, truth
from sepo.analyse.page import analysis_markdown, ranking_markdown, save_analysis_figures, save_ranking_figure
from sepo.analyse.ranking import ScoredOracle, default_rules, rank_rules, rules_of
from sepo.credit.selection import check_rule, select_key_tokens
from sepo.data.fingerprints import check_table_tokenizer
from sepo.data.tables import read_table, require_both_sides
from sepo.errors import UserError
from sepo.evaluate.gold import gold_reward
from sepo.files import write_json, write_text
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.reading import load_recipe, parse_recipe, read_settings
from sepo.recipe.settings import Recipe


@dataclass(frozen=True)
class Inputs:
    """The inputs of an analysis.

    Attributes:
        tables: score tables of the same pairs by name, the oracle with most data last.
        tokenizer: the tables' tokenizer; without one, the analysis has no token classes and no fidelity.
        reference_logps: kind "logps", the pairs under the reference; without them there is no surprisal baseline.
        gold: the gold reward whose word values are the truth; without one there is no fidelity.
    """

    tables: dict[str, pa.Table]
    tokenizer: PreTrainedTokenizerBase | None = None
    reference_logps: pa.Table | None = None
    gold: str | None = None


def run_inputs(
    run: Path | None,
    tables: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    reference_logps: str | None = None,
    gold: str | None = None,
) -> Inputs:
    """Read the inputs of `sepo analyse`: a run folder, score tables `[NAME=]DIR`, or both.

    Raises:
        UserError: a table is missing or has other pairs, a name is used twice, or the tokenizer is not the tables'.
    """
    named = _named(tables)
    if run is not None:
        recipe = _recipe_of_scored(run)
        name = run.name or "run"
        if name in named:
            raise UserError(f"--table {name}={named[name]}: the run has that name; choose another")
        named[name] = run / "scores"
        tokenizer = tokenizer or recipe.reference.model
        gold = gold or recipe.eval.gold
        store = run / "logps" / "reference"
        reference_logps = reference_logps or (str(store) if store.is_dir() else None)
    read = {name: read_table(path, "scores") for name, path in named.items()}
    first = next(iter(read.values()))
    for name, table in read.items():
        require_both_sides(table, f"'{name}'")
        check_same_pairs(table, first, name)
    if gold is not None:
        gold_reward(gold)
        if tokenizer is None:
            raise UserError("--gold needs --tokenizer MODEL, to find the words of a response")
    loaded = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        check_table_tokenizer(first, loaded, str(next(iter(named.values()))), tokenizer)
    logps = None if reference_logps is None else read_table(reference_logps, "logps")
    if logps is not None and logps.column("pair_id").to_pylist() != first.column("pair_id").to_pylist():
        raise UserError(f"'{reference_logps}' holds log-probabilities of other pairs than the score tables")
    return Inputs(read, loaded, logps, gold)


def _named(tables: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for item in tables:
        name, equals, folder = item.partition("=")
        name, folder = (name, folder) if equals else (Path(item).name, item)
        if name in named:
            raise UserError(f"--table {item}: the name '{name}' is used twice; write NAME=DIR")
        named[name] = Path(folder)
    return named


def _recipe_of_scored(run: Path) -> Recipe:
    if not (run / "scores").is_dir():
        raise UserError(f"'{run}' holds no scores/: expected a run folder with a finished score stage")
    return load_recipe(run / "recipe.yaml")


def rank_inputs(
    runs: Sequence[Path], tables: Sequence[str] = (), *, tokenizer: str | None = None, gold: str | None = None
) -> tuple[dict[str, ScoredOracle], str]:
    """Read the oracles of `sepo analyse --rules`, whose pairs may differ, and the name of the gold reward.

    Raises:
        UserError: a table or its tokenizer is missing, a name is used twice, or the runs have different gold rewards.
    """
    sources: dict[str, tuple[Path, str | None]] = {name: (path, tokenizer) for name, path in _named(tables).items()}
    golds = {gold} if gold else set()
    for run in runs:
        recipe = _recipe_of_scored(run)
        name = run.name if run.name and run.name not in sources else str(run)
        if run / "scores" in {path for path, _ in sources.values()}:
            raise UserError(f"'{run}' is named twice: expected every oracle once")
        sources[name] = (run / "scores", tokenizer or recipe.reference.model)
        if not gold and recipe.eval.gold:
            golds.add(recipe.eval.gold)
    if len(golds) != 1:
        named = ", ".join(sorted(golds)) or "none"
        raise UserError(f"--rules needs one gold reward whose word values are the truth, found {named}: use --gold")
    (truth,) = golds
    gold_reward(truth)
    loaded: dict[str, PreTrainedTokenizerBase] = {}
    oracles = {}
    for name, (path, model) in sources.items():
        if model is None:
            raise UserError("--rules needs --tokenizer MODEL, to find the words of a response")
        table = read_table(path, "scores")
        if model not in loaded:
            loaded[model] = load_tokenizer(model)
        check_table_tokenizer(table, loaded[model], str(path), model)
        oracles[name] = ScoredOracle(table, loaded[model])
    return oracles, truth


def read_rules(file: Path | None, k: float) -> dict[str, dict[str, Any]]:
    """Rules by name with their settings of section `select`, from a YAML file or built in.

    Raises:
        UserError: the file is missing or no mapping of names to settings, or a setting is impossible.
    """
    if file is None:
        return default_rules(k)
    if not file.is_file():
        raise UserError(
            f"--rules {file}: expected a YAML file, NAME: {{settings of select}}; put --rules without a file last"
        )
    rules = {}
    for name, settings in read_settings(file, "rules").items():
        if not isinstance(settings, dict):
            raise UserError(
                f"{file}: rule '{name}' is {settings!r}, expected settings of select, such as {{k_chosen: 0.3}}"
            )
        select = parse_recipe({"select": settings}, f"{file}, rule '{name}'").select
        check_rule(select)
        rules[str(name)] = select.model_dump()
    return rules


def rank(
    oracles: Mapping[str, ScoredOracle], rules: Mapping[str, Mapping[str, Any]], gold: str, out: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Rank rules on oracles and write `ranking.json`, `ranking.md` and `ranking.png` into `out`. Trains no policy.

    Args:
        rules: settings of section `select` by name, the baseline first.
        gold: the gold reward whose word values are the truth.
        seed: seed of random rules.

    Returns:
        The content of `ranking.json`: the result of `rank_rules` and the settings.
    """
    ranked = rank_rules(oracles, rules_of(rules, seed), gold_reward(gold).truth)
    result = {**ranked, "gold": gold, "settings": dict(rules), "seed": seed}
    save_ranking_figure(result, out)
    write_text(out / "ranking.md", ranking_markdown(result))
    write_json(out / "ranking.json", result, indent=1)
    return result


def check_same_pairs(table: pa.Table, other: pa.Table, name: str) -> None:
    """Raise a UserError unless both tables hold the same pairs in the same order."""
    if not len(table):
        raise UserError(f"score table '{name}' holds no pair: expected at least one row")
    for column in ("pair_id", "chosen_ids", "rejected_ids"):
        if table.column(column).combine_chunks() != other.column(column).combine_chunks():
            raise UserError(f"score table '{name}' has other pairs than the first: use the same data for each oracle")


def analyse(inputs: Inputs, out: Path, *, k: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Compute all measures that the inputs allow, and write `analysis.json`, `analysis.md` and figures into `out`.

    Measures of a single table are those of the last table.

    Args:
        k: share of key tokens on both sides.
        seed: seed of the random baseline and of the bootstrap.

    Returns:
        The content of `analysis.json`.
    """
    name, scores = list(inputs.tables.items())[-1]
    selection = select_key_tokens(scores, k, k)
    result: dict[str, Any] = {
        "table": name,
        "k": k,
        "overview": overview(scores),
        "concentration": concentration(scores),
        "position": by_position(scores, selection),
        "length": length_effects(scores),
    }
    if inputs.tokenizer is not None:
        result["classes"] = by_class(scores, selection, inputs.tokenizer)
    if len(inputs.tables) > 1:
        result["agreement"] = agreement(inputs.tables, k)
    if inputs.gold is not None and inputs.tokenizer is not None:
        result["fidelity"] = truth(
            inputs.tables, inputs.tokenizer, gold_reward(inputs.gold).truth, k, inputs.reference_logps, seed
        )
    save_analysis_figures(result, out)
    write_text(out / "analysis.md", analysis_markdown(result))
    write_json(out / "analysis.json", result, indent=1)
    return result
