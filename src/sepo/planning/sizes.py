"""Counts of the pairs and shapes of the models (from a config or its weights): what costs follow from."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from sepo.data.ragged import SIDES, flat, read_lengths
from sepo.data.splits import sample_prompts
from sepo.data.tables import read_shard, read_table, table_paths
from sepo.forward.packing import fill_rows, pack, read_length
from sepo.forward.scoring import table_pairs, tokens_per_row_for
from sepo.models.adapters import causal_lm
from sepo.models.names import load_config
from sepo.planning.cost import ModelSize, PairSizes, Shape, Sizes
from sepo.recipe.settings import Recipe
from sepo.runs.method import Method
from sepo.stages import reference

# Number of pairs whose rows are packed to see how many tokens packing saves.
_SAMPLE = 4000


def method_sizes(method: Method, kind: str, processes: int = 1) -> Sizes:
    """Sizes of a method whose pairs are there; arguments as in `sizes_of`."""
    sizes = sizes_of(method.recipe, method.pairs.folder, kind, processes)
    if not method.transfers:
        return sizes
    of_policy = sizes_of(method.recipe, method.policy_pairs.folder, kind, processes)
    return replace(sizes, policy=of_policy, transfer=_cuts(method.policy_pairs.results["train_transfer"]))


def _cuts(figures: dict[str, float]) -> str:
    """One line on how two tokenizers cut the same responses."""
    dropped = f", {figures['dropped']:,.0f} pairs dropped" if figures["dropped"] else ""
    return (
        f"under the policy's tokenizer: {figures['one_to_one_share']:.0%} of its tokens are tokens of both, "
        f"{figures['bytes_per_group']:.1f} bytes a group{dropped}"
    )


def sizes_of(recipe: Recipe, folder: Path, kind: str, processes: int = 1) -> Sizes:
    """Count the pairs of a folder, and read the shapes of a recipe's models from their configs.

    Args:
        kind: of device ("cpu", "cuda", "mps").
        processes: devices that share the work.
    """
    budget = recipe.tokens_per_row or tokens_per_row_for(kind, scoring=True)
    prompts = prompts_of(read_table(folder / "held_out", "pairs"))
    small, large = models_of(recipe)
    return Sizes(
        train=pair_sizes(folder / "train", budget),
        held_out=pair_sizes(folder / "held_out", budget),
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        longest_prompt=max(map(len, prompts), default=0),
        small=small,
        large=large,
        device=kind,
        processes=processes,
    )


def prompts_of(pairs: pa.Table) -> list[tuple[int, ...]]:
    """The distinct prompts of a pairs table, sorted."""
    return sorted(map(tuple, sample_prompts(pairs, len(pairs))))


def pair_sizes(folder: Path, budget: int) -> PairSizes:
    """Counts of a pairs table, and the tokens that scoring reads in rows of a budget."""
    pairs = tokens = chosen = rejected = longest = packed = alone = 0
    for path in table_paths(folder, "pairs"):
        table = read_shard(path, "pairs")
        counts = [int(flat(table.column(f"{side}_ids"))[1].sum()) for side in SIDES]
        texts = [flat(table.column("prompt_ids"))[1], *(read_lengths(table, side) for side in SIDES)]
        rows = table_pairs(table)
        lengths = [read_length(pair) for pair in rows]
        if pairs < _SAMPLE:
            packed += sum(pack(row).num_tokens for row in fill_rows(rows, budget))
            alone += sum(lengths)
        pairs, longest = pairs + len(rows), max([longest, *lengths])
        tokens += sum(int(text.sum()) for text in texts)
        chosen, rejected = chosen + counts[0], rejected + counts[1]
    scored = round(tokens * packed / max(alone, 1))
    return PairSizes(pairs, tokens, scored, chosen, rejected, longest)


def models_of(recipe: Recipe) -> tuple[ModelSize, ModelSize]:
    """The reference and the policy."""
    name, revision = recipe.reference.model, recipe.reference.revision
    layers = recipe.reference.layers
    shape = load_shape(name, revision=revision) if layers is None else model_shape(reference.config(recipe))
    small = large = ModelSize(name, revision, shape, layers)
    if recipe.policy.model:
        name, revision = recipe.policy.model, recipe.policy.revision
        large = ModelSize(name, revision, load_shape(name, revision=revision))
    return small, large


# --- shapes of models ---------------------------------------------------------------------------------------------


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
