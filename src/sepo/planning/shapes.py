"""The shape of a model, from its config or its weights."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from sepo.models.adapters import causal_lm
from sepo.models.names import load_config
from sepo.planning.cost import Shape


def load_shape(name_or_path: str | os.PathLike, *, revision: str | None = None) -> Shape:
    """The shape of a model from its config; raises a UserError as `load_config`."""
    return _shape_of(os.fspath(name_or_path), revision)


@lru_cache(maxsize=16)
def _shape_of(name: str, revision: str | None) -> Shape:
    return model_shape(load_config(name, revision=revision))


def model_shape(model: nn.Module | PreTrainedConfig) -> Shape:
    """The shape of a model, or of the model of a config, which is created on "meta"."""
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            return model_shape(AutoModelForCausalLM.from_config(model))
    lm = causal_lm(model)
    config: Any = lm.config.get_text_config()
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    heads = _number(config, "num_attention_heads") or 1  # no attention, or numbers that differ by layer
    width = _number(config, "head_dim") or config.hidden_size // heads
    keys = _number(config, "num_key_value_heads") or heads
    kinds = (nn.Linear, Conv1D)
    linears = [
        (name, module) for name, module in lm.named_modules() if isinstance(module, kinds) and module is not head
    ]
    experts = getattr(config, "num_experts_per_tok", None)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if experts:
        intermediate = experts * (getattr(config, "moe_intermediate_size", None) or intermediate)
    blocks = [
        module
        for modules in lm.modules()
        if isinstance(modules, nn.ModuleList) and len(modules) == config.num_hidden_layers
        for module in modules
    ]
    parameters = sum(p.numel() for p in lm.parameters())
    ends = {id(module.weight): module.get_parameter("weight").numel() for module in (head, embedding)}
    return Shape(
        parameters=parameters,
        block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0) or parameters,
        head=head.get_parameter("weight").numel(),
        embedding=sum(ends.values()),
        linears=tuple((name, *_features(module)) for name, module in linears),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=intermediate or 4 * config.hidden_size,
        vocab=config.vocab_size,
        queries=heads * width,
        keys=keys * width,
    )


def _number(config: Any, name: str) -> int | None:
    """A number of a config; None if it is missing or differs by layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # Transformers raises for numbers that differ by layer
        return None
    return value if isinstance(value, int) else None


def _features(module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    return module.in_features, module.out_features
