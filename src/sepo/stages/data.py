"""Stage "data": a source -> validated pairs -> token ids -> train and held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo import processes, work
from sepo.data.conversation import CONVERSATION, PROMPT_KEY
from sepo.data.encoding import ENCODED, Options, P, pairs_of, tokenize_into
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint
from sepo.data.loading import load_preferences, source_fingerprint
from sepo.data.ragged import SIDES, flat, read_lengths
from sepo.data.rows import DataReport
from sepo.data.splits import PairRows, group_by_prompt, sampled_rows, share_rows, shared_prompts, split_provenance
from sepo.data.spool import Spool
from sepo.data.tables import PLAIN_TEXT, SEVERAL_TURNS, clear_shards, write_shard, write_table
from sepo.errors import UserError, nearest
from sepo.models.limits import ModelLimits, check_ids, check_lengths, model_limits
from sepo.models.names import load_config
from sepo.models.tokenizer import load_tokenizer
from sepo.processes import log
from sepo.recipe.settings import EMBEDDED_DATA, DataSettings, Recipe
from sepo.stages.stage import PARTS, Stage

PAIRS_PER_SHARD = 1000


def check(recipe: Recipe) -> None:
    """Read the source: finds a missing file, split or column. Tokenising counts bad rows later."""
    for part in recipe.data.parts():
        read_split(part, part.split)
    if recipe.data.held_out_split or recipe.data.held_out_source:
        read_split(*held_out_data(recipe.data, recipe.data.held_out_split))


def stage(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Stage:
    """Tokenised pairs of a source, in `train` and `held_out`."""
    settings, seed = recipe.data, recipe.seed
    return Stage(
        kind="data",
        what=settings.what,
        depends={
            "data": settings.model_dump(mode="json", exclude=_not_of_pairs(settings)),
            "seed": seed,
            "columns": [CONVERSATION, PROMPT_KEY],  # earlier releases wrote tables without them
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": short_digest(str(tokenizer.chat_template or "")),
            "source": processes.on_main(lambda: _fingerprint(settings)),
            "held_out_source": processes.on_main(
                lambda: settings.held_out_source and source_fingerprint(_place(settings.held_out_source))
            ),
        },
        outputs=PARTS,
        run=lambda folder: processes.on_main(lambda: prepare_data(settings, tokenizer, folder, seed)),
        facts={"recipe": recipe},
    )


def _not_of_pairs(settings: DataSettings) -> set[str]:
    """Settings that the pairs do not depend on; an unset `sources`, which earlier releases did not have."""
    return {"workers", "on_policy"} | ({"sources"} if settings.sources is None else set())


def _fingerprint(settings: DataSettings) -> str | list[str]:
    found = [source_fingerprint(_place(part.source)) for part in settings.parts()]
    return found if settings.sources is not None else found[0]


def embedded_data(source: str) -> Path:
    """The parquet file of an embedded task (assets/README.md), such as `embedded:sentiment`. Raises UserError."""
    if source not in EMBEDDED_DATA:
        raise UserError(
            f"there is no '{source}'{nearest(source, EMBEDDED_DATA)}: expected {' or '.join(EMBEDDED_DATA)}"
        )
    return Path(str(resources.files("sepo") / "assets" / f"{source.removeprefix('embedded:')}_pairs.parquet"))


def _is_embedded(source: str) -> bool:
    return source.startswith("embedded:")


def has_own_rows(settings: DataSettings) -> bool:
    """Do held-out pairs come from other rows than the training pairs, with `pair_id`s of their own?"""
    own_split = settings.held_out_split is not None and not _is_embedded(settings.source)
    return settings.held_out_source is not None or own_split


def _place(source: str) -> str:
    return str(embedded_data(source)) if _is_embedded(source) else source


def prepare_data(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Read, validate, tokenise and split a preference dataset into `out/train` and `out/held_out`.

    Returns:
        counts of the pairs, `train` and `held_out`; `extremes` of both; the report of dropped rows; and of several
        sources the counts of each, by name.
    """
    sources, reports = read_sources(settings, tokenizer, out, seed, progress)
    # A value below 1 is a share.
    number = int(settings.held_out) if settings.held_out >= 1 else settings.held_out
    source, own = sources[0], sources[-1]
    if settings.sources is not None and settings.sources[0].weight is not None:
        weights = [float(one.weight or 0) for one in settings.sources]
        ids = source.rows.pair_ids
        weighted = source.select(share_rows(ids, ids // ROWS_PER_SOURCE, weights, seed=seed))
        source, own = weighted, weighted if own is source else own
    if own is not source:
        held = sampled_rows(own.rows.pair_ids, int(number), seed) if number >= 1 else np.arange(len(own.rows))
        train, _ = source.rows.split(0, settings.sample)
        recorded: dict[str, Any] = {"held_out": 0, "sample": settings.sample, "seed": seed}
    else:
        train, held = source.rows.split(number, settings.sample)
        recorded = {"held_out": number, "sample": settings.sample, "seed": seed}
        if near := source.rows.near_duplicates():
            log(
                f"  {near:,} prompts repeat the first user turn of another prompt (in other case or white space, with "
                "another system turn or later turns): the split keeps them on one side"
            )
    found = {
        "train": _write_rows(out / "train", source, train, split_provenance("train", **recorded)),
        "held_out": _write_rows(
            out / "held_out", own, held, {} if own is not source else split_provenance("held_out", **recorded)
        ),
    }
    log_reports(reports)
    shared = 0 if own is source else shared_prompts((source.rows, train), (own.rows, held))
    if shared:
        log(f"  {shared:,} prompts are both trained on and held out: held-out figures are not all of unseen prompts")
    if settings.held_out and not len(held):
        log(f"  data.held_out {settings.held_out:g} of {len(train):,} pairs is no pair: nothing will be evaluated")
    return {
        "train": len(train),
        "held_out": len(held),
        **_counts_by_source(settings, (source, train), (own, held)),
        "shared_prompts": shared,
        "extremes": found,
        "report": {name: one.to_dict() for name, one in reports.items()},
    }


@dataclass
class Source:
    """The tokenised pairs of a split, on disk.

    Attributes:
        spool: rows in the schema `ENCODED`.
        rows: what a split needs to know of them.
        provenance: of a table of them.
        places: their rows in the spool; None: all of it.
    """

    spool: Spool
    rows: PairRows
    provenance: dict[str, Any]
    places: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> Source:
        """Some of its rows."""
        return Source(self.spool, self.rows.select(rows), self.provenance, rows)

    def take(self, rows: np.ndarray, provenance: Mapping[str, Any] = MappingProxyType({})) -> pa.Table:
        """A table of kind "pairs" of some rows, with more provenance."""
        rows = rows if self.places is None else self.places[rows]
        return pairs_of(self.spool.take(rows), {**self.provenance, **provenance})

    def matching(self, table: pa.Table) -> pa.Table:
        """The pairs with the `pair_id`s of a table, in its order; those that are there."""
        return self.take(self.rows.rows_of(table["pair_id"].to_pylist()))


def _write_rows(folder: Path, source: Source, rows: np.ndarray, provenance: Mapping[str, Any]) -> dict[str, int]:
    """`write_pairs` for rows of a source; returns their `extremes`."""
    clear_shards(folder)
    number = math.ceil(len(rows) / PAIRS_PER_SHARD)
    shards = source.rows.grouped(rows, PAIRS_PER_SHARD) if number > 1 else iter([rows])
    found = []
    for index, part in enumerate(shards):
        table = source.take(part, provenance)
        write_shard(folder, index, table, max(number, 1))
        found.append(extremes(table))
    return {name: max(one[name] for one in found) for name in found[0]}


# Each source numbers its pairs from a multiple of this.
ROWS_PER_SOURCE = 10**9


def _counts_by_source(settings: DataSettings, *parts: tuple[Source, np.ndarray]) -> dict[str, Any]:
    """Pairs of each of several sources by their `pair_id`s, logged; nothing for a single source.

    Args:
        parts: the rows to train on and the held-out rows.
    """
    if settings.sources is None:
        return {}
    parts = parts[:1] if has_own_rows(settings) else parts
    number = len(settings.sources)
    counts = [
        np.bincount(source.rows.pair_ids[rows] // ROWS_PER_SOURCE, minlength=number).tolist() for source, rows in parts
    ]
    rows = []
    for index, name in enumerate(source_names(settings)):
        rows.append({"source": name, **dict(zip(PARTS, (count[index] for count in counts), strict=False))})
        said = ", ".join(f"{count[index]:,} {part}" for count, part in zip(counts, PARTS, strict=False))
        log(f"  {name}: {said.replace('_', ' ')}")
    return {"sources": rows}


def source_names(settings: DataSettings) -> list[str]:
    """A name for each source: the last part of a path, with its split."""
    return [f"{Path(part.source).name} ({part.split})" for part in settings.parts()]


def read_sources(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int = 0, progress: bool = True
) -> tuple[list[Source], dict[str, DataReport]]:
    """Tokenise the sources of a recipe, before any split.

    Args:
        folder: the pairs are kept in files without names in it.

    Returns:
        pairs, and held-out pairs, if they have a split or source of their own; and the report of each split.
    """
    split, held_out_split = settings.split, settings.held_out_split
    if settings.sources is not None:
        source, reports = _joined(settings, tokenizer, folder, seed, progress)
    else:
        if _is_embedded(settings.source):
            held_out_split = held_out_split or "held_out"
        source, report = read_source(settings, split, tokenizer, folder, seed, progress)
        reports = {split: report}
    if not (held_out_split or settings.held_out_source):
        return [source], reports
    name = held_out_split if held_out_split and settings.held_out_source is None else "held_out"
    own, own_report = read_source(*held_out_data(settings, held_out_split), tokenizer, folder, seed, progress)
    return [source, own], reports | {name: own_report}


def read_source(
    settings: DataSettings,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Source, DataReport]:
    """Tokenise one split; arguments as in `read_sources`."""
    spool, provenance, report = _tokenize(settings, split, tokenizer, progress, partial(Spool, folder, ENCODED))
    rows = PairRows(seed)
    for table in spool:
        rows.add(table)
    return Source(spool, rows, provenance), report


def _joined(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, progress: bool
) -> tuple[Source, dict[str, DataReport]]:
    """The pairs of several sources, whose `pair_id`s count from `ROWS_PER_SOURCE` times the source."""
    spool, rows = Spool(folder, ENCODED), PairRows(seed)
    provenances: list[dict[str, Any]] = []
    reports: dict[str, DataReport] = {}
    for number, (name, part) in enumerate(zip(source_names(settings), settings.parts(), strict=True)):
        tables, provenance, report = _tokenize(part, part.split, tokenizer, progress, partial(Spool, folder, ENCODED))
        reports[name if name not in reports else f"{name} {number + 1}"] = report
        provenances.append(provenance)
        for table in tables:
            ids = pa.array(table["pair_id"].to_numpy() + number * ROWS_PER_SOURCE)
            table = table.set_column(0, "pair_id", ids)
            rows.add(table)
            spool.append(table)
    digests = [provenance["dataset"] for provenance in provenances]
    provenance = {**provenances[0], "dataset": short_digest("".join(digests)), "sources": digests}
    for name, holds in ((SEVERAL_TURNS, any), (PLAIN_TEXT, all)):
        provenance.pop(name, None)
        provenance |= {name: True} if holds(name in one for one in provenances) else {}
    return Source(spool, rows, provenance), reports


def log_reports(reports: Mapping[str, DataReport]) -> None:
    """Log kept and dropped rows of each split."""
    for name, one in reports.items():
        log(f"  {name}: {one.summary()}")


ROLES = ("reference", "oracle", "policy")


def check_limits(recipe: Recipe, tables: Iterable[pa.Table], answers: int = 0, roles: Sequence[str] = ROLES) -> None:
    """Raise a UserError if a model of the recipe cannot read the pairs; log it if a model would extrapolate.

    Args:
        tables: kind "pairs", or tables with the same columns.
        answers: check prompts with this many generated tokens; 0: check pairs.
        roles: models that read these tables; they share a tokenizer.
    """
    tables = [table for table in tables if len(table)]
    _, first, revision = _models(recipe, roles[:1])[0]
    tokenizer = load_tokenizer(first, revision=revision)
    for name, limits in _limits(recipe, roles):
        for table in tables:
            check_ids(table, name, limits, tokenizer)
            check_lengths(table, name, limits, answers)


def _models(recipe: Recipe, roles: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """Role, name and revision of the recipe's models."""
    first = (recipe.reference.model, recipe.reference.revision)
    named = {
        "reference": first,
        "oracle": first if recipe.oracle.model is None else (recipe.oracle.model, None),
        "policy": first if recipe.policy.model is None else (recipe.policy.model, recipe.policy.revision),
    }
    return [(role, *named[role]) for role in roles]


def _limits(recipe: Recipe, roles: Sequence[str] = ROLES) -> list[tuple[str, ModelLimits]]:
    """Name and limits of each distinct model."""
    models = sorted({(name, revision) for _, name, revision in _models(recipe, roles)}, key=str)
    return [(name, model_limits(load_config(name, revision=revision))) for name, revision in models]


def extremes(table: pa.Table) -> dict[str, int]:
    """What model limits are compared with: `largest_id`, and tokens of the `longest` prompt with response and of the
    `longest_prompt`. An empty table gives -1 and 0.
    """
    prompts = flat(table.column("prompt_ids"))[1]
    ids = (flat(table.column(name))[0] for name in table.column_names if name.endswith("_ids"))
    return {
        "largest_id": max(int(values.max(initial=-1)) for values in ids),
        "longest": max(int((prompts + read_lengths(table, side)).max(initial=0)) for side in SIDES),
        "longest_prompt": int(prompts.max(initial=0)),
    }


def within_limits(recipe: Recipe, found: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether pairs, and answers to held-out prompts, are within the limits of every model.

    Args:
        found: `extremes` of the parts "train" and "held_out".
    """
    vocabulary = max(part["largest_id"] for part in found.values()) + 1
    longest = max(part["longest"] for part in found.values())
    if recipe.eval.prompts:
        longest = max(longest, found["held_out"]["longest_prompt"] + recipe.eval.max_new_tokens)
    return all(
        vocabulary <= limits.vocabulary and (limits.positions is None or longest <= limits.positions)
        for _, limits in _limits(recipe)
    )


def write_pairs(folder: Path, table: pa.Table) -> None:
    """Write a table of kind "pairs" in shards.

    Scoring reads repeated prompts and responses of a shard once. Pairs with the same prompt therefore go into the same
    shard: AlpacaEval pairs (ten a prompt, rows of 2,048 tokens) then need 55 % of the tokens of single sequences,
    instead of 68 %.
    """
    if len(table) > PAIRS_PER_SHARD:
        table = group_by_prompt(table)
    write_table(folder, table, PAIRS_PER_SHARD)


def held_out_data(settings: DataSettings, split: str | None) -> tuple[DataSettings, str]:
    """Settings and split of held-out pairs with a source of their own."""
    if settings.held_out_source is None:
        return settings, split or "train"
    return settings.model_copy(update={"source": settings.held_out_source, "config_name": None}), split or "train"


def read_pairs(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, progress: bool = True) -> pa.Table:
    """Read and tokenise one split; for the single commands."""
    parts, provenance, report = _tokenize(settings, settings.split, tokenizer, progress, list[pa.Table])
    log(f"  {settings.split}: {report.summary()}")
    return pairs_of(pa.concat_tables(parts), provenance)


def _tokenize(
    settings: DataSettings,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool,
    make_parts: Callable[[], P],
) -> tuple[P, dict[str, Any], DataReport]:
    workers: Any = settings.workers
    if not work.is_local():
        from sepo.stages.encode import encoded_by_units

        workers = partial(encoded_by_units, settings, split, _place(settings.source))
    options = Options(
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        as_chat=settings.as_chat,
        chat_template_kwargs=settings.chat_template_kwargs,
        progress=progress,
        workers=workers,
    )
    return tokenize_into(make_parts, read_split(settings, split), tokenizer, options)


def read_split(settings: DataSettings, split: str) -> datasets.Dataset:
    """Read the rows of one split, with columns renamed. Raises UserError."""
    if not _is_embedded(settings.source):
        return load_preferences(
            settings.source,
            split=split,
            config_name=settings.config_name,
            columns=dict(settings.columns),
            pairs_from=settings.pairs_from,
        )
    dataset = load_preferences(embedded_data(settings.source), columns=dict(settings.columns))
    rows = [index for index, name in enumerate(dataset["split"]) if name == split]
    if not rows:
        raise UserError(f"{settings.source} has no split '{split}': expected train or held_out")
    return dataset.select(rows)
