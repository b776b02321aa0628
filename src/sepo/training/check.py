"""Check the settings of a training before anything expensive starts, by setting it up on a model of a few weights."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sepo.errors import UserError, named_error, nearest
from sepo.models.folders import read_json_object
from sepo.recipe.settings import TrainingSettings
from sepo.training.fit import training_arguments
from sepo.training.trainer import WITHOUT_EFFECT, PreferenceConfig

# Setups that were tested in this process: a grid has many runs with the same settings.
_SETUPS: set[tuple[Any, ...]] = set()
_NO_EVALUATION = "no pairs are evaluated while a recipe trains"
_NO_PUSH = "sepo push uploads a finished run"
_OUR_SCRIPTS = "only the example scripts of Transformers read it"
# Fields of TrainingArguments that no training of a recipe takes or that change nothing, with the reason. Every field is
# here, in `_NOT_FOR_PAIRS`, a setting of a recipe, or has an effect: tests/training/test_arguments.py.
UNSUPPORTED: dict[str, str] = {
    "output_dir": "checkpoints are in the output folder",
    "auto_find_batch_size": "batch_size is the number of pairs per update; tokens_per_row bounds the memory",
    "seed": "the recipe's seed is the seed of every random draw",
    "use_cpu": "the recipe's device decides where to train",
    "local_rank": "the launcher sets it",
    "resume_from_checkpoint": "the same command continues from the last checkpoint",
    "skip_memory_metrics": "memory_gb of a stage is its peak",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _OUR_SCRIPTS),
    **dict.fromkeys(
        (
            *("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start", "eval_do_concat_batches"),
            *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
            *("prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "label_names", "metric_for_best_model"),
            *("greater_is_better",),
        ),
        _NO_EVALUATION,
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _NO_PUSH
    ),
}
# Those that packed pairs do not support, or that change nothing there.
_NOT_FOR_PAIRS: dict[str, str] = {
    **WITHOUT_EFFECT,
    "per_device_train_batch_size": "batch_size is the number of pairs per update, over all processes",
    "gradient_accumulation_steps": "batch_size is the number of pairs per update, for any number of rows",
    "average_tokens_across_devices": "the loss is the mean over the pairs of all processes",
    "remove_unused_columns": "a batch holds pairs and has no columns",
    "use_cache": "packed rows are read without a cache",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "pairs are drawn at random"),
}
_DEFAULTS = {
    item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    for item in dataclasses.fields(TrainingArguments)
}
# Fields of PreferenceConfig that a recipe sets elsewhere.
_ELSEWHERE = {
    **dict.fromkeys(("max_length", "max_prompt_length", "as_chat", "chat_template_kwargs"), "data"),
    **dict.fromkeys(("objective", "gamma", "margin", "alpha", "rate"), "policy"),
}


def check_arguments(settings: TrainingSettings, section: str, refused: Mapping[str, str]) -> None:
    """Raise a UserError for an argument that is a setting of the recipe, or that would change nothing."""
    for key, value in settings.arguments.items():
        if key in TrainingSettings.model_fields:
            raise UserError(f"{section}.arguments.{key}: set {section}.{key} instead")
        unset = value is None or value is False
        if key in refused and not (unset and _DEFAULTS[key] in (None, False)):
            raise UserError(f"{section}.arguments.{key} cannot be used here: {refused[key]}; leave it out")


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
    parent = section.rpartition(".")[0]
    for key in settings.arguments:
        if key in _DEFAULTS or key in TrainingSettings.model_fields:
            continue
        if key not in (item.name for item in dataclasses.fields(PreferenceConfig)):
            raise UserError(f"{section}.arguments.{key}: not a TrainingArguments field{nearest(key, _DEFAULTS)}")
        unknown = ("layout", "weight_column")
        where = f"set {_ELSEWHERE.get(key, parent)}.{key} instead" if key not in unknown else "leave it out"
        raise UserError(f"{section}.arguments.{key} cannot be used: it is no TrainingArguments field; {where}")
    check_arguments(settings, section, {**UNSUPPORTED, **_NOT_FOR_PAIRS})
    if isinstance(config := settings.arguments.get("deepspeed"), str):
        try:
            read_json_object(Path(config))
        except UserError as error:
            raise UserError(f"{section}.arguments.deepspeed: {error}") from None
    if not here:
        return

    if settings.learning_rate == "auto":  # a number by the time of the training
        settings = settings.model_copy(update={"learning_rate": 1e-5})

    def arguments(training: TrainingSettings, folder: Path) -> PreferenceConfig:
        return PreferenceConfig(**training_arguments(training, folder, seed=0, device=device), **objective)

    # Arguments may name files, whose content can change.
    setup = None if settings.arguments else _setup(settings, device, objective)
    if setup not in _SETUPS:
        require_setup(settings, section, arguments)
        if setup is not None:
            _SETUPS.add(setup)


def _setup(settings: TrainingSettings, device: str, objective: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that a setup depends on; libraries read environment variables."""
    return settings.model_dump_json(), device, repr(sorted(objective.items())), frozenset(os.environ.items())


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
        (
            f"arguments.{key}",
            settings.model_copy(update={"arguments": {k: v for k, v in settings.arguments.items() if k != key}}),
        )
        for key in settings.arguments
    ]
    for name in type(settings).model_fields:
        if name != "arguments" and getattr(settings, name) != getattr(default, name):
            changed.append((name, settings.model_copy(update={name: getattr(default, name)})))
    return changed


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
