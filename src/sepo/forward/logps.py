"""The one forward path: log-probabilities of target tokens, given packed pairs.

`token_logps` runs the backbone once over a packed row, gathers the hidden states that predict the targets and projects
only those through the LM head. Scoring, DPO and SePO differ in which targets they ask for and what they do with the
answers; none has a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import UserError, wrong_type
from sepo.forward.last_block import last_mlp, rows_only
from sepo.forward.lm_head import LogitTransform, target_logps
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch
from sepo.models.adapters import causal_lm
from sepo.models.sharding import inside_call, is_sharded


@dataclass
class Tried:
    """What `prepare_model` found out about a model; kept on the model as `sepo_tried`.

    Attributes:
        own_attention: the attention implementation it came with.
        insisted: "auto", or the layout that the user insists on.
        packs: it takes packed rows, of short texts at least: the packed attention is in place.
        layouts: the layout for each trial made: (insisted, tokens of the long text, tokens of the row).
        limits: for each layout the (document, row) lengths up to which it is known to be right.
    """

    own_attention: str
    insisted: str = "auto"
    packs: bool = False
    layouts: dict[tuple[str, int, int], str] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)


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


def read_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`token_logps` of a model that nobody has called: one whose weights are cut up is called for it."""
    return _called(model, partial(token_logps, model, batch))


def read_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`target_hidden` of a model that nobody has called."""
    return _called(model, partial(target_hidden, causal_lm(model), batch))


def _called(model: nn.Module, read: Callable[[], Tensor]) -> Tensor:
    return inside_call(causal_lm(model), read) if is_sharded(model) else read()


def target_hidden(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states that predict the targets, `[N, hidden]`: what an LM head is applied to.

    Raises:
        UserError: the batch is longer than what `prepare_model` tried, and the model might read it in another way.
    """
    _require_tried(lm, batch)
    if batch.unbatched:
        return _alone(lm, batch).index_select(0, batch.target_positions)
    inputs: dict = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.layout is not None:
        inputs["layout"] = batch.layout
        # A 4D mask is taken as it is: no [T, T] mask is built, and the packed attention function ignores this one.
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
    with rows_only(_prunable_mlp(lm, batch), batch.target_rows):
        hidden = backbone(lm)(**inputs).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.target_positions)


def _alone(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states of a padded batch, `[rows * T, hidden]`, each row read on its own; zeros for the padding."""
    assert batch.attention_mask is not None
    width = batch.input_ids.shape[1]
    rows = []
    lengths = batch.attention_mask.sum(1).tolist()
    for ids, positions, length in zip(batch.input_ids, batch.position_ids, lengths, strict=True):
        read = {"input_ids": ids[None, :length], "position_ids": positions[None, :length], "use_cache": False}
        hidden = backbone(lm)(**read).last_hidden_state[0]
        rows.append(nn.functional.pad(hidden, (0, 0, 0, width - length)))
    return torch.cat(rows)


def backbone(lm: PreTrainedModel) -> nn.Module:
    """What a causal LM has under its head.

    Raises:
        UserError: it cannot be told.
    """
    if lm.base_model is not lm:
        return lm.base_model
    # The attribute goes by another name than the class says (Llama 4).
    inner = [child for child in lm.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise UserError(f"model '{lm.config.name_or_path or type(lm).__name__}': no decoder is found under its LM head")
    return inner[0]


def _require_tried(lm: PreTrainedModel, batch: PackedBatch) -> None:
    tried: Tried | None = getattr(lm, "sepo_tried", None)
    layout = "unbatched" if batch.unbatched else "padded" if batch.layout is None else "packed"
    if tried is None or layout not in tried.limits:
        return
    document, row = tried.limits[layout]
    if batch.longest > document or (layout == "packed" and batch.num_tokens > row):
        raise UserError(
            f"a {layout} batch of {batch.num_tokens} tokens (the longest text has {batch.longest}) is longer than what "
            "the model was tried with: pass longest and tokens_per_row to prepare_model"
        )


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
