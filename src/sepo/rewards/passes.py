"""Log-probabilities under an oracle and its reference, kept shard by shard: an interrupted command continues."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.forward.scoring import Types
from sepo.models.folders import adapter_base, is_adapter
from sepo.models.tokenizer import load_tokenizer
from sepo.rewards.function import NO_REFERENCE
from sepo.stages.data import write_pairs
from sepo.stages.logps import logps_pass
from sepo.stages.oracle import check_differs
from sepo.stages.reference import hash_model


class Models(NamedTuple):
    """The folders of an oracle and of its reference, and the oracle's tokenizer: that of both, but for its template."""

    oracle: str
    reference: str
    tokenizer: PreTrainedTokenizerBase


def find_models(oracle: str, reference: str | None = None) -> Models:
    """Both models by their names; without a reference, the oracle is an adapter and its base the reference.

    Raises:
        UserError: no such model, the models have different tokenizers, or the same weights.
    """
    after = hash_model(oracle)
    folder = Path(after.folder)
    if reference is None and not is_adapter(folder):
        raise UserError(NO_REFERENCE)
    before = hash_model(*(adapter_base(folder) if reference is None else (reference,)))
    tokenizer = load_tokenizer(oracle)

    def check() -> None:
        if reference is not None:
            check_same_tokenizer("the oracle", tokenizer, "the reference", load_tokenizer(reference))
        check_differs(oracle, after, before)

    processes.on_main(check)
    return Models(after.folder, before.folder, tokenizer)


def both_passes(
    models: Models,
    pairs: Path,
    out: Path,
    *,
    device: str = "auto",
    types: Types | None = None,
    tokens_per_row: int | None = None,
) -> dict[str, Path]:
    """Store the log-probabilities of a pairs table under both models, in the folders `reference` and `oracle` of `out`.

    Args:
        types: of the passes; float32 weights if None.
    """
    return {
        role: logps_pass(
            model, pairs, out / role, device=device, types=types or Types("float32"), tokens_per_row=tokens_per_row,
            description=role,
        )
        for role, model in (("reference", models.reference), ("oracle", models.oracle))
    }  # fmt: skip


def kept_logps(models: Models, table: pa.Table, place: Path, device: str = "auto") -> list[pa.Table]:
    """Tables of kind "logps" under the oracle and the reference, row for row with a pairs table, which is sorted by
    `pair_id`. An interrupted call continues from the shards in `place`.
    """
    write_pairs(place / "pairs", table)
    stores = both_passes(models, place / "pairs", place, device=device)
    return [read_table(stores[role], "logps").sort_by("pair_id") for role in ("oracle", "reference")]
