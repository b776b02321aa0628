"""A folder -> weights in memory, ready to score or to train. No code of a model repository runs unless asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from sepo import processes
from sepo.errors import UserError, wrong_type
from sepo.files import expand_home
from sepo.models.adapters import LoraSettings, is_separate, load_adapter, new_adapter
from sepo.models.checkpoint import load_whole
from sepo.models.devices import check_quantization, choose_device, choose_dtype
from sepo.models.folders import adapter_base, check_folder, is_adapter
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

    An adapter (a folder or hub id with `adapter_config.json`, or the `adapter` argument) gives a `PeftModel`
    of its base: one set of base weights serves as reference (see `reference_weights`) and as oracle.

    Args:
        name_or_path: see `resolve_model`.
        dtype: of the weights, see `choose_dtype`; adapter weights are float32 where they are trained.
        device: see `choose_device`. Under FSDP or DeepSpeed, which place it, a model to be trained stays on
            the CPU.
        adapter: an adapter to put on the model `name_or_path`, whatever base that adapter names.
        lora: settings of a new adapter; the reference is then the same model with the adapter off.
        quantization: "4bit" loads the base in NF4 through bitsandbytes (QLoRA with `lora`).
        attn_implementation: passed to Transformers; None is its choice.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the model repository's own code. Off unless asked for.
        train: leave the weights trainable (all of them, or the adapter's alone) and put the model in training
            mode; otherwise nothing requires a gradient and dropout is off.
        seed: of a new adapter's first weights; the caller's random state is neither read nor moved.
        sharded: cut the weights up over the processes of the launch, all of which must call this: each reads and
            keeps a part (`models.sharding`). For models that stay as they are. A LoRA adapter is whole everywhere; for
            other kinds each process holds the whole model in the host's memory until it is cut up.

    Raises:
        UserError: no such model, device or dtype; quantization that cannot be had here; damaged weights.
    """
    name = expand_home(name_or_path, "the model")
    chosen = choose_device(device)
    if not isinstance(lora, LoraSettings | None):
        raise wrong_type("lora", lora, "LoraSettings, such as LoraSettings(r=16)")
    folder = Path(resolve_model(name, revision=revision))
    check_folder(folder)
    if adapter is None and is_adapter(folder):
        adapter = folder
        name, revision = adapter_base(folder)
        folder = Path(resolve_model(name, revision=revision))
    has_adapter = adapter is not None or lora is not None
    check_quantization(quantization, train=train, lora=has_adapter)
    if adapter is not None and lora is not None:
        raise UserError(f"'{adapter}' is an adapter already: leave lora out to train it further, or merge it first")
    if is_adapter(folder):
        raise UserError(f"the base model '{name}' is an adapter itself: merge it into its base first")

    weights = choose_dtype(dtype, chosen, trained=train and not has_adapter)
    if sharded and (train or quantization or trust_remote_code):
        raise UserError("a model is read sharded as it is: without training, quantization and code of its own")
    # An adapter that brings whole modules, or reads the base's weights while it is put on, needs them whole.
    whole_first = sharded and adapter is not None and not is_separate(Path(resolve_model(adapter)))
    base = _load_base(
        folder,
        name,
        weights,
        torch.device("cpu") if whole_first else chosen,
        quantization,
        attn_implementation,
        trust_remote_code,
        train,
        sharded and not whole_first,
    )
    model: PreTrainedModel | PeftModel = base
    if adapter is not None:
        model = load_adapter(base, adapter, train)
    elif lora is not None:
        model = new_adapter(base, lora, seed)
    if isinstance(model, PeftModel):
        # The name, not the place it was found in: a cache folder is another one on another machine.
        adapter_config = cast(LoraConfig, model.peft_config["default"])
        adapter_config.base_model_name_or_path = os.path.abspath(name) if os.path.exists(name) else name
        adapter_config.revision = revision
    if whole_first:
        model = cast(PeftModel, sharded_twin(model, chosen))
    if not train:
        model.requires_grad_(False)
    return model.train(train)


def _load_base(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
    train: bool,
    sharded: bool,
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    placed_by_launcher = train and bool(processes.sharding())
    if sharded:
        options |= sharded_loading(folder, name, device)
    elif quantization or (device.type == "cuda" and not placed_by_launcher):
        options["device_map"] = {"": str(device)}  # straight to the GPU, with no copy of the weights in host memory
    try:
        model = load_whole(folder, name, **options)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the model '{name}' does not fit on {device}: use a smaller one, quantization=4bit or device=cpu"
        ) from None
    if device.type == "mps" and not placed_by_launcher and not sharded:
        model.to(device)  # type: ignore[arg-type]
    # Sampling settings beside do_sample=False (as some published chat models have) are refused at save time,
    # which is after the training: say what they mean now.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
    return model
