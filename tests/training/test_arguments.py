"""Every field of TrainingArguments and PreferenceConfig in `training.arguments`: it has an effect, or it is refused."""

from __future__ import annotations

import dataclasses

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments

from sepo.errors import UserError
from sepo.recipe.settings import TrainingSettings
from sepo.training.check import _NOT_FOR_PAIRS, UNSUPPORTED, check_training
from sepo.training.fit import training_arguments
from sepo.training.trainer import WITHOUT_EFFECT, PreferenceConfig

FIELDS = {item.name for item in dataclasses.fields(TrainingArguments)}
OURS = {item.name for item in dataclasses.fields(PreferenceConfig)} - FIELDS
# What Transformers' Trainer reads in a training without evaluation. A field that a new release adds belongs here, or
# into one of the tables of `sepo.training.check`.
EFFECTIVE = {
    *("lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim_target_modules", "fp16", "tf32", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "logging_strategy", "logging_steps"),
    *("logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level", "log_level_replica"),
    *("disable_tqdm", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism"),
    *("data_seed", "accelerator_config", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters"),
    *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp"),
    *("fsdp_config", "deepspeed", "debug"),
    # Transformers refuses these without evaluation data, in its own words.
    *("eval_strategy", "load_best_model_at_end"),
    # A secret, which a recipe may carry for a reporter, and which nothing prints.
    "hub_token",
}


def refusal(key: str, value: object) -> str:
    with pytest.raises(UserError) as caught:
        check_training(TrainingSettings(batch_size=2, arguments={key: value}), "policy.training", device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_one_place():
    own = set(TrainingSettings.model_fields) & FIELDS
    tables = [own, set(UNSUPPORTED), set(_NOT_FOR_PAIRS), EFFECTIVE]
    assert set().union(*tables) == FIELDS
    assert sum(map(len, tables)) == len(FIELDS), "a field is in two tables"


@pytest.mark.parametrize("key", sorted(OURS))
def test_a_field_of_the_preference_config_is_set_in_its_own_place(key):
    message = refusal(key, 16)
    assert message.startswith(f"policy.training.arguments.{key}")
    assert key in ("layout", "weight_column") or f".{key} instead" in message


@pytest.mark.parametrize("key", sorted({**UNSUPPORTED, **_NOT_FOR_PAIRS}))
def test_a_field_without_effect_is_refused(key):
    default = next(item.default for item in dataclasses.fields(TrainingArguments) if item.name == key)
    assert f"policy.training.arguments.{key} cannot be used here" in refusal(key, default is not True and "x")


def test_a_value_that_turns_nothing_on_is_taken():
    off = {"push_to_hub": False, "torch_compile": False, "neftune_noise_alpha": None, "eval_steps": None}
    check_training(TrainingSettings(batch_size=2, arguments=off), "policy.training", device="cpu")


def test_what_the_package_sets_itself_can_be_set_or_is_refused(tmp_path):
    """No value of `arguments` is overridden after it was taken."""
    ours = training_arguments(TrainingSettings(batch_size=2, save_minutes=0), tmp_path, seed=3, device="cpu")
    for key in ours:
        if key in EFFECTIVE:
            settings = TrainingSettings(batch_size=2, arguments={key: "mine"})
            assert training_arguments(settings, tmp_path, seed=3, device="cpu")[key] == "mine"
        else:
            assert key in TrainingSettings.model_fields or key in {**UNSUPPORTED, **_NOT_FOR_PAIRS}


VALUES = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "liger_kernel_config": {},
    "parallelism_config": ParallelismConfig(tp_size=2),
}


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_a_field_without_effect_is_refused_in_python_as_well(tmp_path, key):
    default = next(item.default for item in dataclasses.fields(TrainingArguments) if item.name == key)
    PreferenceConfig(str(tmp_path), **{key: default})
    # Transformers turns torch_compile on for each of its settings.
    named = "torch_compile" if key.startswith("torch_compile") else key
    with pytest.raises(UserError, match=f"^{named} cannot be used here"):
        PreferenceConfig(str(tmp_path), **{key: VALUES.get(key, True)})


@pytest.mark.parametrize(
    "values",
    [{"per_device_train_batch_size": 0}, {"per_device_train_batch_size": -4}, {"gradient_accumulation_steps": 0},
     {"max_steps": 0}, {"num_train_epochs": 0}, {"num_train_epochs": -1}, {"learning_rate": -1.0},
     {"learning_rate": float("nan")}, {"learning_rate": float("inf")}, {"seed": -1}, {"seed": 2**40}],
)  # fmt: skip
def test_a_number_with_which_nothing_is_trained_is_named(tmp_path, values):
    (name,) = values
    with pytest.raises(UserError, match=f"^{name} is"):
        PreferenceConfig(str(tmp_path), **values)
