"""Check the settings of a training before anything expensive starts, by setting it up on a model of a few weights."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sepo.errors import UserError, named_error, nearest
from sepo.models.folders import read_json_object
from sepo.recipe.settings import TrainingSettings
from sepo.training.fit import training_arguments
from sepo.training.trainer import PreferenceConfig

# Fields of TrainingArguments that packed pairs do not support, with the reason.
_UNSUPPORTED: dict[str, str] = {
    "output_dir": "checkpoints are in the output folder",
    "auto_find_batch_size": "batch_size is the number of pairs per update; tokens_per_row bounds the memory",
    "label_smoothing_factor": "it applies to cross entropy; the objectives have label_smoothing",
    "neftune_noise_alpha": "with noise, the policy would differ from its own reference before training",
    "torch_compile": "gradients are accumulated in place, which a compiled backward pass does not trace",
    "per_device_train_batch_size": "batch_size is the number of pairs per update, over all processes",
    "gradient_accumulation_steps": "batch_size is the number of pairs per update, for any number of rows",
    "seed": "the recipe's seed is the seed of every random draw",
    "use_cpu": "the recipe's device decides where to train",
    "use_liger_kernel": "it would replace the fused kernels of packed rows",
}


def check_training(
    settings: TrainingSettings, section: str, device: str = "auto", *, here: bool = True, **objective: Any
) -> None:
    """Raise a UserError that names the setting if a training cannot be set up.

    Creates arguments, reporters, optimizer and schedule as the training does.

    Args:
        section: the section of the recipe that has the settings ("policy.training").
        here: the training is for this machine, so the setup can be tested.
        objective: fields of `PreferenceConfig`.
    """
    names = {item.name for item in dataclasses.fields(PreferenceConfig)}
    for key, value in settings.arguments.items():
        if key not in names:
            raise UserError(f"{section}.arguments.{key}: not a TrainingArguments field{nearest(key, names)}")
        if key in TrainingSettings.model_fields:
            raise UserError(f"{section}.arguments.{key}: set {section}.{key} instead")
        if key in _UNSUPPORTED and value is not None and value is not False:
            raise UserError(f"{section}.arguments.{key} cannot be used here: {_UNSUPPORTED[key]}; leave it out")
    if settings.arguments.get("train_sampling_strategy", "random") != "random":
        raise UserError(f"{section}.arguments.train_sampling_strategy: pairs are drawn at random; leave it out")
    if isinstance(config := settings.arguments.get("deepspeed"), str):
        try:
            read_json_object(Path(config))
        except UserError as error:
            raise UserError(f"{section}.arguments.deepspeed: {error}") from None
    if not here:
        return

    def arguments(training: TrainingSettings, folder: Path) -> PreferenceConfig:
        return PreferenceConfig(**training_arguments(training, folder, seed=0, device=device), **objective)

    require_setup(settings, section, arguments)


def require_setup(
    settings: TrainingSettings, section: str, make: Callable[[TrainingSettings, Path], PreferenceConfig | Any]
) -> None:
    """Raise a UserError that names the invalid setting if no trainer can be created from `make(settings, folder)`."""
    problem = _problem(settings, make)
    if problem is None:
        return
    if isinstance(problem, UserError):
        raise UserError(f"{section}: {problem}") from None
    resets = _with_one_default(settings)
    invalid = next((name for name, changed in resets if _problem(changed, make) is None), None)
    where = section if invalid is None else f"{section}.{invalid}"
    raise UserError(f"{where} cannot be used ({named_error(problem)})") from None


def _problem(settings: TrainingSettings, make: Callable[[TrainingSettings, Path], Any]) -> Exception | None:
    """The exception that setting up a trainer raises; None if it succeeds. Does not train or report."""
    environment = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            arguments = make(settings, Path(folder))
            trainer = Trainer(_tiny_model(), arguments, train_dataset=[{}], data_collator=lambda rows: {})
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
    except Exception as error:  # libraries raise exceptions of any kind
        return error
    finally:
        # Some arguments (fsdp, deepspeed) set global state that would affect the next model load.
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)
    return None


def _with_one_default(settings: TrainingSettings) -> list[tuple[str, TrainingSettings]]:
    """For each setting that the user changed: its name, and the settings with this one at its default."""
    default = type(settings)()
    changed = [
        (f"arguments.{key}", settings.model_copy(update={"arguments": _without(settings.arguments, key)}))
        for key in settings.arguments
    ]
    for name in type(settings).model_fields:
        if name != "arguments" and getattr(settings, name) != getattr(default, name):
            changed.append((name, settings.model_copy(update={name: getattr(default, name)})))
    return changed


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _tiny_model() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=8,
        )
    )
