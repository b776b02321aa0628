"""Weights in memory -> a folder of safetensors, whole or not at all."""

from __future__ import annotations

import copy
import os
from typing import Any, cast

from peft import PeftModel
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

    The folder is replaced (see `replace_folder`): what it held is gone, checkpoints included. A `PeftModel`
    is saved as its adapter alone, which names its base; `merge_adapter` writes the whole model with the
    adapter added to its weights instead (it needs memory for a second copy while it runs).

    Args:
        model: a Transformers causal LM or a `PeftModel`, not wrapped for distributed training.
        tokenizer: saved beside the model; None leaves it out.
        state_dict: the whole weights of a model whose own are cut up over processes (FSDP, DeepSpeed).

    Raises:
        UserError: the model is of neither kind, the tokenizer is none, an adapter on quantized weights was to be
            merged, or the folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise wrong_type("the model", model, "a Transformers model or a PeftModel in memory, not wrapped")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise wrong_type("tokenizer", tokenizer, "a tokenizer in memory (load_tokenizer gives one), or None")
    if merge_adapter and isinstance(model, PeftModel):
        if getattr(causal_lm(model), "is_quantized", False):
            raise UserError("an adapter on 4-bit weights cannot be merged: load it without quantization, then merge it")
        model = cast(PreTrainedModel, copy.deepcopy(model).merge_and_unload())
    try:
        with replace_folder(folder) as temporary:
            if isinstance(model, PeftModel):
                # The vocabulary never changes, so the embeddings stay the base's; "auto" would ask the hub.
                model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state_dict)
                (temporary / "README.md").unlink(missing_ok=True)  # a form to fill in, with paths of this machine
                causal_lm(model).generation_config.save_pretrained(temporary)
            else:
                model.save_pretrained(temporary, state_dict=state_dict)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise UserError(
            f"cannot save the model to '{folder}' ({named_error(error)}); free space or choose another"
        ) from None
