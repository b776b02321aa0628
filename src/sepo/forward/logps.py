"""The one forward path: log-probabilities of target tokens, given packed pairs.

`token_logps` runs the backbone once over a packed row, gathers the hidden states that predict the targets and applies
the LM head to those only. Scoring, DPO and SePO share this forward pass; they differ in the targets they ask for and in
the loss. In the last block the MLP runs only on the rows that predict a target, because nothing reads the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import UserError, wrong_type
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch
from sepo.kernels.lm_head import LogitTransform, target_logps
from sepo.models.adapters import causal_lm
from sepo.models.sharding import inside_call, is_sharded


@dataclass
class LayoutTrials:
    """Results of `prepare_model`'s trials of a model, stored on it as `sepo_trials`.

    Attributes:
        original_attention: the attention implementation that the model was loaded with.
        required: the layout that the user insists on, or "auto".
        packs: True once packed rows of short texts gave the model's log-probabilities: packed attention is installed.
        layouts: the chosen layout of each trial, by (required, tokens of the long text, tokens of the row).
        limits: for each layout the (document, row) lengths up to which the trials hold.
    """

    original_attention: str
    required: str = "auto"
    packs: bool = False
    layouts: dict[tuple[str, int, int], str] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)


def token_logps(model: nn.Module, batch: PackedBatch, routers: list[Tensor] | None = None) -> Tensor:
    """Log-probability of every target of a batch, with gradients if they are enabled.

    Args:
        model: a Transformers causal LM or a PEFT model of one, prepared by `prepare_model`.
        batch: from `packing.pack` (or `packing.pad`), on the model's device. `N` targets.
        routers: takes the logits of each router of a mixture of experts, `[tokens, experts]` for every token.

    Returns:
        `[N]` float32 (float64 for a float64 model), in nats, in the order of `batch.segments`.
    """
    lm = causal_lm(model)
    if not isinstance(batch, PackedBatch):
        raise wrong_type("batch", batch, "a PackedBatch, which pack(pairs) returns")
    targets = target_hidden(lm, batch, routers)
    return target_logps(targets, lm.get_output_embeddings(), batch.target_ids, LogitTransform.from_config(lm.config))


def read_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`token_logps` outside the model's own forward: a sharded model is called, which gathers its weights."""
    return _called(model, partial(token_logps, model, batch))


def read_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`target_hidden` outside the model's own forward, as `read_logps`."""
    return _called(model, partial(target_hidden, causal_lm(model), batch))


def _called(model: nn.Module, read: Callable[[], Tensor]) -> Tensor:
    return inside_call(causal_lm(model), read) if is_sharded(model) else read()


def target_hidden(lm: PreTrainedModel, batch: PackedBatch, routers: list[Tensor] | None = None) -> Tensor:
    """Final hidden states that predict the targets, `[N, hidden]`: the input of the LM head.

    Args:
        routers: as in `token_logps`.

    Raises:
        UserError: the batch is longer than `prepare_model` tried, and the model may treat such lengths differently.
    """
    _check_length(lm, batch)
    if batch.unbatched:
        if routers is not None:
            raise UserError("router_aux_loss_coef needs rows that are read together, which this model cannot do")
        return _unbatched_hidden(lm, batch).index_select(0, batch.target_positions)
    inputs: dict = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.layout is not None:
        inputs["layout"] = batch.layout
        # Transformers passes a 4D mask on without building a [T, T] one; packed attention ignores this dummy.
        inputs["attention_mask"] = batch.input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
    if routers is not None:
        inputs["output_router_logits"] = True
    with rows_only(_prunable_mlp(lm, batch) if routers is None else None, batch.target_rows):
        outputs = backbone(lm)(**inputs)
    if routers is not None:
        routers += outputs.router_logits or ()
    hidden = outputs.last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.target_positions)


def _unbatched_hidden(lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final hidden states of a padded batch, `[rows * T, hidden]`, one forward per row; zeros for the padding."""
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
    """The decoder under a causal LM's head.

    Raises:
        UserError: no decoder, or more than one, is found.
    """
    if lm.base_model is not lm:
        return lm.base_model
    # Llama 4 stores its decoder under another name than `base_model_prefix`.
    inner = [child for child in lm.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise UserError(f"model '{lm.config.name_or_path or type(lm).__name__}': no decoder is found under its LM head")
    return inner[0]


def _check_length(lm: PreTrainedModel, batch: PackedBatch) -> None:
    trials: LayoutTrials | None = getattr(lm, "sepo_trials", None)
    layout = "unbatched" if batch.unbatched else "padded" if batch.layout is None else "packed"
    if trials is None or layout not in trials.limits:
        return
    document, row = trials.limits[layout]
    if batch.longest > document or (layout == "packed" and batch.num_tokens > row):
        raise UserError(
            f"a {layout} batch of {batch.num_tokens} tokens (the longest text has {batch.longest}) is longer than the "
            "model was tried with: pass longest and tokens_per_row to prepare_model"
        )


def _prunable_mlp(lm: PreTrainedModel, batch: PackedBatch) -> nn.Module | None:
    """The last block's MLP, or None where it must compute all rows.

    Activation checkpointing is such a case: it runs the MLP again in the backward pass, after `rows_only` has ended.
    """
    if batch.layout is None or not getattr(lm, "sepo_prunable", False):
        return None
    # Transformers 5.23 renamed its own property for this.
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    return None if checkpointing else last_mlp(lm)


def last_mlp(lm: PreTrainedModel) -> nn.Module | None:
    """The MLP of the last decoder block, or None where the model gives it another name."""
    layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            mlp = getattr(module[-1], "mlp", None)
            return mlp if isinstance(mlp, nn.Module) else None
    return None


@contextlib.contextmanager
def rows_only(mlp: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """Context in which `mlp` computes only the given rows of its `[1, T, hidden]` input and outputs zeros elsewhere.

    Args:
        rows: ascending row indices, `[N]`.
    """
    if mlp is None:
        yield
        return

    length = 0

    def gather(module, inputs):
        nonlocal length
        length = inputs[0].shape[1]
        return inputs[0].index_select(1, rows), *inputs[1:]

    def scatter(module, inputs, output):
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} returns more than its output")
        return output.new_zeros(1, length, output.shape[-1]).index_copy_(1, rows, output)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def segment_sums(logps: Tensor, batch: PackedBatch, weighted: bool = False) -> tuple[Tensor, Tensor]:
    """Sum target log-probabilities by pair and side.

    Returns:
        chosen and rejected sums, each `[B]`; with `weighted`, each target counts by its `batch.weights`.
    """
    values = logps * batch.weights if weighted else logps
    sums = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, values)
    return sums[CHOSEN::2], sums[REJECTED::2]


def segment_weights(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Sum of target weights by pair and side (the number of targets where all weights are 1), each `[B]`."""
    sums = batch.weights.new_zeros(2 * batch.num_pairs).index_add(0, batch.segments, batch.weights)
    return sums[CHOSEN::2], sums[REJECTED::2]
