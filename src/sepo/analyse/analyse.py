"""`sepo analyse`: what it reads, and all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.analyse.measures import agreement, by_class, by_position, concentration, length_effects, overview, truth
from sepo.analyse.page import analysis_markdown, save_analysis_figures
from sepo.credit.selection import select_key_tokens
from sepo.data.fingerprints import check_table_tokenizer
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.evaluate.gold import gold_reward
from sepo.files import write_json, write_text
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.reading import load_recipe


@dataclass(frozen=True)
class Inputs:
    """What there is to analyse.

    Attributes:
        tables: score tables of the same pairs by name, the oracle that knows most last.
        tokenizer: of the tables' ids; None leaves out token classes and fidelity.
        reference_logps: kind "logps" of the pairs under the reference; None leaves out the surprisal baseline.
        gold: the gold reward whose word values are the truth; None leaves out fidelity.
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
    """Read what `sepo analyse` was given: a run folder, score tables `[NAME=]DIR`, or both.

    Raises:
        UserError: a table is missing or not one of the same pairs, a name is used twice, or the tokenizer is another.
    """
    named: dict[str, Path] = {}
    for item in tables:
        name, equals, folder = item.partition("=")
        name, folder = (name, folder) if equals else (Path(item).name, item)
        if name in named:
            raise UserError(f"--table {item}: the name '{name}' is used twice; write NAME=DIR")
        named[name] = Path(folder)
    if run is not None:
        if not (run / "scores").is_dir():
            raise UserError(f"'{run}' holds no scores/: expected a run folder in which the score stage is done")
        recipe = load_recipe(run / "recipe.yaml")
        named.setdefault(run.name or "run", run / "scores")
        tokenizer = tokenizer or recipe.reference.model
        gold = gold or recipe.eval.gold
        store = run / "logps" / "reference"
        reference_logps = reference_logps or (str(store) if store.is_dir() else None)
    read = {name: read_table(path, "scores") for name, path in named.items()}
    first = next(iter(read.values()))
    for name, table in read.items():
        check_same_pairs(table, first, name)
    if gold is not None:
        gold_reward(gold)
        if tokenizer is None:
            raise UserError("--gold needs --tokenizer MODEL: the words of a response are read off its tokens")
    loaded = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        check_table_tokenizer(first, loaded, str(next(iter(named.values()))), tokenizer)
    logps = None if reference_logps is None else read_table(reference_logps, "logps")
    if logps is not None and logps.column("pair_id").to_pylist() != first.column("pair_id").to_pylist():
        raise UserError(f"'{reference_logps}' holds log-probabilities of other pairs than the score tables")
    return Inputs(read, loaded, logps, gold)


def check_same_pairs(table: pa.Table, other: pa.Table, name: str) -> None:
    """Raise a UserError unless both tables hold the same pairs in the same order."""
    if not len(table):
        raise UserError(f"score table '{name}' holds no pair: expected at least one row")
    for column in ("pair_id", "chosen_ids", "rejected_ids"):
        if table.column(column).combine_chunks() != other.column(column).combine_chunks():
            raise UserError(f"score table '{name}' is not one of the same pairs: score the same data with each oracle")


def analyse(inputs: Inputs, out: Path, *, k: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Compute everything the inputs allow, and write `analysis.json`, `analysis.md` and pictures into `out`.

    Single-table figures are those of the last table.

    Args:
        k: share of key tokens to look at, both sides.
        seed: of the random baseline and of bootstrap errors.

    Returns:
        what `analysis.json` holds.
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
            inputs.tables, inputs.tokenizer, gold_reward(inputs.gold).valence, k, inputs.reference_logps, seed
        )
    save_analysis_figures(result, out)
    write_text(out / "analysis.md", analysis_markdown(result))
    write_json(out / "analysis.json", result, indent=1)
    return result
