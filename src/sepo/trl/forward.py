"""`prompt_once`: TRL's DPOTrainer and CPOTrainer with this package's forward.

TRL reads the prompt of a pair twice, pads a batch to its longest sequence and, without Triton, applies the LM head to
every position. `prompt_once(trainer)` replaces one thing: how the model turns a padded batch into log-probabilities of
its labels. The batch is laid out again as packed rows, in which each prompt stands once, nothing is padded, and the LM
head reads the targets only. TRL's data, losses, metrics, callbacks, PEFT and accelerate stay as they are, and so do the
values of the loss, up to rounding.

In TRL both policy and reference are called as `model(**batch, labels=labels, fused_lm_head=True)` by the DPOTrainer
(`trl.trainer.utils.add_fused_lm_head`). The CPOTrainer has no such head and reads all logits; its
`concatenated_forward` is replaced by one that calls the head.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import UserError, check_number
from sepo.forward.logps import LayoutTrials, target_hidden
from sepo.forward.memory import keep_freed_memory
from sepo.forward.packing import Pair, fill_rows, pack
from sepo.forward.prepare import prepare_model, training_noise
from sepo.forward.scoring import tokens_per_row_for
from sepo.kernels.gradients import gradients_in_place, may_accumulate_in_place
from sepo.kernels.lm_head import LogitTransform, target_logps
from sepo.models.adapters import causal_lm
from sepo.trl.checks import check_trainer, kind_of
from sepo.trl.statistics import TokenStatistics

_IGNORED = -100  # label of a token that is no target
DPO_OUTPUTS = ("entropy", "mean_logits", "is_top1")
CPO_OUTPUTS = ("mean_logits",)


def prompt_once(trainer: Any, tokens_per_row: int | None = None) -> Any:
    """Make a trainer of TRL read each prompt once, without padding.

    Call it after the trainer is made and before `train()`.

    Args:
        trainer: a `trl.DPOTrainer`, or a `trl.experimental.cpo.CPOTrainer` (CPO, SimPO, AlphaPO).
        tokens_per_row: token budget of a packed row; a default for the device if None. The activations of all rows of a
            batch are kept for the backward pass, as in TRL.

    Returns:
        the trainer.

    Raises:
        UserError: another trainer or version of TRL; an option that the packed forward does not support; a model that
            does not take packed rows.

    Example:
        >>> trainer = prompt_once(DPOTrainer(model, args=args, train_dataset=dataset))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    kind = kind_of(trainer)
    if getattr(trainer, "sepo_prompt_once", False):
        return trainer
    if tokens_per_row is not None:
        check_number("tokens_per_row", tokens_per_row, whole=True, least=1)
    check_trainer(trainer, kind)
    budget = tokens_per_row or tokens_per_row_for(trainer.args.device)
    outputs = CPO_OUTPUTS if kind == "cpo" else DPO_OUTPUTS
    if getattr(trainer, "use_weighting", False):
        outputs = (*outputs, "log_sum_sq_probs")
    model = trainer.accelerator.unwrap_model(trainer.model)
    longest = trainer.args.max_length
    _replace_forward(model, budget, longest, outputs, trainer.accelerator)
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        _replace_forward(trainer.accelerator.unwrap_model(reference), budget, longest, (), trainer.accelerator)
    if training_noise(model) > _NOISE:
        raise UserError(
            "the model has dropout or other randomness in training mode that disable_dropout leaves: set it to 0 in "
            "the model's config"
        )
    if kind == "cpo":
        trainer.concatenated_forward = types.MethodType(_cpo_forward, trainer)
    trainer.training_step = types.MethodType(_in_place_step(trainer.training_step, model), trainer)
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    trainer.sepo_prompt_once = True
    return trainer


_NOISE = 0.01  # nats


def _in_place_step(step: Any, model: nn.Module) -> Any:
    """The trainer's step, in which matmuls add to the gradients of large weights directly."""

    @functools.wraps(step)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with gradients_in_place(may_accumulate_in_place(model)):
            return step(*args, **kwargs)

    return training_step


# --- the forward ----------------------------------------------------------------------------------------------------


def _replace_forward(
    model: nn.Module, budget: int, longest: int | None, outputs: Sequence[str], accelerator: Any
) -> None:
    """Replace what `model(..., fused_lm_head=True)` computes; every other call stays."""
    lm = causal_lm(model)
    _require_packed(model, longest, budget)
    original = lm.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        batch = padded_sequences(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
        if not batch.sequences:  # TRL returns zeros that stay connected to the model
            return original(*args, fused_lm_head=True, **kwargs)
        _try_length(model, batch.width, budget)
        with accelerator.autocast():
            return _fused_output(self, batch, budget, outputs)

    lm.forward = types.MethodType(forward, lm)


def _require_packed(model: nn.Module, longest: int | None, budget: int) -> None:
    """Prepare a model; raise a UserError unless it takes packed rows."""
    if prepare_model(model, longest=longest, tokens_per_row=budget) != "packed":
        name = causal_lm(model).config.name_or_path or type(causal_lm(model)).__name__
        raise UserError(
            f"model '{name}' does not take packed rows (the line above says why), so a prompt cannot be read once: "
            "leave prompt_once out"
        )


def _try_length(model: nn.Module, longest: int, budget: int) -> None:
    """Try the layout again if a batch is longer than what was tried, and the model may change at that length."""
    trials: LayoutTrials = causal_lm(model).sepo_trials  # type: ignore[assignment]
    limits = trials.limits.values()
    if any(longest > limit for limit, _ in limits):
        _require_packed(model, longest, budget)


class Tokens(NamedTuple):
    """One row of a padded batch: its number, its tokens split before the first target, and its targets."""

    row: int
    prompt: np.ndarray
    response: np.ndarray
    positions: np.ndarray


class PaddedBatch(NamedTuple):
    """A padded batch of TRL on the host."""

    sequences: list[Tokens]
    rows: int
    width: int


def padded_sequences(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PaddedBatch:
    """Read the sequences of a padded batch, `[rows, T]` each; a row without a target is left out.

    Raises:
        UserError: a row is padded on the left, or within.
    """
    ids, mask, targets = (tensor.cpu().numpy() for tensor in (input_ids, attention_mask, labels))
    sizes = mask.sum(1)
    if not np.array_equal(mask != 0, np.arange(mask.shape[1]) < sizes[:, None]):
        raise UserError("the data collator pads on the left: prompt_once reads batches that are padded on the right")
    sequences = []
    for row, size in enumerate(sizes.tolist()):
        places = np.flatnonzero(targets[row, 1:size] != _IGNORED) + 1  # nothing predicts the first token
        if len(places):
            first = int(places[0])
            last = int(places[-1]) + 1
            sequences.append(Tokens(row, ids[row, :first], ids[row, first:last], places))
    return PaddedBatch(sequences, *ids.shape)


def _fused_output(lm: PreTrainedModel, batch: PaddedBatch, budget: int, outputs: Sequence[str]) -> Any:
    """What TRL's fused head returns: fields of shape `[rows, T - 1]`, 0 where there is no target."""
    from trl.trainer.utils import FusedCausalLMOutput

    device = next(lm.get_input_embeddings().parameters()).device
    pairs = [
        Pair(number, item.prompt, item.response, item.response[:1], item.positions - len(item.prompt), ())
        for number, item in enumerate(batch.sequences)
    ]
    hidden, ids, places = [], [], []
    for row in fill_rows(pairs, budget):
        packed = pack(row).to(device)
        hidden.append(target_hidden(lm, packed))
        ids.append(packed.target_ids)
        for pair in row:
            item = batch.sequences[pair.pair_id]
            places.append(item.row * (batch.width - 1) + item.positions - 1)
    states, target_ids = torch.cat(hidden), torch.cat(ids)
    where = torch.from_numpy(np.concatenate(places)).to(device)
    head, transform = lm.get_output_embeddings(), LogitTransform.from_config(lm.config)
    statistics = TokenStatistics(target_ids, outputs) if outputs and not _without_adapter(lm) else None
    fields = {"log_probs": target_logps(states, head, target_ids, transform, statistics)}
    if statistics is not None:
        fields |= statistics.values()

    def spread(values: Tensor) -> Tensor:
        flat = values.new_zeros(batch.rows * (batch.width - 1))
        return flat.index_put((where,), values).view(batch.rows, batch.width - 1)

    return FusedCausalLMOutput(**{name: spread(values) for name, values in fields.items()})


def _without_adapter(lm: PreTrainedModel) -> bool:
    """Whether an adapter is disabled: the model is the reference, of which only log-probabilities are read."""
    return any(getattr(module, "disable_adapters", False) is True for module in lm.modules())


def _cpo_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """`CPOTrainer.concatenated_forward` without logits: see there.

    Returns:
        log-probabilities of the chosen and the rejected responses (means for ipo and simpo, else sums), mean logits of
        their tokens, and the negative log-likelihood of the chosen tokens, 0 if `cpo_alpha` is 0.
    """
    joined = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
    labels = joined["concatenated_labels"]
    outputs = model(
        input_ids=joined["concatenated_input_ids"],
        attention_mask=joined["concatenated_attention_mask"],
        labels=labels,
        fused_lm_head=True,
    )
    number = batch["chosen_labels"].shape[0]
    mask = labels[:, 1:] != _IGNORED
    logps = outputs.log_probs.sum(1)
    if self.loss_type in ("ipo", "simpo"):
        logps = logps / mask.sum(1)
    nll = logps.new_zeros(())
    if self.cpo_alpha != 0:
        nll = -outputs.log_probs[:number].sum() / mask[:number].sum()
    chosen, rejected = (outputs.mean_logits[part][mask[part]] for part in (slice(number), slice(number, None)))
    return logps[:number], logps[number:], chosen, rejected, nll
