"""Turn off all randomness of a model in training mode: dropout under all its names, router noise, skipped layers.

Dropout would swamp a loss of log-ratios: before training, policy and reference are equal, and DPO's loss must be ln 2.
TRL turns off dropout modules only. Many architectures have a dropout number instead (OPT, XGLM, Falcon, BioGPT,
Seed-OSS), or read it from their config in the forward.
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

# Without the jitter of routers, which PhiMoE also uses in evaluation; `eval_only_modules` handles its noise.
_DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_(path|prob|rate)")

Setting = tuple[PreTrainedConfig, str, float]


def disable_dropout(model: nn.Module) -> list[Setting]:
    """Turn off all dropout of the base model. An adapter's dropout is a setting of the user and stays.

    Returns:
        the changed settings of the model's configs and their old values. `as_configured` restores them for saving.
    """
    changed: list[Setting] = []
    configs: dict[int, PreTrainedConfig] = {}
    for module in _base_modules(model):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
            elif isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if _is_dropout(name, value):
                setattr(config, name, 0.0)
                changed.append((config, name, value))
    return changed


@contextmanager
def as_configured(changed: list[Setting]) -> Iterator[None]:
    """Inside this context, the configs have the values from before `disable_dropout`."""
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in changed:
            setattr(config, name, 0.0)


def eval_only_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that stay in evaluation mode while training: some are random without a setting (PhiMoE's router).

    Adapters are not among them, since their dropout is the user's; nor are layers and whole models, which recompute
    activations in training mode only.
    """
    excluded = (PreTrainedModel, PeftModel, GradientCheckpointingLayer)
    return [module for module in _base_modules(model) if not isinstance(module, excluded)]


def train_without_dropout(model: nn.Module, eval_only: list[nn.Module]) -> None:
    """Put a model into training mode, except for the modules `eval_only` (`eval_only_modules`)."""
    model.train()
    for module in eval_only:
        module.training = False


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of adapters, including their dropout."""
    base = {id(module) for module in _base_modules(model)}
    return [module for module in model.modules() if id(module) not in base]


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model without those of adapters."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_modules(module.get_base_layer())
        return
    yield module
    for child in module.children():
        yield from _base_modules(child)


def _is_dropout(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0 and bool(_DROPOUT.search(name))
