"""Model folders in the Transformers layout: required files, weights, the base model of an adapter.

Only safetensors are read and written; pickles are never loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sepo.errors import UserError, named_error

# PEFT adapters outside of the layers, which forward passes over packed rows would bypass.
_CHANGES_THE_INPUT = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "XLORA", "POLY", "SHADOW",
}  # fmt: skip


# Settings of PEFT's adapters of layers whose effect is not one of weights alone, with the reason.
_BEYOND_WEIGHTS = {
    "alora_invocation_tokens": "acts only after its invocation tokens (an activated LoRA)",
    "arrow_config": "routes each token to other adapters, which are not in its folder (Arrow)",
    "sample_at_inference": "draws random numbers in every forward pass",
}
# Starts of LoRA that change the base by random numbers or by data, so that base and adapter cannot be read again.
_UNREPEATABLE = re.compile(r"pissa_niter_\d+|corda|lora_ga")


def check_folder(folder: Path, weights: bool = True) -> None:
    """Raise a UserError for a folder without a model; `weights=False` requires the config only (for a plan)."""
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; adapters are in its folders {', '.join(inside)}: name one" if inside else ""
        raise UserError(
            f"no model in '{folder}': expected config.json or adapter_config.json beside *.safetensors{hint}"
        )
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    if is_adapter(folder):
        if whole := sorted(folder.glob("model*.safetensors")):
            raise UserError(
                f"'{folder}' holds two models, an adapter (adapter_config.json) and the weights of a whole one "
                f"({whole[0].name}): remove one of them"
            )
        check_adapter_kind(read_json_object(folder / "adapter_config.json"), f"the adapter '{folder}'")
    elif (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file():
        raise UserError(
            f"'{folder}' holds two models, model.safetensors and the shards of model.safetensors.index.json: "
            "remove one of them"
        )
    if weights and not weight_files(folder):
        raise UserError(f"the model folder '{folder}' holds no *.safetensors file; {_no_pickle(folder)}")


def check_adapter_kind(config: Mapping[str, Any], what: str) -> None:
    """Raise a UserError for an adapter that is more than a change of weights: packed rows and generation bypass it.

    Args:
        config: the fields of PEFT's config.
    """
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    reason = next((reason for key, reason in _BEYOND_WEIGHTS.items() if config.get(key)), None)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _UNREPEATABLE.fullmatch(start):
        reason = f"changed its base in a way that cannot be repeated (init_lora_weights={start})"
    if kind in _CHANGES_THE_INPUT:
        reason = "changes the model's input or its forward pass rather than its weights"
    if reason is not None:
        raise UserError(
            f"{what} ({kind}) {reason}, which is not supported: expected an adapter of layers, such as LoRA"
        )


def is_outline(folder: str | os.PathLike) -> bool:
    """Does a folder hold a model's config, but no weights?"""
    path = os.fspath(folder)
    if not os.path.isfile(os.path.join(path, "config.json")):
        return False
    return not is_adapter(Path(path)) and not weight_files(Path(path))


def _no_pickle(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "pickled weights (*.bin, *.pt) are never loaded: save the model as safetensors"
    return "expected the weights of the model as safetensors"


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("adapter_model.safetensors" if is_adapter(folder) else "*.safetensors"))


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter folder, and its revision."""
    config = read_json_object(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"'{folder / 'adapter_config.json'}' has no base_model_name_or_path: add the base model")
    if os.path.isabs(base) and not os.path.exists(base):
        raise UserError(
            f"the adapter '{folder}' needs its base model '{base}', which is not there; "
            f"set base_model_name_or_path of '{folder / 'adapter_config.json'}' to its path"
        )
    return base, config.get("revision")


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({named_error(error)}): expected a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a JSON {type(value).__name__}: expected an object")
    return value
