"""A folder -> weights in memory, to score or train. Code of a model repository runs only if the user allows it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from sepo import processes
from sepo.errors import UserError, wrong_type
from sepo.files import expand_home
from sepo.models.adapters import LoraSettings, is_separate, load_adapter, new_adapter
from sepo.models.checkpoint import load_whole
from sepo.models.devices import check_quantization, choose_device, choose_dtype
from sepo.models.folders import adapter_base, is_adapter
from sepo.models.names import resolve_model
from sepo.models.sharding import sharded_loading, sharded_twin


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | os.PathLike | None = None,
    lora: LoraSettings | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    train: bool = False,
    seed: int = 0,
    sharded: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model, ready to score (`train=False`) or to train.

    An adapter (a folder or hub id with `adapter_config.json`, or the argument `adapter`) gives a `PeftModel` of its
    base. Its base weights serve as reference, and as oracle.

    Args:
        name_or_path: see `resolve_model`.
        dtype: dtype of the weights, see `choose_dtype`; trained adapter weights are float32.
        device: see `choose_device`. With FSDP or DeepSpeed, which place models, a model for training stays on the CPU.
        adapter: an adapter for the model `name_or_path`; the base that the adapter names is ignored.
        lora: settings of a new adapter; the reference is then the same model without the adapter.
        quantization: "4bit" loads the base in NF4 through bitsandbytes (QLoRA with `lora`).
        attn_implementation: passed to Transformers; None: the default of Transformers.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the code of the model repository.
        train: keep the weights trainable (all weights, or those of the adapter) and set training mode. Otherwise no
            weight requires a gradient and dropout is off.
        seed: seed of a new adapter's initial weights; the global random state does not change.
        sharded: shard the weights of a frozen model over the processes of the launch, which must all call this
            (`models.sharding`). A LoRA adapter is whole in every process. For other adapters each process holds the
            whole model in host memory until it is sharded.

    Raises:
        UserError: no such model, device or dtype; unavailable quantization; damaged weights.
    """
    name, chosen = expand_home(name_or_path, "the model"), choose_device(device)
    if not isinstance(lora, LoraSettings | None):
        raise wrong_type("lora", lora, "LoraSettings, such as LoraSettings(r=16)")
    found = _find(name, revision, adapter)
    adapter, has_adapter = found.adapter, found.adapter is not None or lora is not None
    check_quantization(quantization, train=train, lora=has_adapter)
    if adapter is not None and lora is not None:
        raise UserError(f"'{adapter}' is an adapter already: leave lora out to train it further, or merge it first")
    if is_adapter(found.folder):
        raise UserError(f"the base model '{found.name}' is an adapter itself: merge it into its base first")
    weights = choose_dtype(dtype, chosen, trained=train and not has_adapter)
    if sharded and (train or quantization or trust_remote_code):
        raise UserError("a sharded model must be frozen, without quantization and without trust_remote_code")
    options = _options(weights, quantization, attn_implementation, trust_remote_code)
    add_adapter = None if lora is None else partial(new_adapter, lora=lora, seed=seed)
    model = _load(found, chosen, options, train, sharded, add_adapter)
    if not train:
        model.requires_grad_(False)
    return model.train(train)


class _Found(NamedTuple):
    """The whole model of a name, and the adapter on it, if there is one."""

    folder: Path
    name: str
    revision: str | None
    adapter: str | os.PathLike | None


def _find(name: str, revision: str | None, adapter: str | os.PathLike | None) -> _Found:
    folder = Path(resolve_model(name, revision=revision))
    if adapter is None and is_adapter(folder):
        adapter = folder
        name, revision = adapter_base(folder)
        folder = Path(resolve_model(name, revision=revision))
    return _Found(folder, name, revision, adapter)


def _load(
    found: _Found,
    device: torch.device,
    options: dict[str, Any],
    train: bool,
    sharded: bool,
    add_adapter: Callable[[PreTrainedModel], PeftModel] | None,
) -> PreTrainedModel | PeftModel:
    """The model with its adapter: the one that it has, or a new one."""
    folder, name, revision, adapter = found
    # An adapter with whole modules, or one that reads weights of the base, needs the whole base.
    whole_first = sharded and adapter is not None and not is_separate(Path(resolve_model(adapter)))
    device_of_base = torch.device("cpu") if whole_first else device
    base = _load_base(folder, name, device_of_base, options, train=train, sharded=sharded and not whole_first)
    model: PreTrainedModel | PeftModel = base
    if adapter is not None:
        model = load_adapter(base, adapter, train)
    elif add_adapter is not None:
        model = add_adapter(base)
    if isinstance(model, PeftModel):
        # The name, not the local folder: cache folders differ between machines.
        adapter_config = cast(LoraConfig, model.peft_config["default"])
        adapter_config.base_model_name_or_path = os.path.abspath(name) if os.path.exists(name) else name
        adapter_config.revision = revision
    return cast(PeftModel, sharded_twin(model, device)) if whole_first else model


def _options(
    dtype: torch.dtype, quantization: str | None, attn_implementation: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Keywords of `from_pretrained`."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return options


def _load_base(
    folder: Path, name: str, device: torch.device, options: dict[str, Any], *, train: bool, sharded: bool
) -> PreTrainedModel:
    placed_by_launcher = train and bool(processes.sharding())
    if sharded:
        options |= sharded_loading(folder, name, device)
    elif "quantization_config" in options or (device.type == "cuda" and not placed_by_launcher):
        options["device_map"] = {"": str(device)}  # straight to the GPU, without a copy in host memory
    try:
        model = load_whole(folder, name, **options)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the model '{name}' does not fit on {device}: use a smaller one, quantization=4bit or device=cpu"
        ) from None
    if device.type == "mps" and not placed_by_launcher and not sharded:
        model.to(device)  # type: ignore[arg-type]
    return model
