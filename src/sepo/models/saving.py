"""Weights in memory -> a folder of safetensors, complete or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sepo.errors import UserError, named_error, wrong_type
from sepo.files import replace_folder
from sepo.models.adapters import causal_lm, save_adapter


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    *,
    merge_adapter: bool = False,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Save a model as safetensors with its tokenizer, chat template and generation config.

    The folder is replaced (see `replace_folder`), including checkpoints in it. A `PeftModel` is saved as its active
    adapter, which names its base; `merge_adapter` saves the whole model with the adapter merged into its weights (this
    needs memory for a second copy).

    Args:
        model: a Transformers causal LM or a `PeftModel`, not wrapped for distributed training.
        tokenizer: saved with the model; None saves none.
        state_dict: the whole weights of a model whose weights are sharded over processes (FSDP, DeepSpeed).

    Raises:
        UserError: model or tokenizer have another type, the adapter cannot be merged or merging changes the
            log-probabilities, or the folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise wrong_type("the model", model, "a Transformers model or a PeftModel in memory, not wrapped")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise wrong_type("tokenizer", tokenizer, "a tokenizer in memory (see load_tokenizer), or None")
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model's adapter was added by Transformers: save it with its own save_pretrained, or read it with "
            "load_model(ADAPTER), which can be saved and merged here"
        )
    if merge_adapter and isinstance(model, PeftModel):
        model = merge(copy.deepcopy(model))
    try:
        with replace_folder(folder) as temporary:
            if isinstance(model, PeftModel):
                save_adapter(model, temporary, state_dict)
            else:
                model.save_pretrained(temporary, state_dict=state_dict)
                _add_older_keys(temporary / "config.json", model)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise UserError(
            f"cannot save the model to '{folder}' ({named_error(error)}); free space or choose another folder"
        ) from None


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge an adapter into the weights of its base, which are changed in place; checked to compute the same.

    Raises:
        UserError: the adapter cannot be merged, or merging changes the log-probabilities by more than rounding.
    """
    if getattr(causal_lm(model), "is_quantized", False):
        raise UserError("an adapter on 4-bit weights cannot be merged: load it without quantization, then merge it")
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    before = _probe(model)
    _untie(causal_lm(model))
    try:
        merged = cast(PreTrainedModel, cast(Any, model).merge_and_unload())
    except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"this adapter ({kind}) cannot be merged into its base ({named_error(error)}): save it as an adapter"
        ) from None
    difference = float((before - _probe(merged)).abs().max())
    if not difference <= (2e-3 if merged.dtype in (torch.float32, torch.float64) else 0.25):
        raise UserError(
            f"merging this adapter ({kind}) into its base changes the model (log-probabilities differ by "
            f"{difference:.3g}): save it as an adapter"
        )
    return merged


def _untie(lm: PreTrainedModel) -> None:
    """Untie head and embeddings if an adapter changes either: merged into a tied weight, it would change both."""
    head, embeddings = cast(Any, lm.get_output_embeddings()), cast(Any, lm.get_input_embeddings())
    if not any(isinstance(module, BaseTunerLayer) for module in (head, embeddings)):
        return
    head, embeddings = (
        cast(Any, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        for module in (head, embeddings)
    )
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        lm.config.tie_word_embeddings = False


@torch.no_grad()
def _probe(model: nn.Module) -> torch.Tensor:
    """Log-probabilities after a few tokens spread over the vocabulary: `[tokens, V]`."""
    training = model.training
    model.eval()
    weights = cast(Any, causal_lm(model).get_input_embeddings()).weight
    tokens = torch.linspace(0, len(weights) - 1, min(len(weights), 32), device=weights.device).long()[None]
    logps = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
    model.train(training)
    return logps


def _add_older_keys(path: Path, model: PreTrainedModel) -> None:
    """Add the rotary settings to a config.json under the names that readers before Transformers 5 know.

    Without them such a reader takes its default base (10,000) and no scaling, and says nothing. The keys are added only
    if the present release reads the same settings from both.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    both = with_older_rotary(values)

    def read(config: dict[str, Any]) -> dict[str, Any]:
        return with_older_rotary(type(model.config).from_dict(copy.deepcopy(config)).to_dict())

    if both != values and read(both) == read(values):
        path.write_text(json.dumps(both, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_older_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with `rope_theta` and `rope_scaling` beside `rope_parameters`, also in its `text_config`.

    >>> with_older_rotary({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}})["rope_theta"]
    500000.0
    """
    both = dict(config)
    if isinstance(text := both.get("text_config"), Mapping):
        both["text_config"] = with_older_rotary(text)
    rotary = both.get("rope_parameters")
    if not isinstance(rotary, Mapping) or not rotary:
        return both
    older: dict[str, Any] = {}
    if isinstance(full := rotary.get("full_attention"), Mapping):  # Gemma 3: one base for each kind of layer
        local = rotary.get("sliding_attention")
        older["rope_local_base_freq"] = local.get("rope_theta") if isinstance(local, Mapping) else None
        rotary = full
    neox = both.get("model_type") == "gpt_neox"
    older["rotary_emb_base" if neox else "rope_theta"] = rotary.get("rope_theta")
    older["rotary_pct" if neox else "partial_rotary_factor"] = rotary.get("partial_rotary_factor")
    both |= {key: value for key, value in older.items() if value is not None and key not in both}
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    both.setdefault("rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)
    return both
