"""Stage "..._logps": a frozen model scores all pairs; the log-probabilities are stored once and read many times.

Those of the reference are half of the token reward *and*, where the oracle trains in the same types, the reference term
of its DPO. A training in other types (bfloat16 autocast) has a pass of its own, stored likewise. Each process scores
shards of its own, and keeps an existing shard of the same model, types and pairs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sepo import processes, work
from sepo.bars import progress_bar
from sepo.data.tables import (
    provenance_of,
    read_shard,
    shard_digest,
    shard_path,
    shard_problem,
    table_digest,
    table_paths,
    with_provenance,
    write_shard,
)
from sepo.errors import UserError, log_kept_on_interrupt
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import TablePairs, Types, logps_of_parts, tokens_per_row_for
from sepo.models.devices import choose_device, choose_dtype, dtype_name
from sepo.models.fingerprint import model_fingerprint
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import Recipe
from sepo.stages.stage import PARTS, Model, Stage, StageResult
from sepo.work import Counts, Job, Progress, Unit


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
        facts={"recipe": recipe, "role": role, "types": types},
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
    paths = table_paths(pairs, "pairs")
    found, longest = processes.on_main(lambda: _shards_to_do(model, pairs, out, types, device))
    if not found:
        return out
    todo = [Unit(*unit) for unit in found]

    def kept() -> str:
        number = sum(shard_path(out, index).is_file() for index in range(len(paths)))
        return f"{number} of {len(paths)} parts of '{out}' are kept; the same command continues with the next"

    total = sum(pq.read_metadata(path).num_rows for path in paths)
    bar = progress_bar(
        processes.is_main(),
        total=total,
        initial=total - sum(unit.size for unit in todo),
        desc=f"  {description}",
        unit="pair",
        smoothing=0.05,
    )
    settings = {
        "model": work.absolute(model),
        "fingerprint": todo[0].details["provenance"]["model"],
        "pairs": work.absolute(pairs),
        "out": os.path.abspath(out),
        "types": types._asdict(),
        "tokens_per_row": tokens_per_row,
        "longest": longest,
        "shards": len(paths),
        "device": device,
    }
    job = Job("sepo.stages.logps:Passes", description, settings, tuple(todo), choose_device(device).type)
    with log_kept_on_interrupt(kept), bar:
        work.do(job, bar.update)
        processes.wait()
        unseen = [path for unit in todo if not processes.appears(path := _path(settings, unit))]
        if unseen:
            raise UserError(f"'{unseen[0]}', which another process wrote, does not appear here: use one shared folder")
    return out


class Passes:
    """A kind of work: log-probabilities of shards of a pairs table under a frozen model.

    In a launch each process scores whole shards, and yields those that it has to write.
    """

    together = True

    def __init__(self, settings: Mapping[str, Any]):
        self.settings, self.types = settings, Types(**settings["types"])
        if model_fingerprint(settings["model"]) != settings["fingerprint"]:
            raise UserError(f"the model '{settings['model']}' is not the same here as where the job was started")
        self.model = load_model(
            settings["model"],
            device=settings["device"],
            dtype=self.types.dtype,
            quantization=self.types.quantization,
            sharded=processes.read_sharded() and self.types.quantization is None,
        )
        budget = settings["tokens_per_row"] or tokens_per_row_for(choose_device(settings["device"]), scoring=True)
        # The layout of a shard must not depend on the shards that this process happened to read before.
        prepare_model(self.model, longest=settings["longest"], tokens_per_row=budget)

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Callable[[], Counts]]]:
        pairs, device = Path(self.settings["pairs"]), choose_device(self.settings["device"])
        taken: deque[tuple[list[Unit], bool]] = deque()

        def scored_pairs(done: int) -> None:
            progress(done * processes.size())

        def parts() -> Iterator[tuple[Iterator[pa.Table], bool]]:
            for part, shared in _parts(units):
                taken.append((part, shared))
                yield (read_shard(shard_path(pairs, unit.details["index"]), "pairs") for unit in part), shared

        tables = logps_of_parts(
            self.model,
            parts(),
            tokens_per_row=self.settings["tokens_per_row"],
            progress=scored_pairs,
        )
        low = None if self.types.autocast is None else choose_dtype(self.types.autocast)
        while True:
            with torch.autocast(device.type, low, enabled=low is not None):
                scored = next(tables, None)
            if scored is None:
                return
            part, shared = taken.popleft()
            for place, (unit, table) in enumerate(zip(part, scored, strict=True)):
                if not shared or place == processes.rank():
                    yield unit, partial(self._write, unit, table)

    def _write(self, unit: Unit, table: pa.Table) -> Counts:
        provenance = {**provenance_of(table), **unit.details["provenance"]}
        table = with_provenance(table, "logps", provenance)
        write_shard(Path(self.settings["out"]), unit.details["index"], table, self.settings["shards"])
        return {"pairs": len(table)}

    @staticmethod
    def result(settings: Mapping[str, Any], unit: Unit) -> str | None:
        of_table = {
            "autocast": settings["types"]["autocast"],
            "shard": unit.details["index"],
            "shards": settings["shards"],
        }
        return shard_digest(_path(settings, unit), {**unit.details["provenance"], **of_table})


def _path(settings: Mapping[str, Any], unit: Unit) -> Path:
    return shard_path(Path(settings["out"]), unit.details["index"])


def _parts(units: Iterable[Unit]) -> Iterator[tuple[list[Unit], bool]]:
    """The shards that this process scores, part by part, and whether all processes divide the rows of a part.

    A process scores whole shards, so that no process waits for another; the last shards, fewer than processes, are
    divided. Those of a sharded model are all divided, as many as processes at a time.
    """
    for part in batched(units, processes.size()):
        if processes.read_sharded() or len(part) < processes.size():
            yield part, True
        else:
            yield [part[processes.rank()]], False


def batched(units: Iterable[Unit], number: int) -> Iterator[list[Unit]]:
    """Lists of `number` units, the last one possibly shorter."""
    units = iter(units)
    while part := list(islice(units, number)):
        yield part


def _shards_to_do(model: str, pairs: Path, out: Path, types: Types, device: str) -> tuple[list[Unit], int]:
    """The shards that are missing or out of date, as units, and the tokens of the longest pair of the table."""
    chosen = choose_device(device)
    weights = dtype_name(types.dtype, chosen.type)
    weights += "" if types.quantization is None else f" {types.quantization}"
    fingerprint = {"model": model_fingerprint(model), "dtype": weights, "device": chosen.type}
    paths = table_paths(pairs, "pairs")
    todo: list[Unit] = []
    longest = 0
    problems: list[str] = []
    for index, path in enumerate(paths):
        table = read_shard(path, "pairs")
        longest = max(longest, TablePairs(table).longest)
        made_from = {"tokenizer": provenance_of(table).get("tokenizer"), "pairs": table_digest(table)}
        expected = {**fingerprint, **made_from}
        stored = shard_path(out, index)
        of_table = {"autocast": types.autocast, "shard": index, "shards": len(paths)}
        problem = shard_problem(stored, "logps", {**expected, **of_table})
        if problem is not None:
            todo.append(Unit(stored.stem, len(table), {"index": index, "provenance": expected}))
            problems += [f"{stored} {problem}"] if stored.exists() else []
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        log(f"  {problems[0]}{more}: computed again")
    for stale in (
        *(shard_path(out, u.details["index"]) for u in todo),
        *sorted(out.glob("part-*.parquet"))[len(paths) :],
    ):
        stale.unlink(missing_ok=True)
    return todo, longest
