"""Stages "policy_pairs" and "transfer", for a policy with another tokenizer: its pairs, and their token rewards.

    source ----> pairs under the oracle's tokenizer ---> scores ----.
       \\-------> pairs under the policy's tokenizer ----------------+--> scores under the policy's tokenizer

`pairs_stage` tokenises the source with the policy's tokenizer and chat template, and keeps the pairs whose responses
are the same texts. `stage` carries the rewards over to them (`credit.transfer`). The policy is trained and measured on
these tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint
from sepo.data.tables import (
    clear_shards,
    iter_tables,
    provenance_of,
    read_schema,
    read_shard,
    table_digest,
    table_paths,
    with_provenance,
    write_shard,
)
from sepo.errors import UserError
from sepo.models.folders import is_outline
from sepo.models.tokenizer import has_tokenizer, load_tokenizer
from sepo.processes import log
from sepo.recipe.settings import Recipe, TransferSettings
from sepo.stages import data
from sepo.stages.cost import Cost, Sizes
from sepo.stages.score import Words, words_found
from sepo.stages.stage import PARTS, SCORES, SCORES_HELD_OUT, Stage, StageResult

if TYPE_CHECKING:
    from sepo.credit.transfer import TransferReport
    from sepo.data.vocabulary import TokenBytes


def needed(recipe: Recipe) -> bool:
    """Does the policy have another tokenizer than oracle and reference?"""
    policy, reference = recipe.policy, recipe.reference
    if policy.model is None or (policy.model, policy.revision) == (reference.model, reference.revision):
        return False
    if is_outline(policy.model) and not has_tokenizer(policy.model):
        return False  # a plan of a model whose tokenizer is not here
    return len({tokenizer_fingerprint(one) for one in tokenizers(recipe)}) > 1


def tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers of reference and policy."""
    policy, reference = recipe.policy, recipe.reference
    return (
        load_tokenizer(reference.model, revision=reference.revision),
        load_tokenizer(str(policy.model), revision=policy.revision),
    )


def check(recipe: Recipe) -> None:
    """Check that both tokenizers can be mapped to bytes, if the policy has its own."""
    if needed(recipe):
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
        cost=pairs_cost,
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
    table, held_out, reports = data.read_sources(recipe.data, both[1])
    data.log_reports({f"{name}, the policy's tokens": report for name, report in reports.items()})
    results: dict[str, Any] = {"report": {name: report.to_dict() for name, report in reports.items()}}
    for part in PARTS:
        target = held_out if part == "held_out" and held_out is not None else table
        found = carry_table(pairs / part, "pairs", repeat(target), readers, out / part, names=names)
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
        names = recipe.reference.model, str(recipe.policy.model)
        readers = _readers(tokenizers(recipe), names)
        results: dict[str, Any] = {}
        for part, table in (("train", SCORES), ("held_out", SCORES_HELD_OUT)):
            targets = iter_tables(policy_pairs.folder / part, "pairs")
            found = carry_table(
                scores.folder / table, "scores", targets, readers, folder / table, settings.allocation, names
            )
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
        cost=lambda sizes: cost(recipe, sizes),
    )


def carry_table(
    source: Path,
    kind: str,
    targets: Iterable[pa.Table],
    readers: tuple[TokenBytes, TokenBytes],
    out: Path,
    allocation: str = "bytes",
    names: tuple[str, str] = ("the table", "the policy"),
) -> TransferReport:
    """Carry a table of pairs or scores over to another tokenizer, shard by shard.

    Args:
        source: the table's folder.
        kind: "pairs" or "scores".
        targets: for each shard of `source`, a table of kind "pairs" with its pairs under the other tokenizer.
        readers: byte readers of the table's tokenizer and of the other tokenizer.
        out: folder of the new table; its provenance names the old table in `transferred_from`.
        names: the two models, for messages.

    Raises:
        UserError: no pair is left.
    """
    from sepo.credit.transfer import TransferReport, carry

    paths = table_paths(source, kind)
    if source.resolve() == out.resolve():
        raise UserError(f"'{out}' holds the table itself: choose another folder for what is carried over")
    provenance = {"table": _digest(paths, kind), "tokenizer": provenance_of(read_schema(paths[0])).get("tokenizer")}
    if kind == "scores":
        provenance["allocation"] = allocation
    clear_shards(out)
    total = TransferReport()
    for index, (path, target) in enumerate(zip(paths, targets, strict=False)):
        table, report = carry(read_shard(path, kind), target, *readers, allocation)
        marked = with_provenance(table, kind, {**provenance_of(table), "transferred_from": provenance})
        write_shard(out, index, marked, len(paths))
        total += report
    if total.pairs and not total.kept:
        clear_shards(out)
        raise UserError(
            f"no pair of '{source}' can be carried over from the tokenizer of '{names[0]}' to that of '{names[1]}': "
            f"{total.reasons()} (docs/how-to/two-tokenizers.md)"
        )
    return total


def _digest(paths: list[Path], kind: str) -> str:
    """Digest of a whole table, from its shards' stored digests if they have them."""
    recorded = [provenance_of(read_schema(path)).get("digest") for path in paths]
    found = [one or table_digest(read_shard(path, kind)) for one, path in zip(recorded, paths, strict=True)]
    return short_digest(" ".join(map(str, found)))


def pairs_cost(sizes: Sizes) -> Cost:
    """Reading the source again: seconds."""
    own = sizes.of_policy
    return Cost(sizes.transfer, own.train.pairs + own.held_out.pairs, own.train.tokens + own.held_out.tokens)


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """Arithmetic on tokens: seconds."""
    return Cost(f"to the policy's tokens, by {recipe.transfer.allocation}", sizes.of_policy.train.pairs)
