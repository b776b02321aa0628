"""Weights in memory -> a folder of safetensors, complete or not at all."""

from __future__ import annotations

import copy
import os
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sepo.errors import UserError, named_error, wrong_type
from sepo.files import replace_folder
from sepo.models.adapters import causal_lm


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    *,
    merge_adapter: bool = False,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Save a model as safetensors with its tokenizer, chat template and generation config.

    The folder is replaced (see `replace_folder`), including checkpoints in it. A `PeftModel` is saved as its adapter,
    which names its base; `merge_adapter` saves the whole model with the adapter merged into its weights (this needs
    memory for a second copy).

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
    if merge_adapter and isinstance(model, PeftModel):
        model = _merged(model)
    try:
        with replace_folder(folder) as temporary:
            if isinstance(model, PeftModel):
                # The vocabulary never changes, so embeddings are not saved; "auto" would send a request to the hub.
                model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state_dict)
                (temporary / "README.md").unlink(missing_ok=True)  # a template with local paths
                causal_lm(model).generation_config.save_pretrained(temporary)
            else:
                model.save_pretrained(temporary, state_dict=state_dict)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise UserError(
            f"cannot save the model to '{folder}' ({named_error(error)}); free space or choose another folder"
        ) from None


def _merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the base with the adapter merged into its weights, checked to compute the same."""
    if getattr(causal_lm(model), "is_quantized", False):
        raise UserError("an adapter on 4-bit weights cannot be merged: load it without quantization, then merge it")
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    twin = copy.deepcopy(model)
    _untie(causal_lm(twin))
    try:
        merged = cast(PreTrainedModel, twin.merge_and_unload())
    except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"this adapter ({kind}) cannot be merged into its base ({named_error(error)}): save it as an adapter"
        ) from None
    difference = float((_probe(model) - _probe(merged)).abs().max())
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
