"""Stages "policy_pairs" and "transfer", for a policy with another tokenizer: its pairs, and their token rewards.

    source ----> pairs under the oracle's tokenizer ---> scores ----.
       \\-------> pairs under the policy's tokenizer ----------------+--> scores under the policy's tokenizer

`pairs_stage` tokenises the source with the policy's tokenizer and chat template, and keeps the pairs whose responses
are the same texts. `stage` carries the rewards over to them (`transfer.carry`). The policy is trained and measured on
these tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from sepo import processes, work
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint
from sepo.data.tables import (
    clear_shards,
    provenance_of,
    read_schema,
    read_shard,
    shard_digest,
    shard_path,
    table_digest,
    table_paths,
    with_provenance,
    write_shard,
)
from sepo.errors import UserError
from sepo.models.tokenizer import load_tokenizer
from sepo.processes import log
from sepo.recipe.settings import Recipe, TransferSettings
from sepo.stages import data
from sepo.stages.score import Words, words_found
from sepo.stages.stage import PARTS, SCORES, SCORES_HELD_OUT, Stage, StageResult
from sepo.stages.train import own_tokenizer, tokenizers
from sepo.work import Counts, Job, Progress, Unit

if TYPE_CHECKING:
    from sepo.data.vocabulary import TokenBytes
    from sepo.transfer.carry import TransferReport


def check(recipe: Recipe) -> None:
    """Check that both tokenizers can be mapped to bytes, if the policy has its own."""
    if own_tokenizer(recipe):
        _readers(tokenizers(recipe), (recipe.reference.model, str(recipe.policy.model)))


def _readers(
    both: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], names: tuple[str, str]
) -> tuple[TokenBytes, TokenBytes]:
    from sepo.data.vocabulary import token_bytes

    return token_bytes(both[0], names[0]), token_bytes(both[1], names[1])


def pairs_stage(recipe: Recipe, pairs: StageResult) -> Stage:
    """Pairs under the policy's tokenizer, in `train` and `held_out`; those of `pairs` that have the same texts."""
    both = tokenizers(recipe)
    own = data.stage(recipe, both[1])
    return Stage(
        kind="policy_pairs",
        what=f"pairs under the tokenizer of {Path(str(recipe.policy.model)).name}",
        depends={**own.depends, "pairs": pairs.content, "from": tokenizer_fingerprint(both[0])},
        outputs=PARTS,
        run=lambda folder: processes.on_main(lambda: prepare_pairs(recipe, pairs.folder, folder)),
        facts={},
    )


def prepare_pairs(recipe: Recipe, pairs: Path, out: Path) -> dict[str, Any]:
    """Write the pairs of `pairs/train` and `pairs/held_out` under the policy's tokenizer.

    Returns:
        counts `train` and `held_out`, the report of dropped rows, and the figures of `TransferReport` as
        `train_transfer` and `held_out_transfer`.
    """
    both = tokenizers(recipe)
    names = recipe.reference.model, str(recipe.policy.model)
    readers = _readers(both, names)
    sources, reports = data.read_sources(recipe.data, both[1], out)
    data.log_reports({f"{name}, the policy's tokens": report for name, report in reports.items()})
    results: dict[str, Any] = {"report": {name: report.to_dict() for name, report in reports.items()}}
    for part in PARTS:
        source = sources[-1] if part == "held_out" else sources[0]
        found = carry_table(pairs / part, "pairs", source.matching, readers, out / part, names=names)
        log(f"  {part}, under both tokenizers: {found.summary()}")
        results |= {part: found.kept, f"{part}_transfer": found.figures()}
    return results


def stage(
    recipe: Recipe, scores: StageResult, pairs: StageResult, policy_pairs: StageResult, words: Words | None = None
) -> Stage:
    """Token rewards under the policy's tokenizer, in `scores` and `scores_held_out`.

    Args:
        scores: token rewards of `pairs`, under the oracle's tokenizer.
        policy_pairs: result of `pairs_stage`.
        words: also judge the rewards by the words of a gold reward, with the policy's tokenizer.
    """
    settings: TransferSettings = recipe.transfer

    def write(folder: Path) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for part, table in (("train", SCORES), ("held_out", SCORES_HELD_OUT)):
            targets = policy_pairs.folder / part
            found = carry_scores(recipe, scores.folder / table, targets, folder / table, f"transfer {part}")
            log(f"  {part}: {found.summary()}")
            if part == "train":
                results |= found.figures()
        return results | words_found(folder / SCORES, words)

    return Stage(
        kind="transfer",
        what=f"token rewards under the policy's tokenizer, by {settings.allocation}",
        depends={
            "transfer": settings.model_dump(mode="json"),
            "scores": scores.content,
            "pairs": pairs.content,
            "policy_pairs": policy_pairs.content,
            "words": words is not None and words.gold,
        },
        outputs=(SCORES, SCORES_HELD_OUT),
        run=lambda folder: processes.on_main(lambda: write(folder)),
        facts={"recipe": recipe},
    )


def carry_scores(recipe: Recipe, source: Path, targets: Path, out: Path, title: str) -> TransferReport:
    """Carry a score table over to the policy's tokenizer; as `carry_units`."""
    policy, reference = recipe.policy, recipe.reference
    named = [(reference.model, reference.revision), (str(policy.model), policy.revision)]
    return carry_units(named, recipe.transfer.allocation, source, targets, out, title)


def carry_units(
    tokenizers: Sequence[tuple[str, str | None]], allocation: str, source: Path, targets: Path, out: Path, title: str
) -> TransferReport:
    """Carry a score table over to another tokenizer: one shard of each table is a unit of work.

    Args:
        tokenizers: name and revision of models with the table's tokenizer and with the other one.
        source: the table's folder.
        targets: the pairs under the other tokenizer, shard by shard those of `source`.
        out: folder of the new table; its provenance names the old table in `transferred_from`.
        title: for progress.

    Raises:
        UserError: no pair is left.
    """
    from sepo.transfer.carry import TransferReport

    paths = table_paths(source, "scores")
    settings = {
        "source": work.absolute(source),
        "targets": work.absolute(targets),
        "out": os.path.abspath(out),
        "tokenizers": [[work.absolute(name), revision] for name, revision in tokenizers],
        "fingerprints": [tokenizer_fingerprint(load_tokenizer(name, revision=rev)) for name, rev in tokenizers],
        "targets_digest": _digest(table_paths(targets, "pairs"), "pairs"),
        "provenance": _provenance(paths, "scores", allocation),
        "shards": len(paths),
    }
    units = [
        Unit(f"part-{index:05d}", pq.read_metadata(path).num_rows, {"index": index, "path": work.absolute(path)})
        for index, path in enumerate(paths)
    ]
    if work.is_local():
        clear_shards(out)  # a unit replaces its shard; nothing here records which ones an earlier attempt made
    for stale in sorted(out.glob("part-*.parquet"))[len(paths) :]:
        stale.unlink()
    counts = work.do(Job("sepo.transfer.stages:Carry", title, settings, tuple(units)))
    total = sum((TransferReport(**counts[unit.name]) for unit in units), TransferReport())
    _require_pairs(total, source, out, (tokenizers[0][0], tokenizers[1][0]))
    return total


class Carry:
    """A kind of work: shards of a score table under the policy's tokenizer."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        named = settings["tokenizers"]
        first, second = (load_tokenizer(name, revision=revision) for name, revision in named)
        if [tokenizer_fingerprint(t) for t in (first, second)] != settings["fingerprints"]:
            raise UserError(f"a tokenizer of {named} is not the same here as where the job was started")
        self.readers = _readers((first, second), (named[0][0], named[1][0]))

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Callable[[], Counts]]]:
        from sepo.transfer.carry import carry

        targets = Path(self.settings["targets"])
        provenance = self.settings["provenance"]
        for unit in units:
            index = unit.details["index"]
            target = read_shard(shard_path(targets, index), "pairs")
            shard = read_shard(Path(unit.details["path"]), "scores")
            table, report = carry(shard, target, *self.readers, provenance["allocation"])
            progress(unit.size)
            yield unit, partial(self._write, index, table, asdict(report))

    def _write(self, index: int, table: pa.Table, report: Counts) -> Counts:
        _write_carried(Path(self.settings["out"]), index, table, self.settings["provenance"], self.settings["shards"])
        return report

    @staticmethod
    def result(settings: Mapping[str, Any], unit: Unit) -> str | None:
        index = unit.details["index"]
        expected = {"transferred_from": settings["provenance"], "shard": index, "shards": settings["shards"]}
        return shard_digest(shard_path(Path(settings["out"]), index), expected)


def write_targets(source: Path, targets: Callable[[pa.Table], pa.Table], out: Path) -> None:
    """Write the pairs of a score table under another tokenizer, shard by shard those of the table.

    Args:
        targets: gives for a shard of `source` a table of kind "pairs" with its pairs under the other tokenizer.
    """
    paths = table_paths(source, "scores")
    for index, path in enumerate(paths):  # replaced one by one: workers may be reading them
        write_shard(out, index, targets(read_shard(path, "scores")), len(paths))
    for stale in sorted(out.glob("part-*.parquet"))[len(paths) :]:
        stale.unlink()


def carry_table(
    source: Path,
    kind: str,
    targets: Callable[[pa.Table], pa.Table],
    readers: tuple[TokenBytes, TokenBytes],
    out: Path,
    allocation: str = "bytes",
    names: tuple[str, str] = ("the table", "the policy"),
) -> TransferReport:
    """Carry a table of pairs or scores over to another tokenizer, shard by shard.

    Args:
        source: the table's folder.
        kind: "pairs" or "scores".
        targets: gives for a shard of `source` a table of kind "pairs" with its pairs under the other tokenizer.
        readers: byte readers of the table's tokenizer and of the other tokenizer.
        out: folder of the new table; its provenance names the old table in `transferred_from`.
        names: the two models, for messages.

    Raises:
        UserError: no pair is left.
    """
    from sepo.transfer.carry import TransferReport, carry

    paths = table_paths(source, kind)
    provenance = _provenance(paths, kind, allocation)
    clear_shards(out)
    total = TransferReport()
    for index, path in enumerate(paths):
        shard = read_shard(path, kind)
        table, report = carry(shard, targets(shard), *readers, allocation)
        _write_carried(out, index, table, provenance, len(paths))
        total += report
    _require_pairs(total, source, out, names)
    return total


def _provenance(paths: list[Path], kind: str, allocation: str) -> dict[str, Any]:
    """What a carried table records about the table that it was made from."""
    provenance = {"table": _digest(paths, kind), "tokenizer": provenance_of(read_schema(paths[0])).get("tokenizer")}
    return {**provenance, "allocation": allocation} if kind == "scores" else provenance


def _write_carried(out: Path, index: int, table: pa.Table, provenance: Mapping[str, Any], shards: int) -> None:
    kind = str(provenance_of(table)["format"])
    write_shard(
        out, index, with_provenance(table, kind, {**provenance_of(table), "transferred_from": provenance}), shards
    )


def _require_pairs(total: TransferReport, source: Path, out: Path, names: tuple[str, str]) -> None:
    if total.pairs and not total.kept:
        clear_shards(out)
        raise UserError(
            f"no pair of '{source}' can be carried over from the tokenizer of '{names[0]}' to that of '{names[1]}': "
            f"{total.reasons()} (docs/how-to/two-tokenizers.md)"
        )


def _digest(paths: list[Path], kind: str) -> str:
    """Digest of a whole table, from its shards' stored digests if they have them."""
    recorded = [provenance_of(read_schema(path)).get("digest") for path in paths]
    found = [one or table_digest(read_shard(path, kind)) for one, path in zip(recorded, paths, strict=True)]
    return short_digest(" ".join(map(str, found)))
