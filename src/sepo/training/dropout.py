"""What a model draws at random while it trains, turned off: dropout in all its spellings, router noise, skipped layers.

A loss of log-ratios would drown in it: before any training policy and reference are one model, and DPO's loss is ln 2.
TRL turns dropout modules off too; many architectures keep theirs as a number instead (OPT, XGLM, Falcon, BioGPT,
Seed-OSS), or read it from their config as they go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Not jitter of routers: PhiMoE's bounds its choice of experts in evaluation too. `noisy_parts` sees to it.
_NOISE = re.compile(r"dropout|pdrop|layerdrop|drop_(path|prob|rate)")

Setting = tuple[PreTrainedConfig, str, float]


def disable_dropout(model: nn.Module) -> list[Setting]:
    """Turn off all noise of a model's own; an adapter's dropout is the user's setting and stays.

    Returns:
        the settings of its configs that were changed, with what they were: a model is saved as it was configured
        (`as_configured`).
    """
    changed: list[Setting] = []
    seen: set[int] = set()
    for module in _own_modules(model):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_noise(name, value):
                setattr(module, name, 0.0)
            elif isinstance(value, PreTrainedConfig) and id(value) not in seen:
                seen.add(id(value))
                changed += _silence_config(value)
    return changed


@contextmanager
def as_configured(changed: list[Setting]) -> Iterator[None]:
    """While it lasts, configs have the values again that `silence` changed."""
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in changed:
            setattr(config, name, 0.0)


def noisy_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that training may leave in evaluation mode, which draw at random without a setting (PhiMoE's router).

    Not adapters, whose dropout is the user's; not layers and whole models, which recompute activations in training
    mode only.
    """
    kept = (PreTrainedModel, PeftModel, GradientCheckpointingLayer)
    return [module for module in _own_modules(model) if not isinstance(module, kept)]


def train_quietly(model: nn.Module, parts: list[nn.Module]) -> None:
    """Put a model into training mode but for some of its parts (`noisy_parts`)."""
    model.train()
    for module in parts:
        module.training = False


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of adapters, their dropout among them."""
    own = {id(module) for module in _own_modules(model)}
    return [module for module in model.modules() if id(module) not in own]


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model but those of adapters."""
    if isinstance(module, BaseTunerLayer):
        yield from _own_modules(module.get_base_layer())
        return
    yield module
    for child in module.children():
        yield from _own_modules(child)


def _silence_config(config: PreTrainedConfig) -> list[Setting]:
    changed: list[Setting] = []
    for name, value in list(vars(config).items()):
        if _is_noise(name, value):
            setattr(config, name, 0.0)
            changed.append((config, name, value))
    return changed


def _is_noise(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0 and bool(_NOISE.search(name))
