"""Config, size and shape of a model, without its weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from sepo.errors import UserError, named_error
from sepo.files import expand_home
from sepo.models.adapters import causal_lm
from sepo.models.folders import adapter_base, check_folder, is_adapter
from sepo.models.gguf import check_gguf, converted_folder, is_converted
from sepo.models.hub import hub_snapshot
from sepo.models.names import gguf_path

if TYPE_CHECKING:
    from sepo.recipe.settings import LoraSettings


def load_config(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's config without its weights. A GGUF file is not converted. An adapter has its base's config.

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
            check_folder(Path(name), weights=False)
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
        model: a loaded model, or a config (from `load_config`) whose model is created on "meta".

    Returns:
        `architecture`, `parameters` (tied weights once), `trainable`, `layers`, `hidden`, `vocab`, `dtype`.
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
        "vocab": config.vocab_size,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class Shape:
    """The numbers that determine time and memory of a model.

    Attributes:
        parameters: number of weights, tied weights once.
        block: weights of the largest decoder block.
        head: weights of the LM head.
        embedding: weights of the input embedding and, if it is not tied, the LM head.
        linears: name, inputs and outputs of every linear layer except the LM head.
        layers, hidden, intermediate, vocab: sizes of the decoder; `intermediate` counts the experts of one token.
        queries, keys: total width of the query heads, and of the key heads.
    """

    parameters: int
    block: int
    head: int
    embedding: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    queries: int
    keys: int

    @property
    def linear(self) -> int:
        """Weights of the linear layers without the LM head."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapted_by(self, lora: LoraSettings) -> list[tuple[str, int, int]]:
        """The linear layers that LoRA adapts, in its decoder layers only."""
        layers = lora.adapted_layers(self.layers)
        numbered = ((linear, re.search(r"\.(\d+)\.", linear[0])) for linear in self.adapted(lora.target_modules))
        return [linear for linear, number in numbered if number is None or int(number[1]) in layers]

    def reached(self, lora: LoraSettings) -> int:
        """Weights of the linear layers from the first adapted one on; a backward pass ends there."""
        adapted = self.adapted_by(lora)
        first = self.linears.index(adapted[0]) if adapted else len(self.linears)
        return sum(inputs * outputs for _, inputs, outputs in self.linears[first:])

    def adapted(self, targets: str | list[str]) -> list[tuple[str, int, int]]:
        """The linear layers that LoRA adapts, by the rules of PEFT's `target_modules`."""
        if targets == "all-linear":
            return list(self.linears)
        if isinstance(targets, str):
            return [layer for layer in self.linears if re.fullmatch(targets, layer[0])]
        return [layer for layer in self.linears if any(layer[0] == t or layer[0].endswith(f".{t}") for t in targets)]


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


def _count(parameter: nn.Parameter) -> int:
    packed = type(parameter).__name__ == "Params4bit"  # two 4-bit weights in each byte
    return parameter.numel() * 2 * parameter.element_size() if packed else parameter.numel()
