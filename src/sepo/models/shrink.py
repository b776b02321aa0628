"""A smaller model of the same family, with some of the decoder layers, evenly spaced (weak to strong)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sepo.errors import UserError
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model


def shrink_model(name_or_path: str | os.PathLike, layers: int, out: str | os.PathLike) -> list[int]:
    """Save a model with `layers` of its decoder layers, and its tokenizer, to the folder `out`.

    The first and the last layer and evenly spaced layers between them stay. The smaller model writes nonsense until it
    is fine-tuned, but can rank good and bad responses.

    Returns:
        the indices of the layers that stay.

    Raises:
        UserError: the model has fewer layers, or they are not in one list.
    """
    model = load_model(name_or_path, device="cpu", dtype="float32")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"'{name_or_path}' is an adapter: merge it into its base before layers are left out")
    kept = drop_layers(model, layers)
    save_model(model, load_tokenizer(name_or_path), out)
    return kept


def drop_layers(model: PreTrainedModel, layers: int) -> list[int]:
    """Keep `layers` decoder layers of a model; returns their indices."""
    decoder: Any = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no list of layers: reference.layers cannot be used with it")
    kept = layers_kept(model.config, layers)
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # of the layer's keys and values in the cache of generation
    cut_config(model.config, layers)
    return kept


def layers_kept(config: PreTrainedConfig, layers: int) -> list[int]:
    """The indices of the layers that stay."""
    number = config.get_text_config().num_hidden_layers
    if not 2 <= layers <= number:
        raise UserError(f"reference.layers is {layers}: expected 2 to {number}, the model's number of layers")
    return np.linspace(0, number - 1, layers).round().astype(int).tolist()


def cut_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Set the number of layers of a config to `layers`; returns the config."""
    kept = layers_kept(config, layers)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[index] for index in kept]
    return config
