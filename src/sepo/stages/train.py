"""Stage "train": the policy, on key tokens or by a rival objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sepo.data.fingerprints import log_if_templates_differ
from sepo.data.tables import read_table
from sepo.forward.routers import check_routers
from sepo.models.adapters import check_lora
from sepo.models.devices import check_quantization
from sepo.models.folders import is_outline
from sepo.models.names import check_model, load_config
from sepo.models.tokenizer import has_tokenizer
from sepo.recipe.objectives import OBJECTIVES, check_objective
from sepo.recipe.settings import Recipe
from sepo.stages import select, transfer
from sepo.stages.cost import Cost, Estimate, Sizes, training_estimates, training_memory
from sepo.stages.stage import Model, Stage, StageResult
from sepo.training.check import check_training
from sepo.training.fit import objective_settings, train_model


def check(recipe: Recipe, elsewhere: bool = False) -> None:
    """Check the model, its tokenizer, the objective and the settings of the training.

    Args:
        elsewhere: the run is only planned, for other machines. A config is then enough for a model, and bitsandbytes
            need not be installed.
    """
    policy = recipe.policy
    check_quantization(policy.quantization, train=True, lora=policy.lora is not None, installed=not elsewhere)
    check_objective(policy.objective, policy.label_smoothing)
    check_training(policy.training, "policy.training", recipe.device, here=not elsewhere, **objective_settings(policy))
    if policy.model is not None:
        check_model(policy.model, revision=policy.revision, weights=not elsewhere)
        if elsewhere and is_outline(policy.model) and not has_tokenizer(policy.model):
            return
        if transfer.needed(recipe):
            transfer.check(recipe)
        else:
            reference, own = transfer.tokenizers(recipe)
            log_if_templates_differ(f"policy '{policy.model}'", own, f"reference '{recipe.reference.model}'", reference)
    start_model = recipe.policy if policy.model is not None else recipe.reference
    if policy.training.router_aux_loss_coef:
        check_routers(load_config(str(start_model.model), revision=start_model.revision), str(start_model.model))
    check_lora(str(start_model.model), policy.lora, "policy.lora", revision=start_model.revision, weights=not elsewhere)


def needs_reference(recipe: Recipe) -> bool:
    """Does the objective compare the policy with its start?"""
    return OBJECTIVES[recipe.policy.objective].reads_reference


def stage(recipe: Recipe, model: Model, selection: StageResult, logps: StageResult | None, seed: int) -> Stage:
    """The policy, trained on a selection table.

    Args:
        model: the start of the policy.
        selection: a selection table; objectives on all tokens read only its pairs.
        logps: log-probabilities under `model`, for objectives with a reference.
    """

    def run(folder: Path) -> dict[str, Any]:
        return train_model(
            model.folder,
            read_table(selection.folder, "selection"),
            folder,
            recipe.policy.training,
            reference_logps=None if logps is None else read_table(logps.folder, "logps"),
            reference_is_start=recipe.policy.reference is None,
            lora=recipe.policy.lora,
            quantization=recipe.policy.quantization,
            seed=seed,
            device=recipe.device,
            **objective_settings(recipe.policy),
        )

    return Stage(
        kind="train",
        what=f"{recipe.policy.objective} objective",
        depends={
            "policy": recipe.policy.cache_key(),
            "start": model.inherited(),
            "selection": selection.content,
            "logps": None if logps is None else logps.content,
            "seed": seed,
        },
        outputs=(".",),
        run=run,
        cost=lambda sizes: cost(recipe, sizes.of_policy),
        verifies=True,
    )


def targets(recipe: Recipe, sizes: Sizes) -> float:
    """Number of target tokens of all pairs."""
    pairs, rule = sizes.train, select.settings_of(recipe)
    if not OBJECTIVES[recipe.policy.objective].reads_selection:
        return pairs.responses
    return rule.k_chosen * pairs.chosen + rule.k_rejected * pairs.rejected


def estimates(recipe: Recipe, sizes: Sizes) -> tuple[Estimate, ...]:
    """The training, and the frozen reference that some objectives read at every step."""
    training = training_estimates(recipe.policy, sizes.large, sizes.train, targets(recipe, sizes))
    if not OBJECTIVES[recipe.policy.objective].kl_direction(recipe.policy.alpha):
        return training
    frozen = Estimate("score", sizes.large, training[1].tokens, training[1].targets, dtype="float32")
    return (*training, frozen)


def cost(recipe: Recipe, sizes: Sizes) -> Cost:
    """The training of the policy."""
    policy = recipe.policy
    frozen_copy = bool(OBJECTIVES[policy.objective].kl_direction(policy.alpha))
    need = training_memory(policy, sizes, sizes.large, targets(recipe, sizes), frozen_copy)
    return Cost(f"{policy.objective} objective", sizes.train.pairs, sizes.train.tokens, estimates(recipe, sizes), need)
