"""LoRA adapters through PEFT: new and stored adapters, and the model inside a PeftModel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sepo.errors import UserError, named_error, nearest, wrong_type
from sepo.models.checkpoint import adapter_generation_config, adapter_state, require_same_weights
from sepo.models.folders import check_adapter_kind, is_adapter, read_json_object
from sepo.models.names import check_model, resolve_model
from sepo.recipe.settings import LoraSettings


def load_adapter(model: PreTrainedModel, adapter: str | os.PathLike, train: bool) -> PeftModel:
    folder = Path(resolve_model(adapter))
    if not is_adapter(folder):
        raise UserError(f"'{adapter}' is not an adapter: expected adapter_config.json and adapter_model.safetensors")
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=train)
    except Exception as error:
        raise UserError(f"the adapter '{adapter}' does not fit its base model ({named_error(error)})") from None
    require_same_weights(folder, {key: tuple(value.shape) for key, value in adapter_state(peft_model).items()})
    model.generation_config = adapter_generation_config(folder) or model.generation_config
    return peft_model


def save_adapter(model: PeftModel, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Save the active adapter of a model into a folder.

    Raises:
        UserError: several adapters are active.
    """
    if len(model.active_adapters) != 1:
        raise UserError(
            f"the adapters {', '.join(model.active_adapters)} are active: set one of them, or save the merged model"
        )
    (name,) = model.active_adapters
    # The vocabulary never changes, so embeddings are not saved; "auto" would send a request to the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict, selected_adapters=[name])
    (folder / "README.md").unlink(missing_ok=True)  # a template with local paths
    if (folder / name).is_dir():  # PEFT saves adapters with a name of their own in a folder of this name
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    causal_lm(model).generation_config.save_pretrained(folder)


def is_separate(folder: Path) -> bool:
    """Is a stored adapter plain LoRA, which neither copies nor reads weights of the base?"""
    config = read_json_object(folder / "adapter_config.json")
    reads_base = ("modules_to_save", "trainable_token_indices", "target_parameters", "use_dora", "arrow_config")
    plain_start = config.get("init_lora_weights", True) in (True, False, "gaussian")
    return config.get("peft_type") == "LORA" and plain_start and not any(config.get(key) for key in reads_base)


def new_adapter(model: PreTrainedModel, lora: LoraSettings, seed: int = 0, section: str = "lora") -> PeftModel:
    """Add a new LoRA adapter to a model; `seed` sets its initial weights.

    Raises:
        UserError: names the setting of `section` that does not fit the model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.upper == 1 else _upper_modules(model, lora),
    )
    where = f"{section}.target_modules {lora.target_modules!r} does not fit the model"
    if isinstance(lora.target_modules, list):  # PEFT is content if one of the names is there
        names = [name for name, _ in model.named_modules()]
        for target in lora.target_modules:
            if not any(_is_named(name, target) for name in names):
                near = nearest(target, {name.split(".")[-1] for name in names})
                raise UserError(f"{where}: it has no module '{target}'{near}")
    try:
        return with_adapter(model, config, seed)
    except ValueError as error:
        raise UserError(f"{where}: {named_error(error)}") from None


def with_adapter(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """Add a new adapter of PEFT to a model; `seed` sets its initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _upper_modules(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """Names of the linear layers of the upper decoder layers that a new adapter adapts."""
    layers = lora.adapted_layers(model.config.get_text_config().num_hidden_layers)
    targets, head = lora.target_modules, model.get_output_embeddings()

    def is_in_layers(name: str, module: nn.Module) -> bool:
        number = re.search(r"\.(\d+)\.", name)
        linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        return linear and number is not None and int(number[1]) in layers

    def is_target(name: str) -> bool:
        return targets == "all-linear" or any(_is_named(name, target) for target in targets)

    return [name for name, module in model.named_modules() if is_in_layers(name, module) and is_target(name)]


def check_lora(
    name: str, lora: LoraSettings | None, section: str, *, revision: str | None = None, weights: bool = True
) -> None:
    """Raise a UserError unless a model has the modules that a new adapter adapts."""
    if lora is None:
        return
    model = check_model(name, revision=revision, weights=weights)
    if isinstance(model, PeftModel):
        raise UserError(f"'{name}' is an adapter already: leave {section} out to train it further, or merge it first")
    if model is not None:
        with torch.device("meta"):
            new_adapter(model, lora, section=section)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the Transformers causal LM: the model itself, or the base of a `PeftModel`.

    Raises:
        UserError: the model is of another kind, or its adapter is more than a change of weights.
    """
    adapters: Any = getattr(model, "peft_config", None)  # Transformers adds adapters, too: add_adapter
    for config in adapters.values() if isinstance(adapters, dict) else ():
        check_adapter_kind(vars(config), "the model's adapter")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise wrong_type("the model", inner, "a Transformers causal language model in memory (see load_model)")
    return inner
