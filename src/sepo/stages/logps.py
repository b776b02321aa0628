"""Stage "..._logps": a frozen model scores all pairs; the log-probabilities are stored once and read many times.

Those of the reference are half of the token reward *and*, where the oracle trains in the same types, the reference term
of its DPO. A training in other types (bfloat16 autocast) has a pass of its own, stored likewise. Each process scores
shards of its own, and keeps an existing shard of the same model, types and pairs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sepo import processes
from sepo.bars import progress_bar
from sepo.data.tables import (
    FORMAT_VERSION,
    provenance_of,
    read_schema,
    read_shard,
    shard_path,
    table_digest,
    table_paths,
    with_provenance,
    write_shard,
)
from sepo.errors import UserError, log_kept_on_interrupt, one_line
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import TablePairs, Types, logps_of_parts, tokens_per_row_for
from sepo.models.devices import choose_device, choose_dtype, dtype_name
from sepo.models.fingerprint import model_fingerprint
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.stages.cost import Cost, Estimate, FrozenMemory, ModelSize, Sizes
from sepo.stages.stage import PARTS, Model, Stage, StageResult


def stage(recipe: Recipe, model: Model, pairs: StageResult, role: str, types: Types) -> Stage:
    """Log-probabilities of the training pairs, and of the held-out pairs in `held_out`.

    Args:
        role: the model's role: "reference", an oracle's name, "oracle_start" (the reference in the types of the
            oracle's training), or "policy_start", which reads the policy's own pairs.
    """
    named = {name: value for name, value in types._asdict().items() if value is not None}

    def run(folder: Path) -> dict[str, Any]:
        for part in PARTS:
            logps_pass(
                model.folder,
                pairs.folder / part,
                part_of(folder, part),
                device=recipe.device,
                types=types,
                tokens_per_row=recipe.tokens_per_row,
                description=f"{role} {part}",
            )
        return {}

    return Stage(
        kind="logps",
        what=f"log-probabilities, {Path(model.folder).name}",
        depends={"model": model.content, "pairs": pairs.content, **named},
        outputs=("part-*.parquet", "held_out/part-*.parquet"),
        run=run,
        cost=lambda sizes: cost(recipe, sizes, role, types),
        verifies=True,
    )


def scoring_dtype(recipe: Recipe) -> str:
    """The dtype of weights for scoring: float32, unless the recipe sets another.

    Token rewards are small differences; bfloat16 weights would round most of the oracle's change away.
    """
    return "float32" if recipe.dtype == "auto" else recipe.dtype


def part_of(folder: Path, part: str) -> Path:
    """The folder with the log-probabilities of one part of the pairs."""
    return folder if part == "train" else folder / part


def logps_pass(
    model: str,
    pairs: Path,
    out: Path,
    *,
    device: str = "auto",
    types: Types | None = None,
    tokens_per_row: int | None = None,
    description: str = "log-probabilities",
) -> Path:
    """Store the log-probability of every response token of a pairs table under a frozen model.

    The table is written shard by shard. Existing shards of the same model, types and pairs are kept, so an interrupted
    pass continues.
    """
    processes.join(device)
    types = types or Types("auto")
    shards = len(table_paths(pairs, "pairs"))
    todo = processes.on_main(lambda: _shards_to_do(model, pairs, out, types, device))
    if not todo:
        return out

    def kept() -> str:
        number = sum(shard_path(out, index).is_file() for index in range(shards))
        return f"{number} of {shards} parts of '{out}' are kept; the same command continues with the next"

    total = sum(pq.read_metadata(path).num_rows for path in table_paths(pairs, "pairs"))
    bar = progress_bar(
        processes.is_main(),
        total=total,
        initial=total - sum(item["pairs"] for item in todo),
        desc=f"  {description}",
        unit="pair",
        smoothing=0.05,
    )
    with log_kept_on_interrupt(kept), bar:
        loaded = load_model(
            model,
            device=device,
            dtype=types.dtype,
            quantization=types.quantization,
            sharded=processes.read_sharded() and types.quantization is None,
        )
        budget = tokens_per_row or tokens_per_row_for(choose_device(device), scoring=True)
        prepare_model(loaded, longest=max(item["longest"] for item in todo), tokens_per_row=budget)
        parts = _parts(todo)
        tables = logps_of_parts(
            loaded,
            (
                ((read_shard(shard_path(pairs, item["index"]), "pairs") for item in part), shared)
                for part, shared in parts
            ),
            tokens_per_row=tokens_per_row,
            progress=lambda done: bar.update(done * processes.size()),
        )
        low = None if types.autocast is None else choose_dtype(types.autocast)
        with torch.autocast(choose_device(device).type, low, enabled=low is not None):
            for (part, shared), scored in zip(parts, tables, strict=True):
                for place, (item, table) in enumerate(zip(part, scored, strict=True)):
                    if not shared or place == processes.rank():
                        provenance = {**provenance_of(table), **item["provenance"]}
                        write_shard(out, item["index"], with_provenance(table, "logps", provenance), shards)
        processes.wait()
        unseen = [path for item in todo if not processes.appears(path := shard_path(out, item["index"]))]
        if unseen:
            raise UserError(f"'{unseen[0]}', which another process wrote, does not appear here: use one shared folder")
    return out


def _parts(todo: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], bool]]:
    """The shards that this process scores, part by part, and whether all processes divide the rows of a part.

    A process scores whole shards, so that no process waits for another; the last shards, fewer than processes, are
    divided. Those of a sharded model are all divided, as many as processes at a time.
    """
    number = processes.size()
    parts = [todo[start : start + number] for start in range(0, len(todo), number)]
    return [
        (part, True) if processes.read_sharded() or len(part) < number else ([part[processes.rank()]], False)
        for part in parts
    ]


def _shards_to_do(model: str, pairs: Path, out: Path, types: Types, device: str) -> list[dict[str, Any]]:
    """The shards that are missing or out of date, each with its provenance and number of pairs."""
    chosen = choose_device(device)
    weights = dtype_name(types.dtype, chosen.type)
    weights += "" if types.quantization is None else f" {types.quantization}"
    fingerprint = {"model": model_fingerprint(model), "dtype": weights, "device": chosen.type}
    paths = table_paths(pairs, "pairs")
    todo: list[dict[str, Any]] = []
    problems: list[str] = []
    for index, path in enumerate(paths):
        table = read_shard(path, "pairs")
        made_from = {"tokenizer": provenance_of(table).get("tokenizer"), "pairs": table_digest(table)}
        expected = {**fingerprint, **made_from}
        stored = shard_path(out, index)
        of_table = {"autocast": types.autocast, "shard": index, "shards": len(paths)}
        problem = _shard_problem(stored, {**expected, **of_table})
        if problem is not None:
            todo.append(
                {"index": index, "provenance": expected, "pairs": len(table), "longest": TablePairs(table).longest}
            )
            problems += [f"{stored} {problem}"] if stored.exists() else []
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        log(f"  {problems[0]}{more}: computed again")
    for stale in (
        *(shard_path(out, item["index"]) for item in todo),
        *sorted(out.glob("part-*.parquet"))[len(paths) :],
    ):
        stale.unlink(missing_ok=True)
    return todo


def _shard_problem(path: Path, expected: dict[str, Any]) -> str | None:
    """Why a stored shard cannot be reused; None if it is complete and has the expected provenance."""
    if not path.is_file():
        return "is missing"
    try:
        found = provenance_of(read_schema(path))
        for key, value in {"version": FORMAT_VERSION, **expected}.items():
            if found.get(key) != value:
                return f"was made with another {key}"
        read_shard(path, "logps")
    except (UserError, OSError, ValueError, pa.ArrowException) as error:
        return f"is damaged ({one_line(error, 200)})"
    return None


def scoring_estimates(sizes: Sizes, model: ModelSize, types: Types) -> tuple[Estimate, ...]:
    """A frozen model scores all pairs."""
    parts = (sizes.train, sizes.held_out)
    computes_in = types.autocast or types.dtype
    reads = [Estimate("score", model, part.scored, part.responses, dtype=computes_in) for part in parts if part.pairs]
    return (*(Estimate("load", model, dtype=types.dtype) for _ in reads), *reads)


def cost(recipe: Recipe, sizes: Sizes, role: str, types: Types) -> Cost:
    """A model of some role scores all pairs."""
    model = sizes.small
    if role == "policy_start":
        sizes, model = sizes.of_policy, sizes.large
    train, held_out = sizes.train, sizes.held_out
    tokens = recipe.tokens_per_row or tokens_per_row_for(sizes.device, scoring=True)
    longest = min(max(tokens, train.longest), train.scored + held_out.scored)
    share = train.responses / max(train.tokens, 1)
    return Cost(
        "log-probabilities",
        train.pairs + held_out.pairs,
        train.scored + held_out.scored,
        scoring_estimates(sizes, model, types),
        FrozenMemory(
            model.shape,
            sizes.device,
            width_of(types.dtype, sizes.device),
            longest,
            math.ceil(share * longest),
            processes=sizes.processes,
        ),
    )


def width_of(dtype: str, device: str) -> int:
    """Bytes of a frozen weight."""
    return 4 if dtype == "float32" or (dtype == "auto" and device != "cuda") else 2
