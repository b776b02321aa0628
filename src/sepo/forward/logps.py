"""The one forward path: log-probabilities of target tokens, given packed pairs.

`token_logps` runs the backbone once over a packed row, gathers the hidden states that predict the targets and projects
only those through the LM head. Scoring, DPO and SePO differ in which targets they ask for and what they do with the
answers; none has a forward pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import wrong_type
from sepo.forward.last_block import last_mlp, rows_only
from sepo.forward.lm_head import LogitTransform, target_logps
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch
from sepo.models.adapters import causal_lm


def token_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Log-probability of every target of a batch, with gradients if they are enabled.

    Args:
        model: a Transformers causal LM or a PEFT model of one; `prepare_model` was called on it.
        batch: from `packing.pack` (or `packing.pad`), on the model's device. `N` targets.

    Returns:
        `[N]` float32 (float64 for a float64 model), in nats, in the order of `batch.segments`.
    """
    lm = causal_lm(model)
    if not isinstance(batch, PackedBatch):
        raise wrong_type("batch", batch, "a PackedBatch: pack makes one of pairs")
    targets = target_hidden(lm, batch)
    return target_logps(targets, lm.get_output_embeddings(), batch.target_ids, LogitTransform.from_config(lm.config))


def target_hidden(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states that predict the targets, `[N, hidden]`: what an LM head is applied to."""
    inputs: dict = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.layout is not None:
        inputs["layout"] = batch.layout
        # A 4D mask is taken as it is: no [T, T] mask is built, and the packed attention function ignores this one.
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
    with rows_only(_prunable_mlp(lm, batch), batch.target_rows):
        hidden = getattr(lm, lm.base_model_prefix)(**inputs).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.target_positions)


def _prunable_mlp(lm: PreTrainedModel, batch: PackedBatch) -> nn.Module | None:
    """The last block's MLP where it may skip rows: checkpointing runs it again later, outside of this forward."""
    if batch.layout is None or not getattr(lm, "sepo_prunable", False):
        return None
    # Transformers' own property for this goes by another name from 5.23 on.
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    return None if checkpointing else last_mlp(lm)


def segment_sums(logps: Tensor, batch: PackedBatch, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """Sum target log-probabilities by pair and side.

    Returns:
        chosen and rejected sums, each `[B]`; weighted by `batch.weights` if asked.
    """
    values = logps * batch.weights if weighted else logps
    sums = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, values)
    return sums[CHOSEN::2], sums[REJECTED::2]


def segment_weights(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sum of target weights by pair and side (the number of targets where all weights are 1), each `[B]`."""
    sums = batch.weights.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, batch.weights)
    return sums[CHOSEN::2], sums[REJECTED::2]
