"""Stage "oracle": the reference, trained with DPO on some or all pairs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.splits import sample_pairs
from sepo.data.tables import read_table, swap_sides
from sepo.errors import UserError
from sepo.models.adapters import check_lora
from sepo.models.checkpoint import adapter_is_idle
from sepo.models.devices import check_quantization
from sepo.models.folders import adapter_base, is_adapter
from sepo.models.names import check_model, load_config, resolve_model
from sepo.models.tokenizer import load_tokenizer
from sepo.processes import log_once
from sepo.recipe.settings import OracleSettings, Recipe
from sepo.stages import train
from sepo.stages.score import check_rewards_file
from sepo.stages.stage import Model, Stage, StageResult
from sepo.training.check import check_training
from sepo.training.fit import train_model


def check(recipe: Recipe, elsewhere: bool = False) -> None:
    """Check an existing oracle, or the settings of its training; `elsewhere` as in `train.check`."""
    settings = recipe.oracle
    if settings.rewards is not None:
        check_rewards_file(Path(settings.rewards), settings.reward_columns)
    if not recipe.reads_oracle:
        return
    check_quantization(settings.quantization, train=True, lora=settings.lora is not None, installed=not elsewhere)
    if settings.target_accuracy is not None:
        train.check_held_out(recipe, "oracle.target_accuracy")
    if settings.model is None:
        if settings.training.router_aux_loss_coef:
            name, revision = recipe.reference.model, recipe.reference.revision
            from sepo.forward.routers import check_routers

            check_routers(load_config(name, revision=revision), name)
        check_training(
            settings.training,
            "oracle.training",
            recipe.device,
            here=not elsewhere,
            objective="dpo",
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        check_lora(
            recipe.reference.model,
            settings.lora,
            "oracle.lora",
            revision=recipe.reference.revision,
            weights=not elsewhere,
        )
    else:
        check_model(settings.model)
        _check_existing(recipe)
        reference = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
        check_same_tokenizer(
            f"oracle '{settings.model}'",
            load_tokenizer(settings.model),
            f"reference '{recipe.reference.model}'",
            reference,
        )


def _check_existing(recipe: Recipe) -> None:
    """Refuse an oracle that equals the reference: every token reward would be 0."""
    folder = Path(resolve_model(str(recipe.oracle.model)))
    base = recipe.reference.model
    if is_adapter(folder):
        if adapter_is_idle(folder):
            raise UserError(f"the oracle '{folder}' is an untrained adapter (its B is zero): train it")
        base, _ = adapter_base(folder)
    elif _as_it_is(recipe) and _same(str(recipe.oracle.model), base):
        raise UserError(f"the oracle '{folder}' is the reference: every token reward would be 0; name another model")
    if _as_it_is(recipe) and not _same(base, recipe.reference.model):
        log_once(
            f"  the oracle is an adapter of '{base}', the reference is '{recipe.reference.model}': the rewards "
            "also include the difference between these two"
        )


def _as_it_is(recipe: Recipe) -> bool:
    """Is the reference the whole model that the recipe names, without fine-tuning?"""
    return recipe.reference.sft is None and recipe.reference.layers is None


def _same(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def check_differs(name: str, oracle: Model, reference: Model) -> None:
    """Raise a UserError if an existing oracle has the reference's weights."""
    if oracle.content == reference.content:
        raise UserError(f"the oracle '{name}' has the weights of the reference: every reward would be 0")


def stage(
    recipe: Recipe,
    reference: Model,
    pairs: StageResult,
    reference_logps: StageResult,
    seed: int,
    swapped: bool = False,
    ends: train.Targets | None = None,
) -> Stage:
    """One oracle, or its opposite on `swapped` pairs.

    Args:
        seed: draws its pairs and their order (`seeds`).
        ends: needed for `oracle.target_accuracy`.
    """
    settings = recipe.oracle

    return Stage(
        kind="oracle",
        what=f"DPO on {settings.sample:.0%} of the pairs{', swapped' * swapped}, beta {settings.beta:g}, seed {seed}",
        depends={
            "oracle": settings.cache_key(),
            "pairs": pairs.content,
            "reference": reference.content,
            "reference_logps": reference_logps.content,
            "seed": seed,
            "swapped": swapped,
        },
        outputs=(".",),
        run=lambda folder: train_oracle(recipe, reference, pairs, reference_logps, folder, seed, swapped, ends),
        facts={"recipe": recipe},
        verifies=True,
    )


def members(settings: OracleSettings, seed: int = 0) -> list[tuple[str, int, bool]]:
    """The oracles that a run trains, as (name, seed, trained on swapped pairs?): oracle, oracle-2, ...

    With `contrastive` each oracle is followed by its opposite (oracle-reversed). Empty if the recipe names an existing
    oracle or given rewards.
    """
    if settings.model is not None or settings.rewards is not None:
        return []
    names = ["oracle", *(f"oracle-{number}" for number in range(2, settings.count + 1))]
    kinds = (False, True) if settings.contrastive else (False,)
    return [
        (f"{name}-reversed" if swapped else name, its_seed, swapped)
        for name, its_seed in zip(names, seeds(seed, settings.count), strict=True)
        for swapped in kinds
    ]


def seeds(seed: int, count: int) -> list[int]:
    """The seed of each oracle of a run, the run's own first; runs at neighbouring seeds share no oracle seed."""
    return [seed + 1000 * member for member in range(count)]


def train_oracle(
    recipe: Recipe,
    reference: Model,
    pairs: StageResult,
    reference_logps: StageResult,
    out: Path,
    seed: int,
    swapped: bool,
    ends: train.Targets | None = None,
) -> dict[str, Any]:
    """Train one oracle in the folder `out`: DPO on the reference, over `oracle.sample` of the pairs.

    Returns:
        the number of `pairs`, and the results of `train_model`.
    """
    settings = recipe.oracle
    table, logps = read_table(pairs.folder / "train", "pairs"), read_table(reference_logps.folder, "logps")
    sample = sample_pairs(table, settings.sample, seed=seed)
    rows = np.isin(table.column("pair_id").to_numpy(), sample.column("pair_id").to_numpy())
    logps = logps.filter(pa.array(rows))
    if swapped:
        sample, logps = swap_sides(sample), swap_sides(logps)
    target, callbacks = settings.target_accuracy, []
    if target is not None:
        callbacks.append(train.required(ends).until_accuracy(recipe, pairs, reference_logps, out, swapped))
    results = train_model(
        reference.folder,
        sample,
        out,
        settings.training,
        reference_logps=logps,
        lora=settings.lora,
        quantization=settings.quantization,
        seed=seed,
        device=recipe.device,
        objective="dpo",
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        callbacks=callbacks,
        until=None if target is None else {"accuracy": target, "pairs": pairs.content},
    )
    return {"pairs": len(sample), **results}
