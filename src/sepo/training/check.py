"""Can a training be set up as its settings say? Tried before anything expensive starts, on a model of a few weights."""

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

# Fields of TrainingArguments that do not go together with packed pairs, by what they would do.
_OUT_OF_PLACE: dict[str, str] = {
    "output_dir": "checkpoints lie in the output folder",
    "auto_find_batch_size": "the batch is the number of pairs an update; tokens_per_row bounds its memory",
    "label_smoothing_factor": "it is of cross entropy; the objectives have label_smoothing",
    "neftune_noise_alpha": "noise would make the policy another than its own reference",
    "torch_compile": "gradients are added up in place, which a compiled backward pass does not trace",
    "per_device_train_batch_size": "batch_size is the number of pairs an update, over all processes",
    "gradient_accumulation_steps": "batch_size is the number of pairs an update, however many rows they take",
    "seed": "the recipe's seed is that of every draw",
    "use_cpu": "the recipe's device says where to train",
    "use_liger_kernel": "packed rows have fused kernels of their own, and Liger's would take their place",
}


def check_training(
    settings: TrainingSettings, section: str, device: str = "auto", *, here: bool = True, **objective: Any
) -> None:
    """Raise a UserError, which names the setting, for a training that could not be set up.

    Arguments, reporters, optimizer and schedule are made as the training makes them.

    Args:
        section: where the settings stand in the recipe ("policy.training").
        here: whether the training is for this machine, and can be tried on it.
        objective: fields of `PreferenceConfig`.
    """
    names = {item.name for item in dataclasses.fields(PreferenceConfig)}
    for key, value in settings.arguments.items():
        if key not in names:
            raise UserError(f"{section}.arguments.{key}: not a TrainingArguments field{nearest(key, names)}")
        if key in TrainingSettings.model_fields:
            raise UserError(f"{section}.arguments.{key}: it has a place of its own, {section}.{key}")
        if key in _OUT_OF_PLACE and value is not None and value is not False:
            raise UserError(f"{section}.arguments.{key} cannot be used here: {_OUT_OF_PLACE[key]}; leave it out")
    if settings.arguments.get("train_sampling_strategy", "random") != "random":
        raise UserError(f"{section}.arguments.train_sampling_strategy: pairs are drawn at random; leave it out")
    if isinstance(config := settings.arguments.get("deepspeed"), str):
        try:
            read_json_object(Path(config))
        except UserError as error:
            raise UserError(f"{section}.arguments.deepspeed: {error}") from None
    if not here:
        return
    require_setup(
        settings,
        section,
        lambda one, folder: PreferenceConfig(**training_arguments(one, folder, seed=0, device=device), **objective),
    )


def require_setup(
    settings: TrainingSettings, section: str, make: Callable[[TrainingSettings, Path], PreferenceConfig | Any]
) -> None:
    """Raise a UserError that names the setting at fault unless a trainer can be made from `make(settings, folder)`."""
    problem = _problem(settings, make)
    if problem is None:
        return
    if isinstance(problem, UserError):
        raise UserError(f"{section}: {problem}") from None
    culprit = next((name for name, other in _each_left_out(settings) if _problem(other, make) is None), None)
    where = section if culprit is None else f"{section}.{culprit}"
    raise UserError(f"{where} cannot be used ({named_error(problem)})") from None


def _problem(settings: TrainingSettings, make: Callable[[TrainingSettings, Path], Any]) -> Exception | None:
    """What goes wrong when a trainer is set up; None if nothing does. Nothing is trained and nothing reported."""
    environment = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            arguments = make(settings, Path(folder))
            trainer = Trainer(_stand_in(), arguments, train_dataset=[{}], data_collator=lambda rows: {})
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
    except Exception as error:  # libraries raise whatever they like
        return error
    finally:
        # Some arguments (fsdp, deepspeed) leave their mark for whatever is loaded next.
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)
    return None


def _each_left_out(settings: TrainingSettings) -> list[tuple[str, TrainingSettings]]:
    """The settings with one that the user set at its default, for each of them, by name."""
    default = type(settings)()
    others = [
        (f"arguments.{key}", settings.model_copy(update={"arguments": _without(settings.arguments, key)}))
        for key in settings.arguments
    ]
    for name in type(settings).model_fields:
        if name != "arguments" and getattr(settings, name) != getattr(default, name):
            others.append((name, settings.model_copy(update={name: getattr(default, name)})))
    return others


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _stand_in() -> PreTrainedModel:
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
