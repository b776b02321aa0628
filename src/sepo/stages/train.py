"""Stage "train": the policy, on key tokens or by a rival objective, to its end or to a KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sepo import processes
from sepo.data.fingerprints import log_if_templates_differ, tokenizer_fingerprint
from sepo.data.tables import read_table
from sepo.errors import UserError
from sepo.models.adapters import check_lora
from sepo.models.devices import check_quantization
from sepo.models.folders import is_outline
from sepo.models.names import check_model, load_config
from sepo.models.tokenizer import has_tokenizer, load_tokenizer
from sepo.recipe.objectives import OBJECTIVES, check_objective
from sepo.recipe.settings import Recipe, TrainingSettings
from sepo.stages.stage import Model, Stage, StageResult
from sepo.training.check import check_training
from sepo.training.fit import objective_settings, train_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback


# Trains with some settings, into a folder, with callbacks; returns the results of `train_model`.
Train = Callable[..., dict[str, float]]


class Targets(Protocol):
    """Trainings that end at a measured value (`sepo.targets.stages`)."""

    def train_to_kl(
        self, recipe: Recipe, start: Model, pairs: StageResult, number: int, train: Train, out: Path
    ) -> dict[str, float]:
        """Train on `number` pairs until `policy.target_kl`."""

    def until_accuracy(
        self, recipe: Recipe, pairs: StageResult, reference_logps: StageResult, out: Path, swapped: bool
    ) -> TrainerCallback:
        """Ends the training at `oracle.target_accuracy`."""


def required(ends: Targets | None) -> Targets:
    if ends is None:
        raise ValueError("policy.target_kl and oracle.target_accuracy need sepo.api.run_recipe")
    return ends


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
        if not own_tokenizer(recipe):
            reference, own = tokenizers(recipe)
            log_if_templates_differ(f"policy '{policy.model}'", own, f"reference '{recipe.reference.model}'", reference)
    if policy.target_kl is not None:
        check_held_out(recipe, "policy.target_kl")
        if not recipe.eval.prompts or recipe.eval.temperature != 1:
            raise UserError(
                "policy.target_kl is measured on answers to held-out prompts at temperature 1: set eval.prompts above "
                "0 and eval.temperature to 1"
            )
    start_model = recipe.policy if policy.model is not None else recipe.reference
    if policy.training.router_aux_loss_coef:
        from sepo.forward.routers import check_routers

        check_routers(load_config(str(start_model.model), revision=start_model.revision), str(start_model.model))
    check_lora(str(start_model.model), policy.lora, "policy.lora", revision=start_model.revision, weights=not elsewhere)


def own_tokenizer(recipe: Recipe) -> bool:
    """Does the policy have another tokenizer than oracle and reference?"""
    policy, reference = recipe.policy, recipe.reference
    if policy.model is None or (policy.model, policy.revision) == (reference.model, reference.revision):
        return False
    if is_outline(policy.model) and not has_tokenizer(policy.model):
        return False  # a plan of a model whose tokenizer is not here
    return len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers(recipe)}) > 1


def tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers of reference and policy."""
    policy, reference = recipe.policy, recipe.reference
    return (
        load_tokenizer(reference.model, revision=reference.revision),
        load_tokenizer(str(policy.model), revision=policy.revision),
    )


def check_held_out(recipe: Recipe, setting: str) -> None:
    """Check that a training can be measured on held-out pairs, in one process. Raises UserError."""
    data = recipe.data
    if not (data.held_out or data.held_out_split or data.held_out_source):
        raise UserError(f"{setting} is measured on held-out pairs: set data.held_out above 0")
    if processes.launched() > 1:
        raise UserError(f"{setting} measures in one process: start it without torchrun or accelerate")


def needs_reference(recipe: Recipe) -> bool:
    """Does the objective compare the policy with its start?"""
    return OBJECTIVES[recipe.policy.objective].reads_reference


def stage(
    recipe: Recipe,
    model: Model,
    selection: StageResult,
    logps: StageResult | None,
    seed: int,
    pairs: StageResult | None = None,
    ends: Targets | None = None,
) -> Stage:
    """The policy, trained on a selection table.

    Args:
        model: the start of the policy.
        selection: a selection table; objectives on all tokens read only its pairs.
        logps: log-probabilities under `model`, for objectives with a reference.
        pairs: pairs under the policy's tokenizer, whose held-out prompts `policy.target_kl` is measured on.
        ends: needed for `policy.target_kl`.
    """
    until = None if recipe.policy.target_kl is None or pairs is None else _until(recipe, pairs)

    def run(folder: Path) -> dict[str, Any]:
        table = read_table(selection.folder, "selection")

        def train(training: TrainingSettings, out: Path, *callbacks: TrainerCallback) -> dict[str, float]:
            return train_model(
                model.folder,
                table,
                out,
                training,
                reference_logps=None if logps is None else read_table(logps.folder, "logps"),
                reference_is_start=recipe.policy.reference is None,
                lora=recipe.policy.lora,
                quantization=recipe.policy.quantization,
                seed=seed,
                device=recipe.device,
                callbacks=callbacks,
                until=until,
                **objective_settings(recipe.policy),
            )

        if until is None or pairs is None:
            return train(recipe.policy.training, folder)
        return required(ends).train_to_kl(recipe, model, pairs, table.num_rows, train, folder)

    return Stage(
        kind="train",
        what=f"{recipe.policy.objective} objective",
        depends={
            "policy": recipe.policy.cache_key(),
            "start": model.inherited(),
            "selection": selection.content,
            "logps": None if logps is None else logps.content,
            "seed": seed,
            **({} if until is None else {"until": until}),
        },
        outputs=(".",),
        run=run,
        facts={"recipe": recipe},
        verifies=True,
    )


def _until(recipe: Recipe, pairs: StageResult) -> dict[str, Any]:
    """What the end of a training with `policy.target_kl` depends on."""
    names = {"prompts", "samples", "max_new_tokens", "temperature"}
    how = recipe.eval.model_dump(mode="json", include=names)
    return {"kl": recipe.policy.target_kl, "pairs": pairs.content, "eval": how, "seed": recipe.seed}
