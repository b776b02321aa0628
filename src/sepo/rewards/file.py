"""Score a file of answers: what `sepo score` does with data that hold no pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.credit.rewards import pair_rewards, require_rewards
from sepo.data.loading import load_rows
from sepo.data.ragged import flat, segment_sums
from sepo.data.tables import clear_shards, read_shard, read_table, table_paths, write_shard
from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se
from sepo.forward.scoring import Types
from sepo.models.tokenizer import load_tokenizer
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.rewards.answers import answer_columns, answer_rows, only_answers, tokenize_answers
from sepo.rewards.passes import both_passes, find_models
from sepo.stages import data, reference
from sepo.stages.logps import scoring_dtype


def holds_answers(recipe: Recipe) -> bool:
    """Check the data of a recipe. True: they are answers, responses or conversations without chosen and rejected.

    Raises:
        UserError: they are neither pairs nor answers.
    """
    settings, given = recipe.data, dict(recipe.data.columns)
    if {"response", "messages"} & given.keys():
        return True
    try:
        data.check(recipe)
        return False
    except UserError:
        try:
            names = load_rows(settings.source, split=settings.split, config_name=settings.config_name).column_names
        except UserError:
            names = []
        if settings.pairs_from is not None or {"chosen", "rejected"} & {*names, *given} or not names:
            raise
        if answer_columns(names, given) is None:
            raise
        return True


def score_answers(recipe: Recipe, out: Path) -> dict[str, float]:
    """Write the token rewards of all answers of a file to `out`, with their token ids and log-probabilities beside it.

    An interrupted pass over the answers continues.

    Returns:
        `answers`, `tokens`; `reward/total`, the mean over answers of their summed rewards, and `reward/token`, the mean
        of all tokens, each with its standard error over prompts.
    """
    pairs = out / "pairs" / "answers"
    processes.on_main(lambda: reference.check(recipe))
    models = find_models(str(recipe.oracle.model), recipe.reference.model)
    processes.on_main(lambda: _prepare(recipe, load_tokenizer(recipe.reference.model), pairs))
    stores = both_passes(
        models,
        pairs,
        out / "logps",
        device=recipe.device,
        types=Types(scoring_dtype(recipe)),
        tokens_per_row=recipe.tokens_per_row,
    )
    processes.on_main(lambda: _join(pairs, stores, out))
    processes.on_main(lambda: load_tokenizer(recipe.reference.model).save_pretrained(out / "tokenizer") and None)
    return figures_of(read_table(out, "scores"))


def _prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, pairs: Path) -> None:
    """Read and tokenise the answers, and check that both models can read them."""
    settings = recipe.data
    dataset = load_rows(settings.source, split=settings.split, config_name=settings.config_name)
    columns = answer_columns(dataset.column_names, settings.columns)
    if columns is None:
        raise UserError(f"'{settings.source}' holds no responses: found {', '.join(dataset.column_names)}")
    table, report = tokenize_answers(
        list(answer_rows(dataset, columns)),
        tokenizer,
        max_length=settings.max_length,
        as_chat=settings.as_chat,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    log(f"  {settings.split}: {report.summary().replace(' rows,', ' answers,').replace(' pairs kept', ' kept')}")
    if not len(table):
        raise UserError(f"'{settings.source}' has no usable answer in {report.rows:,}: {report.reasons()}")
    data.check_limits(recipe, [table], roles=("reference", "oracle"))
    data.write_pairs(pairs, table)


def _join(pairs: Path, stores: Mapping[str, Path], out: Path) -> None:
    """Subtract the stored log-probabilities, shard by shard."""
    shards = list(
        zip(
            table_paths(pairs, "pairs"),
            *(table_paths(stores[role], "logps") for role in ("oracle", "reference")),
            strict=True,
        )
    )
    clear_shards(out)
    for index, (answers, after, before) in enumerate(shards):
        table = read_shard(answers, "pairs")
        scores = only_answers(pair_rewards(table, read_shard(after, "logps"), read_shard(before, "logps")))
        for name in ("row", "answer"):
            scores = scores.append_column(name, table.column(name))
        write_shard(out, index, scores, len(shards))
    require_rewards(read_shard(path, "scores") for path in table_paths(out, "scores"))


def figures_of(scores: pa.Table) -> dict[str, float]:
    """What `score_answers` returns."""
    from sepo.data.splits import prompt_numbers

    values, lengths = flat(scores.column("chosen_rewards"))
    sums, prompts = segment_sums(values, lengths), prompt_numbers(scores)
    result: dict[str, Any] = {"answers": len(scores), "tokens": len(values)}
    for name, numbers, groups in (
        ("total", sums, prompts),
        ("token", values.astype(np.float64), np.repeat(prompts, lengths)),
    ):
        result[f"reward/{name}"], result[f"reward/{name}_se"] = mean_and_se(numbers, groups.tolist())
    return result
