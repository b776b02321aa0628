"""What the stages of a run cost: their work in FLOPs, tokens and updates, and the memory that they need.

A dry run makes times of it (`plan.py`), and a run itself what remains of it (`remaining.py`).
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from sepo.data.ragged import flat
from sepo.data.tables import read_shard, read_table, table_paths
from sepo.forward.packing import fill_rows, pack, read_length
from sepo.forward.scoring import table_pairs, tokens_per_row_for
from sepo.judging import benchmark_stages as benchmarks
from sepo.judging import task_stage as tasks
from sepo.models.config import load_shape, model_shape
from sepo.recipe.settings import Recipe
from sepo.stages import data, evaluate, logps, oracle, reference, score, select, train, transfer
from sepo.stages.stage import Cost, ModelSize, PairSizes, Sizes, Work

# Rows of this many pairs are laid out to see what packing saves; those of a larger table stand for all.
_SAMPLE = 4000


def stage_costs(recipe: Recipe, sizes: Sizes) -> dict[str, Cost]:
    """What each stage of a run costs, by the names of its record (`pipeline.STAGES`)."""
    own, given = sizes.of_policy, recipe.oracle.rewards is not None
    starts = (given or recipe.policy.model is not None) and train.needs_reference(recipe)
    costs = {
        "data": data.cost(recipe, sizes),
        "policy_pairs": transfer.pairs_cost(recipe, sizes) if sizes.policy else None,
        "reference": reference.cost(recipe, sizes),
        "reference_logps": None if given else logps.cost(recipe, sizes, sizes.small),
        "oracle": oracle.cost(recipe, sizes),
        "oracle_logps": None if given else logps.cost(recipe, sizes, sizes.small, oracle.readings(recipe.oracle)),
        "score": score.cost(recipe, sizes),
        "transfer": transfer.cost(recipe, sizes) if sizes.policy else None,
        "select": select.cost(recipe, own),
        "policy_start_logps": logps.cost(recipe, own, sizes.large) if starts else None,
        "train": train.cost(recipe, own),
        "eval": evaluate.cost(recipe, own),
        **{f"benchmark-{name}": benchmarks.cost(recipe, own, name) for name in recipe.eval.benchmarks},
        "tasks": tasks.cost(recipe, own) if recipe.eval.tasks else None,
    }
    return {name: cost for name, cost in costs.items() if cost is not None}


# Parts of a stage that the processes of a launch share.
SHARED = ("score", "train")


def work_by_record(recipe: Recipe, costs: dict[str, Cost], processes: int = 1) -> dict[str, list[Work]]:
    """The work of one process in each stage after the data, by the names of the records: of each oracle its own."""
    names = oracle.names(recipe.oracle) or ["oracle"]  # one that exists already is read under that name
    works: dict[str, list[Work]] = {}
    for name, cost in costs.items():
        own = [work.times(1 / processes) if work.kind in SHARED else work for work in cost.work or ()]
        if name in ("oracle", "oracle_logps"):
            each = [work.times(1 / len(names)) for work in own]
            works |= {name.replace("oracle", one): each for one in names}
        elif name not in ("data", "policy_pairs"):
            works[name] = own
    return works


def sizes_of(recipe: Recipe, folder: Path, kind: str, processes: int = 1) -> Sizes:
    """Count the pairs that lie in a folder, and lay out the models of a recipe without memory for their weights.

    Args:
        kind: of device ("cpu", "cuda", "mps").
        processes: devices that share the work.
    """
    budget = recipe.tokens_per_row or tokens_per_row_for(kind, scoring=True)
    prompts = prompts_of(read_table(folder / "held_out", "pairs"))
    small, large = models_of(recipe)
    return Sizes(
        train=pair_sizes(folder / "train", budget),
        held_out=pair_sizes(folder / "held_out", budget),
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        longest_prompt=max(map(len, prompts), default=0),
        small=small,
        large=large,
        device=kind,
        processes=processes,
    )


def prompts_of(pairs: pa.Table) -> list[tuple[int, ...]]:
    """The distinct prompts of a pairs table, sorted."""
    return sorted({tuple(ids) for ids in pairs.column("prompt_ids").to_pylist()})


def pair_sizes(folder: Path, budget: int) -> PairSizes:
    """Counts of a pairs table, and the tokens that a scoring pass reads in rows of a budget."""
    pairs = tokens = chosen = rejected = longest = packed = alone = 0
    for path in table_paths(folder, "pairs"):
        table = read_shard(path, "pairs")
        counts = [int(flat(table.column(f"{name}_ids"))[1].sum()) for name in ("prompt", "chosen", "rejected")]
        rows = table_pairs(table)
        lengths = [read_length(pair) for pair in rows]
        if pairs < _SAMPLE:
            packed += sum(pack(row).num_tokens for row in fill_rows(rows, budget))
            alone += sum(lengths)
        pairs, tokens, longest = pairs + len(rows), tokens + sum(counts), max([longest, *lengths])
        chosen, rejected = chosen + counts[1], rejected + counts[2]
    scored = round(tokens * packed / max(alone, 1))
    return PairSizes(pairs, tokens, scored, chosen, rejected, longest)


def models_of(recipe: Recipe) -> tuple[ModelSize, ModelSize]:
    """The reference and the policy."""
    name, revision = recipe.reference.model, recipe.reference.revision
    layers = recipe.reference.layers
    shape = load_shape(name, revision=revision) if layers is None else model_shape(reference.config(recipe))
    small = large = ModelSize(name, revision, shape, layers)
    if recipe.policy.model:
        name, revision = recipe.policy.model, recipe.policy.revision
        large = ModelSize(name, revision, load_shape(name, revision=revision))
    return small, large
