"""A model's config and its size, without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sepo.errors import UserError, named_error
from sepo.files import expand_home
from sepo.models.adapters import causal_lm
from sepo.models.folders import adapter_base, check_folder, is_adapter
from sepo.models.gguf import check_gguf, converted_folder, is_converted
from sepo.models.hub import hub_snapshot
from sepo.models.names import gguf_path


def load_config(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's config without its weights: a GGUF file is not converted; an adapter's is its base's.

    Raises:
        UserError: no such model, or a config that Transformers does not know.
    """
    name = expand_home(name_or_path, "the model")
    gguf = gguf_path(name)
    try:
        if gguf is not None:
            converted = converted_folder(gguf, None)
            if is_converted(converted):
                return AutoConfig.from_pretrained(converted, trust_remote_code=False)
            check_gguf(gguf)
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if os.path.isdir(name):
            check_folder(Path(name))
            if is_adapter(Path(name)):
                base, base_revision = adapter_base(Path(name))
                return load_config(base, revision=base_revision)
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        commit, cached = hub_snapshot(name, revision)
        where = {} if cached else {"revision": commit}
        return AutoConfig.from_pretrained(cached or name, trust_remote_code=False, **where)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read the config of the model '{name}' ({named_error(error)})") from None


def describe_model(model: nn.Module | PreTrainedConfig) -> dict[str, Any]:
    """Return a few figures of a model for tables and estimates.

    Args:
        model: a loaded model, or a config (from `load_config`), whose model is laid out without memory for
            its weights.

    Returns:
        `architecture`, `parameters` (tied weights once), `trainable`, `layers`, `hidden`, `cached` (keys and values of
        a token), `vocab`, `dtype`.
    """
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            return describe_model(AutoModelForCausalLM.from_config(model))
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    parameters = list(model.parameters())
    return {
        "architecture": type(lm).__name__,
        "parameters": sum(_count(p) for p in parameters),
        "trainable": sum(_count(p) for p in parameters if p.requires_grad),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "cached": 2 * config.num_hidden_layers * _key_width(config),
        "vocab": config.vocab_size,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def _key_width(config: PreTrainedConfig) -> int:
    """Numbers in the keys of one token in one layer; the hidden width where the config does not say more."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):  # no attention, or another number in each layer
        return int(config.hidden_size)
    return kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _count(parameter: nn.Parameter) -> int:
    packed = type(parameter).__name__ == "Params4bit"  # two 4-bit weights a byte
    return parameter.numel() * 2 * parameter.element_size() if packed else parameter.numel()
