"""`PreferenceTrainer` and `PreferenceConfig`: a `transformers.Trainer` over packed pairs.

A batch is a number of pairs. The trainer packs them into rows of a fixed token budget and accumulates the gradients of
the rows. The token budget sets the memory, the batch size sets the statistics, and the two are independent: the loss is
the exact mean over the pairs of an update, whatever the rows, micro-batches and processes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from sepo import processes
from sepo.data.loading import require_dataset
from sepo.data.tables import PAIR_WEIGHT, provenance_of, require_table
from sepo.errors import UserError, check_number, named_error, wrong_type
from sepo.files import expand_home
from sepo.forward.logps import segment_sums, segment_weights, token_logps
from sepo.forward.memory import keep_freed_memory
from sepo.forward.packing import PackedBatch, Pair
from sepo.forward.prepare import prepare_model, training_layout, training_noise
from sepo.forward.scoring import dataset_logps, numerics, require_readable, tokens_per_row_for
from sepo.kernels.gradients import gradients_in_place, may_accumulate_in_place
from sepo.models.adapters import causal_lm, with_adapter
from sepo.models.sharding import gather_by_block, sharded_twin
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.objectives import OBJECTIVES, check_objective
from sepo.training.batches import (
    PairCollator,
    PairDataset,
    PairSampler,
    require_every_reward,
    require_means,
    require_pair_weights,
    reweighted,
    whole_responses,
    with_baselines,
)
from sepo.training.dropout import (
    adapter_modules,
    as_configured,
    disable_dropout,
    eval_only_modules,
    train_without_dropout,
)
from sepo.training.logs import reporters
from sepo.training.objectives import (
    LossSettings,
    PairSums,
    accuracy,
    below_mean_probability,
    guided_weights,
    opd,
    opd_beta,
    pair_losses,
    selective_marks,
    tbpo,
)


def use_one_device(args: TrainingArguments) -> None:
    """One process drives one device.

    By default Trainer wraps the model for all visible GPUs (nn.DataParallel), multiplies the batch by their number, and
    fails on packed rows.
    """
    _ = args.device  # sets _n_gpu
    args._n_gpu = min(args._n_gpu, 1)


# Fields of TrainingArguments that a training on packed pairs does not support, or that change nothing there.
WITHOUT_EFFECT: dict[str, str] = {
    "label_smoothing_factor": "it applies to cross entropy; the objectives have label_smoothing",
    "neftune_noise_alpha": "with noise, the policy would differ from its own reference before training",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "gradients are accumulated in place, which a compiled backward pass does not trace",
    ),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "it would replace the fused kernels of packed rows"),
    "include_num_input_tokens_seen": "target_tokens and read_tokens count the tokens of a training",
    "dataloader_drop_last": "every pair of an epoch is trained on",
    "torch_empty_cache_steps": "rows of one size leave nothing to empty",
    "parallelism_config": "processes share a model through fsdp or deepspeed",
}


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of a `PreferenceTrainer`: all of `transformers.TrainingArguments`, and these.

    Args:
        objective: name of a loss in `sepo.training.objectives` (docs/objectives.md). "sepo" and "tis_dpo" train on the
            tokens of a selection table; "tgdpo", "wspo" and "opd" need one with credit "reward" and every token;
            the others train on all response tokens of either kind of table.
        beta: KL strength of the objectives with a reference; reward scale of cpo.
        gamma: reward scale of sepo, simpo and confpo.
        margin: target margin of sepo, simpo and confpo.
        alpha: weight of the objective's second term; the default of `sepo.recipe.objectives.OBJECTIVES` if None.
        rate: share of each response's tokens that selective_dpo trains on; the default of the same table if None.
        label_smoothing: probability that a label is flipped, for sepo, simpo, confpo, cpo, dpo, selective_dpo and tbpo.
        tokens_per_row: token budget of a packed row, which bounds the memory of a step; by default it depends on the
            device. `per_device_train_batch_size` counts pairs, which may fill many rows.
        layout: "auto" packs rows if the model gives the same results on them (checked once); "packed" and "padded"
            force a layout.
        max_length, max_prompt_length, as_chat, chat_template_kwargs: used only if the dataset is text; see
            `sepo.data.encoding.tokenize_pairs`.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts, over the tokens of each packed
            row; 0 for none. TRL's default is the value of the model's config.
        weight_column: a dataset's column of weights of the pairs' losses, 0 or more; 1 without it.
    """

    objective: str = field(default="sepo", metadata={"help": ", ".join(OBJECTIVES)})
    beta: float = field(default=0.1, metadata={"help": "KL strength of the objectives with a reference; CPO's scale"})
    gamma: float = field(default=2.0, metadata={"help": "reward scale of SePO, SimPO and ConfPO"})
    margin: float = field(default=0.0, metadata={"help": "target margin of SePO, SimPO and ConfPO"})
    alpha: float | None = field(default=None, metadata={"help": "weight of the objective's second term"})
    rate: float | None = field(default=None, metadata={"help": "share of the tokens that Selective-DPO trains on"})
    label_smoothing: float = field(default=0.0, metadata={"help": "probability of a flipped label, below 0.5"})
    tokens_per_row: int | None = field(default=None, metadata={"help": "token budget of a packed row"})
    layout: str = field(default="auto", metadata={"help": "auto, packed or padded"})
    max_length: int = field(default=2048, metadata={"help": "tokens of prompt and response together"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens of the prompt"})
    as_chat: bool = field(default=False, metadata={"help": "wrap plain-text prompts as one user turn"})
    chat_template_kwargs: dict | None = field(default=None, metadata={"help": "keywords for the chat template"})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "weight of a mixture's load-balancing loss"})
    weight_column: str = field(default=PAIR_WEIGHT, metadata={"help": "a dataset's column with weights of the pairs"})

    def __post_init__(self):
        if self.output_dir is not None:
            self.output_dir = expand_home(self.output_dir, "output_dir")
        self.report_to = reporters(self.report_to or "none")
        super().__post_init__()
        self._check_arguments()
        check_objective(self.objective, self.label_smoothing)
        check_number("beta", self.beta, above=0)
        check_number("gamma", self.gamma, above=0)
        check_number("margin", self.margin, least=0)
        check_number("router_aux_loss_coef", self.router_aux_loss_coef, least=0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, least=0)
        if self.rate is not None:
            check_number("rate", self.rate, above=0, most=1)
        if self.router_aux_loss_coef and OBJECTIVES[self.objective].kl_direction(self.alpha):
            raise UserError(f"router_aux_loss_coef does not go with objective {self.objective}: leave it at 0")
        for name, least in (("tokens_per_row", 1), ("max_length", 2), ("max_prompt_length", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, least=least)
        if self.layout not in ("auto", "packed", "padded"):
            raise UserError(f"layout is '{self.layout}': expected auto, packed or padded")
        # Batches hold pairs, not model inputs, so Trainer must not drop columns by name.
        self.remove_unused_columns = False
        use_one_device(self)

    def _check_arguments(self) -> None:
        """Refuse values of TrainingArguments that would change nothing, or train nothing."""
        for item in fields(TrainingArguments):
            if item.name in WITHOUT_EFFECT and getattr(self, item.name) != item.default:
                raise UserError(f"{item.name} cannot be used here: {WITHOUT_EFFECT[item.name]}; leave it out")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            check_number(name, getattr(self, name), whole=True, least=1)
        check_number("learning_rate", self.learning_rate, least=0)
        check_number("num_train_epochs", self.num_train_epochs, above=0)
        check_number("seed", self.seed, whole=True, least=0, below=2**32)
        if self.max_steps == 0:
            raise UserError("max_steps is 0: expected a number above 0, or -1 for num_train_epochs")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; 0 if warm-up would take the whole training, whose first step has learning rate 0."""
        steps = super().get_warmup_steps(num_training_steps)
        return 0 if steps >= num_training_steps else steps


# The logged metrics, in the order of the running sums.
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class _RunningSums:
    """Sums of METRICS and the number of pairs since the last log, in float64, which some devices (MPS) do not have.

    Each batch's sums wait on the device, so that no batch waits for a copy to the host.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(len(METRICS) + 1)
        self._waiting: list[Tensor] = []

    def add(self, sums: Tensor) -> None:
        """Add `[len(METRICS) + 1]` sums of one batch."""
        self._waiting.append(sums)
        if len(self._waiting) == 256:
            self.take_in()

    def take_in(self) -> np.ndarray:
        """The sums of all batches."""
        if self._waiting:
            for sums in torch.stack(self._waiting).cpu().numpy():
                self._sums += sums
            self._waiting.clear()
        return self._sums

    def reset(self) -> None:
        self._sums[:] = 0
        self._waiting.clear()


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names the step and the pairs."""


class PreferenceTrainer(Trainer):
    """Train a causal LM (or a PEFT model of one) on preference pairs.

    Args:
        model: the model, or a name that `sepo.models.load_model` takes. Its own dropout is turned off.
        args: a `PreferenceConfig`.
        train_dataset: a table of kind "pairs" (targets: all response tokens) or "selection" (targets: key tokens); or a
            `datasets.Dataset` with prompt, chosen and rejected, which `processing_class` tokenises, or with token ids
            and weights (`sepo.training.columns`).
        eval_dataset: the same, optional; or several by name, whose metrics are `eval_NAME_loss` and so on.
        reference_logps: a table of kind "logps" for the rows of `train_dataset`, for the objectives with a reference.
            Used as given. If None, computed once before training from the initial model.
        eval_reference_logps: the same for `eval_dataset`; of several datasets by the same names.
        processing_class: the tokenizer; by default that of the model's name, if a dataset is text.
        peft_config: train a new adapter of this kind (`peft.LoraConfig(...)`) instead of all weights.
        reference_is_start: `reference_logps` are those of the initial model: refused if they are another model's, or
            were computed in other types than the training's.

    Example:
        >>> config = PreferenceConfig("oracle", objective="dpo")
        >>> trainer = PreferenceTrainer("Qwen/Qwen3-0.6B", config, train_dataset=dataset)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    args: PreferenceConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        args: PreferenceConfig | None = None,
        train_dataset: pa.Table | datasets.Dataset | None = None,
        eval_dataset: pa.Table | datasets.Dataset | Mapping[str, pa.Table | datasets.Dataset] | None = None,
        reference_logps: pa.Table | None = None,
        eval_reference_logps: pa.Table | Mapping[str, pa.Table] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
        reference_is_start: bool = False,
    ):
        args = args or PreferenceConfig("preference_trainer")
        _check_types(args, processing_class, callbacks, peft_config)
        if isinstance(model, str | os.PathLike):
            processing_class = processing_class or load_tokenizer(model)
        model = _loaded(model, peft_config, args.seed)
        if train_dataset is not None:
            _check_trained(model)
        if processing_class is None and any(map(_is_text, (train_dataset, *_sets(eval_dataset)))):
            processing_class = _tokenizer_of(model)
        if args.device.type == "cuda" and not _has_device_placement(model):
            model = model.to(args.device)  # prepare_model tests it on the device of the training
        self.tokens_per_row = args.tokens_per_row or tokens_per_row_for(args.device)
        layout = prepare_model(model, args.layout, longest=0, tokens_per_row=0, device=args.device)
        if not processes.sharding():
            training_layout(model, layout, args.layout, _autocast(args))
        # True: the reference log-probabilities must be those of the initial model.
        self.reference_is_start = reference_logps is None or reference_is_start
        train = self._dataset(
            model, args, train_dataset, reference_logps, processing_class, "train", self.reference_is_start
        )
        evaluation = self._evaluation(model, args, eval_dataset, eval_reference_logps, processing_class)
        longest = max(data.pairs.longest if data is not None else 0 for data in (train, *_sets(evaluation)))
        layout = prepare_model(
            model, args.layout, longest=longest, tokens_per_row=self.tokens_per_row, device=args.device
        )
        self._set_up_model(model, args)
        self._metrics = {mode: _RunningSums() for mode in ("train", "eval")}
        self._update_pairs: list[int] = []  # pair ids of the current update, to name the pair of a bad gradient
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(layout, self.tokens_per_row),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_up_zero_3(model)
        # Losses are already means over pairs: Trainer must not divide them by the accumulation steps.
        self.loss_is_scaled_for_ga = True

    def _set_up_model(self, model: nn.Module, args: PreferenceConfig) -> None:
        """Turn off dropout, copy the reference of a KL, and let the model read packed rows."""
        if args.device.type == "cpu":
            keep_freed_memory()
        self._start_checked = False
        self._turn_off_dropout(model)
        # The KL needs every logit of the reference, which cannot be stored: a frozen copy of the model computes them.
        self.kl_direction = OBJECTIVES[args.objective].kl_direction(args.alpha)
        if args.router_aux_loss_coef:
            from sepo.forward.routers import check_routers

            check_routers(causal_lm(model).config, str(causal_lm(model).config.name_or_path))
        self.kl_reference = _frozen_copy(model, args.device) if self.kl_direction else None
        _bind_packed_forward(model)

    def _turn_off_dropout(self, model: nn.Module) -> None:
        """Turn off the model's own dropout, and check that no other randomness is left."""
        self._disabled_dropout = disable_dropout(model)
        self._eval_only = eval_only_modules(model)
        adapters = adapter_modules(model)
        self._adapters_have_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in adapters)
        _require_deterministic(model, [*self._eval_only, *adapters])

    def _set_up_zero_3(self, model: nn.Module) -> None:
        """Under ZeRO-3: gather the weights of a block together, and gather the whole model when saving."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return
        gather_by_block(causal_lm(model))
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True

    @classmethod
    def _evaluation(cls, model, args, data, reference_logps, tokenizer) -> Any:
        """The evaluation pairs; several sets by name."""
        if not isinstance(data, Mapping):
            return cls._dataset(model, args, data, reference_logps, tokenizer, "eval")
        if not isinstance(reference_logps, Mapping | None):
            raise wrong_type("eval_reference_logps", reference_logps, "tables by the names of eval_dataset")
        logps = reference_logps or {}
        return {
            name: cls._dataset(model, args, part, logps.get(name), tokenizer, "eval") for name, part in data.items()
        }

    @staticmethod
    def _dataset(model, args, data, reference_logps, tokenizer, part: str, is_start=False) -> PairDataset | None:
        """Pairs and reference log-probabilities of `train_dataset` ("train" as `part`) or `eval_dataset` ("eval")."""
        if data is None:
            return None
        if not isinstance(data, pa.Table):
            from sepo.training.columns import check_tokens, table_of

            data = require_dataset(f"{part}_dataset", data)
            check_tokens(f"{part}_dataset", data, tokenizer)
            data = table_of(f"{part}_dataset", data, args, lambda: tokenizer or _tokenizer_of(model))
        objective = OBJECTIVES[args.objective]
        # A table of scores has the columns of pairs as well, but training on key tokens needs a selection.
        kinds = ("selection",) if "chosen_rewards" in data.column_names and objective.reads_selection else ("pairs",)
        data = require_table(f"{part}_dataset", data, *kinds)
        if not len(data):
            raise UserError(f"{part}_dataset holds no pair: expected at least one")
        require_readable(model, data)
        require_pair_weights(f"{part}_dataset", data)
        if not objective.reads_selection:
            data = whole_responses(data)
        if args.objective == "sepo":
            require_means(f"{part}_dataset", data)
        if objective.reads_token_rewards:
            require_every_reward(f"{part}_dataset", data, args.objective)
        if not objective.reads_reference:
            return PairDataset(data)
        if reference_logps is not None:
            require_table("reference_logps" if part == "train" else "eval_reference_logps", reference_logps, "logps")
        if reference_logps is None:
            reference_logps = _logps_of_start(args, model, data)
        elif difference := _difference_of_numerics(args, model, reference_logps):
            if is_start:
                raise UserError(f"reference_logps were computed in {difference}: compute them in the training's types")
            processes.log(
                f"reference_logps were computed in {difference}: they are used as they are, but sums over a "
                "response may differ by about a nat from the policy's; without reference_logps the initial model "
                "gives them in the types of the training"
            )
        if args.objective == "tgdpo":
            alpha = objective.alpha_or_default(args.alpha)
            data = reweighted(data, lambda rewards, sign: guided_weights(rewards, sign, alpha, args.beta))
        if objective.baselines:
            scale = args.beta
            if args.objective == "opd":  # log start + λ s
                scale = opd_beta(objective.alpha_or_default(args.alpha))
            data = with_baselines(data, reference_logps, scale, objective.targets == "matched")
            return PairDataset(data, reference_logps, baselines=True)
        return PairDataset(data, reference_logps)

    # --- the loss ---------------------------------------------------------------------------------------------------

    def _losses(self, model: nn.Module, batch: PackedBatch, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and implicit rewards (chosen, rejected), each `[pairs]`."""
        args, objective = self.args, OBJECTIVES[self.args.objective]
        token_kls = baselines = balance = None
        if args.router_aux_loss_coef:
            logps, balance = model(packed_batch=batch, with_routers=True)
        elif self.kl_reference is None:
            logps = model(packed_batch=batch)
        else:
            logps, token_kls = model(packed_batch=batch, kl_reference=self.kl_reference, kl_direction=self.kl_direction)
        if objective.baselines:  # they are in the place of the weights
            baselines, batch = batch.weights, replace(batch, weights=torch.ones_like(batch.weights))
        if objective.targets == "marked":
            marks = self._marked(logps, baselines, batch)
            batch = replace(batch, weights=marks.to(batch.weights.dtype))
        if baselines is not None and not objective.reads_token_rewards:  # they are the reference's log-probabilities
            reference = torch.stack(segment_sums(baselines, batch, weighted=True))
        sums = PairSums(
            segment_sums(logps, batch, weighted=True),
            segment_weights(batch),
            None if reference is None else (reference[0], reference[1]),
            None if token_kls is None else segment_sums(token_kls, batch, weighted=True),
        )
        if args.objective == "wspo":
            sums.chosen_errors = segment_sums((args.beta * (logps - baselines)) ** 2, batch)[0]
        alpha = objective.alpha_or_default(args.alpha)
        if args.objective == "tbpo":
            advantages = logps - baselines + token_kls
            sums.matched = tbpo(advantages, batch.segments, batch.num_pairs, args.beta, alpha, args.label_smoothing)
        if args.objective == "opd":
            assert baselines is not None
            sums.distilled = opd(logps, baselines, sums.of_reference(), batch.segments)
        if reference is not None and model.training and self.state.global_step == 0 and not self._start_checked:
            self._check_start(sums, batch)
        settings = LossSettings(args.beta, args.gamma, args.margin, alpha, args.label_smoothing)
        losses, chosen, rejected = pair_losses(args.objective, sums, settings)
        losses = losses * batch.pair_weights
        # The same for every pair of the row, so an update adds the mean over its pairs.
        return losses if balance is None else losses + args.router_aux_loss_coef * balance, chosen, rejected

    def _marked(self, logps: Tensor, baselines: Tensor | None, batch: PackedBatch) -> Tensor:
        """The tokens that the policy marks in this step: `[targets]` bool."""
        if baselines is None:
            return below_mean_probability(logps, batch.segments, 2 * batch.num_pairs)
        rate = OBJECTIVES[self.args.objective].rate if self.args.rate is None else self.args.rate
        assert rate is not None
        return selective_marks(logps, baselines, batch.segments, 2 * batch.num_pairs, rate)

    def _check_start(self, sums: PairSums, batch: PackedBatch) -> None:
        """Check that policy and reference are equal before the first update: log-ratios are 0, and DPO's loss is ln 2.

        Runs once, on the first row. It finds a reference from another model or in another dtype, and active dropout.
        """
        self._start_checked = True
        if self._adapters_have_dropout:  # a setting of the user
            return
        with torch.no_grad():
            difference = (torch.stack(sums.policy) - torch.stack(sums.of_reference())).abs().max().item()
            # Weights may be negative (rewards), and 0 has no difference.
            sizes = replace(batch, weights=batch.weights.abs())
            largest = torch.stack(segment_weights(sizes)).max().item()
            scale = sizes.weights.max().item() or 1.0
        # Rounding errors add up like a random walk: about 1e-6 nats a token in float32, 0.06 in bfloat16.
        allowed = (0.25 if self.args.bf16 or self.args.fp16 else 1e-3) * scale * math.sqrt(largest / scale + 1)
        if difference <= allowed:
            return
        text = f"before training, the policy's log-probability of a response differs by {difference:.3g} nats from the "
        if self.reference_is_start:
            raise UserError(f"{text}reference's: the reference is another model, or the policy has active dropout")
        processes.log(f"{text}reference's: the reference is another model than the policy")

    def _batch_loss(self, model: nn.Module, batch: PackedBatch, reference: Tensor | None, mode: str) -> Tensor:
        """Losses of the pairs of one packed batch. Adds its metrics to the running sums of `mode` unless that is ""."""
        with self.compute_loss_context_manager():
            losses, chosen, rejected = self._losses(model, batch, reference)
        if mode:
            with torch.no_grad():
                values = (losses, chosen, rejected, chosen - rejected, accuracy(chosen, rejected))
                number = losses.new_tensor(len(losses))
                self._metrics[mode].add(torch.stack([*(value.sum() for value in values), number]))
        return losses

    def _require_finite(self, losses: list[Tensor], pair_ids: list[int]) -> None:
        """Raise an error that names the pair if a loss is not finite. Waits for the GPU: call it once for many rows."""
        if not losses:
            return
        finite = torch.isfinite(torch.cat(losses))
        if not finite.all():
            bad = [pair_ids[i] for i in (~finite).nonzero()[:, 0].tolist()]
            raise NonFiniteLossError(
                f"the loss of pair {bad[0]} (of {len(bad)} pairs) is not finite at step {self.state.global_step}; "
                "lower learning_rate or continue from the last checkpoint"
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """Forward and backward over the packed rows of one batch; returns their share of the update's mean loss."""
        train_without_dropout(model, self._eval_only)
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have a training mode
            self.optimizer.train()  # type: ignore[union-attr]
        pairs_in_update = float(num_items_in_batch or inputs["num_pairs"])
        with gradients_in_place(self._in_place(model)):
            return self._accumulate_rows(model, inputs, pairs_in_update)

    def _in_place(self, model: nn.Module) -> bool:
        return not self.is_fsdp_enabled and not self.is_deepspeed_enabled and may_accumulate_in_place(model)

    def _accumulate_rows(self, model: nn.Module, inputs: dict[str, Any], pairs_in_update: float) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        rows = self._rows(inputs)
        all_losses: list[Tensor] = []
        pair_ids: list[int] = []
        for index, (batch, reference, counts) in enumerate(rows):
            # Processes exchange gradients once an update, with the last row.
            with contextlib.nullcontext() if index == len(rows) - 1 else self._hold_gradients(model):
                batch = batch.to(self.args.device)
                reference = reference if reference is None else reference.to(self.args.device)
                losses = self._batch_loss(model, batch, reference, "train" if counts else "")
                loss = losses.sum() * counts
                # Processes average their gradients; the factor world_size turns the average into a sum.
                self.accelerator.backward(loss * (self.args.world_size / pairs_in_update), **self._backward_options)
                total += loss.detach() / pairs_in_update
                all_losses.append(losses.detach())
                pair_ids += batch.pair_ids
        self._require_finite(all_losses, pair_ids)
        self._update_pairs += [pair_id for batch in inputs["batches"] for pair_id in batch.pair_ids]
        return total * self.args.world_size

    def _rows(self, inputs: dict[str, Any]) -> list[tuple[PackedBatch, Tensor | None, bool]]:
        """This rank's packed rows and their reference sums. Every rank gets equally many: FSDP and ZeRO synchronise in
        each forward. The flag is False for a dummy row that only keeps collectives in step.
        """
        rows = [(*row, True) for row in zip(inputs["batches"], inputs["references"], strict=True)]
        if self.args.world_size == 1:
            return rows
        number = torch.tensor([len(rows)], device=self.args.device)
        most = int(self.accelerator.gather(number).max())
        if most > len(rows):
            dummy: dict[str, Any] = self.data_collator([self._shortest])  # type: ignore[list-item]
            rows += [(dummy["batches"][0], dummy["references"][0], False)] * (most - len(rows))
        return rows

    @property
    def _shortest(self) -> tuple[Pair, tuple[float, float] | None]:
        dataset: Any = self.train_dataset if self.train_dataset is not None else _sets(self.eval_dataset)[0]
        return dataset[dataset.shortest]

    @contextlib.contextmanager
    def _hold_gradients(self, model: nn.Module) -> Iterator[None]:
        """Inside this context, gradients accumulate on this rank without communication.

        Not under FSDP: each rank would hold whole gradients, 52 GB for 13 billion weights, until the last row. There
        every row's gradients are reduced, and their shards accumulate.
        """
        if self.is_fsdp_enabled:
            yield
            return
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            with self.accelerator.no_sync(model):
                yield
            return
        # DeepSpeed takes an optimizer step after each backward pass unless gradient synchronisation is off.
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    @property
    def _backward_options(self) -> dict[str, bool]:
        # Without this, DeepSpeed divides by the accumulation steps.
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Raise an error that names the pair before the optimizer step if a gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        pair_ids, self._update_pairs = self._update_pairs, []
        # The gradient scaler of fp16 skips such steps.
        if norm is None or getattr(self.accelerator, "scaler", None) is not None:
            return norm
        if not math.isfinite(float(norm)):
            raise NonFiniteLossError(
                f"the gradient of {self._pair_of_bad_gradient(pair_ids)} is not finite at step "
                f"{self.state.global_step}; lower learning_rate or continue from the last checkpoint"
            )
        return norm

    def _pair_of_bad_gradient(self, pair_ids: list[int]) -> str:
        """Compute the gradient of each pair of the update by itself, and name the first that is not finite."""
        any_of_them = f"one of the pairs {', '.join(map(str, pair_ids))}"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # one rank alone cannot run a backward pass there
            return any_of_them
        model = self.accelerator.unwrap_model(self.model)
        dataset: Any = self.train_dataset
        index_of = {pair.pair_id: index for index, pair in enumerate(dataset.pairs)}
        for pair_id in pair_ids:
            inputs: dict[str, Any] = self.data_collator([dataset[index_of[pair_id]]])
            model.zero_grad()
            for batch, reference in zip(inputs["batches"], inputs["references"], strict=True):
                reference = reference if reference is None else reference.to(self.args.device)
                self._batch_loss(model, batch.to(self.args.device), reference, "").sum().backward()
            if not all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None):
                return f"pair {pair_id}"
        return any_of_them

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Number of pairs in one update, over accumulation steps and processes."""
        pairs = torch.tensor(float(sum(batch["num_pairs"] for batch in batch_samples)), device=device)
        return self.accelerator.gather(pairs[None]).sum() if self.args.world_size > 1 else pairs

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # The sampler reads the epoch itself: after a resume, the loader that skips batches does not set it.
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return PairSampler(
            len(dataset),
            self.args.train_batch_size * self.args.world_size,
            seed,
            lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset):
        return PairSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size, None)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.as_configured():
            super()._save(output_dir, state_dict)
        # Transformers pickles its arguments beside the weights; nothing reads them.
        Path(output_dir or str(self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def as_configured(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context, the model's config has its original dropout values, for saving."""
        return as_configured(self._disabled_dropout)

    def _prepare_inputs(self, inputs):
        return inputs  # each row moves to the device when its turn comes

    def floating_point_ops(self, inputs) -> int:
        """Matmul FLOPs of a step: 6 for each token and each parameter outside the embeddings."""
        tokens = sum(batch.num_tokens for batch in inputs["batches"])
        return 6 * tokens * _matmul_parameters(self.accelerator.unwrap_model(self.model))

    # --- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss, implicit rewards and accuracy over the evaluation pairs; of several sets under their names."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is not None and not isinstance(dataset, PairDataset):
            if OBJECTIVES[self.args.objective].reads_reference:
                # The reference's log-probabilities come from the initial model, which training has changed.
                raise UserError(
                    f"evaluating {self.args.objective} needs the reference: pass eval_dataset to PreferenceTrainer(...)"
                )
            dataset = self._dataset(self.model, self.args, dataset, None, self.processing_class, "eval")
        loader = self.get_eval_dataloader(dataset)
        model = self.model_wrapped
        training = model.training
        model.eval()
        self._metrics["eval"].reset()
        all_losses: list[Tensor] = []
        pair_ids: list[int] = []
        with torch.no_grad():
            for inputs in loader:
                for batch, reference, counts in self._rows(inputs):
                    reference = reference if reference is None else reference.to(self.args.device)
                    batch = batch.to(self.args.device)
                    all_losses.append(self._batch_loss(model, batch, reference, "eval" if counts else ""))
                    pair_ids += batch.pair_ids
        self._require_finite(all_losses, pair_ids)
        model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._take("eval").items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean rewards and accuracy since the last log beside Trainer's own values, as TRL does."""
        if "loss" in logs:
            logs = {**self._take("train"), **logs}
        super().log(logs, start_time)

    def _take(self, mode: str) -> dict[str, float]:
        """Return the means of the running metrics over all processes and reset them. A collective call."""
        sums = self._metrics[mode].take_in()
        if self.args.world_size > 1:
            # Every process gets the same numbers, even if it had no pair since the last log.
            sums = self.accelerator.reduce(torch.from_numpy(sums).to(self.args.device), "sum")
        *totals, count = sums.tolist()
        self._metrics[mode].reset()
        return {name: total / max(count, 1) for name, total in zip(METRICS, totals, strict=True)} if count else {}


def _sets(evaluation: Any) -> list[Any]:
    """The evaluation sets: one, several by name, or None."""
    return list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation]


def _check_types(args: object, processing_class: object, callbacks: object, peft_config: object) -> None:
    if not isinstance(args, PreferenceConfig):
        raise wrong_type("args", args, "a PreferenceConfig, which takes all of TrainingArguments")
    if not hasattr(processing_class, "get_vocab") and processing_class is not None:
        raise wrong_type("processing_class", processing_class, "a tokenizer in memory (load_tokenizer gives one)")
    if not isinstance(callbacks, list | None):
        raise wrong_type("callbacks", callbacks, "a list of TrainerCallback")
    if not isinstance(peft_config, PeftConfig | None):
        raise wrong_type("peft_config", peft_config, "a configuration of PEFT, such as peft.LoraConfig(r=16)")
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError("peft_config adds virtual tokens, which packed rows cannot hold: use peft.LoraConfig(...)")


def _loaded(model: Any, peft_config: PeftConfig | None, seed: int) -> nn.Module:
    """The model of a name, or the given one, with a new adapter if there is a config for it."""
    if isinstance(model, str | os.PathLike):
        model = load_model(model, train=True)
    if not isinstance(model, nn.Module):
        raise wrong_type("model", model, "a name, a folder or a causal language model in memory")
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise UserError("the model has an adapter already: leave peft_config out, or merge the adapter first")
    try:
        return with_adapter(causal_lm(model), peft_config, seed)
    except UserError:
        raise
    except Exception as error:  # PEFT raises exceptions of any kind
        raise UserError(f"peft_config does not fit the model ({named_error(error)})") from error


def _check_trained(model: nn.Module) -> None:
    """Refuse a model of which nothing is trained, and log if updates may round to nothing."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if not types:
        raise UserError(
            "no weight of the model requires a gradient: load a model with train=True, an adapter with "
            "is_trainable=True, or pass peft_config"
        )
    if low := types & {torch.bfloat16, torch.float16}:
        processes.log_once(
            f"the weights that are trained are {str(min(low, key=str)).removeprefix('torch.')}, in which small updates "
            "round to nothing: load the model with dtype=torch.float32; bf16=True then gives mixed precision"
        )


def _is_text(data: Any) -> bool:
    """Must a tokenizer read this dataset?"""
    if not isinstance(data, datasets.Dataset):
        return False
    from sepo.training.columns import is_text

    return is_text(data)


def _tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights that a model in memory was loaded from."""
    name = causal_lm(model).config.name_or_path
    how = "pass processing_class, such as sepo.models.load_tokenizer(NAME)"
    if not name:
        raise UserError(f"a dataset of text needs a tokenizer, and the model has no name to find one by: {how}")
    try:
        return load_tokenizer(name)
    except UserError as error:
        raise UserError(f"a dataset of text needs a tokenizer, and '{name}' has none ({error}): {how}") from None


def _has_device_placement(model: nn.Module) -> bool:
    """Whether something else places the weights on devices: a launcher that shards, a quantised base, a device map."""
    if processes.sharding() or getattr(model, "is_quantized", False):
        return True
    return getattr(model, "hf_device_map", None) is not None


def _frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of the initial model, sharded if the training shards the policy."""
    if processes.read_sharded():
        return sharded_twin(model, device)
    return copy.deepcopy(model).to(device).requires_grad_(False).eval()


def _require_deterministic(model: nn.Module, eval_only: list[nn.Module]) -> None:
    """Raise a UserError if the model's output is random in training mode with `eval_only` in evaluation mode."""
    if _has_device_placement(model):  # `_check_start` finds it at the first step
        return
    noise = training_noise(model, lambda: train_without_dropout(model, eval_only))
    if not noise <= 0.01:
        raise UserError(
            f"model '{causal_lm(model).config.name_or_path}' has randomness in training mode that no known setting "
            f"turns off (log-probabilities differ by {noise:.3g} from evaluation): it cannot be trained on preferences"
        )


def _autocast(args: TrainingArguments) -> torch.autocast:
    """Autocast of the policy's forward; the reference is computed under the same."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype=dtype, enabled=bool(args.fp16 or args.bf16))


def _logps_of_start(args: PreferenceConfig, model: nn.Module, data: pa.Table) -> pa.Table:
    """Log-probabilities under the initial model, in the types of the training."""
    # A policy that the training shards may not fit on one device.
    reference = sharded_twin(model, args.device) if processes.read_sharded() else model.to(args.device)
    with _autocast(args):
        return dataset_logps(reference, data, tokens_per_row=args.tokens_per_row, over_processes=True)


def _difference_of_numerics(args: TrainingArguments, model: nn.Module, logps: pa.Table) -> str:
    """In what other types than the training's stored log-probabilities were computed; "" if in the same, or unknown.

    In bfloat16 the sum over a response differs by about a nat from the same sum in float32, as much as training changes
    it. A reference in another dtype makes the first loss differ from ln 2 and biases all later ones.
    """
    stored = provenance_of(logps)
    if "dtype" not in stored:  # the user made this table
        return ""
    autocast = _autocast(args)
    low = str(autocast.fast_dtype).removeprefix("torch.") if args.bf16 or args.fp16 else None
    # Under FSDP the model is still on the CPU.
    here = {"dtype": numerics(model)["dtype"], "device": args.device.type, "autocast": low}
    differing = [name for name, value in here.items() if stored.get(name) != value]
    return ", ".join(f"{name} {stored.get(name)} (the training: {here[name]})" for name in differing)


def _bind_packed_forward(model: nn.Module) -> None:
    """Make `model(packed_batch=...)` return token log-probabilities, with `kl_reference` also the KL to it, and with
    `with_routers` also the load-balancing loss of the row.

    Wrappers (DDP, FSDP, DeepSpeed, autocast) act on the call of the wrapped module, so the packed path must go through
    this call.
    """
    original = model.forward
    if getattr(original, "takes_packed_batches", False):
        return

    def forward(
        self,
        *args,
        packed_batch: PackedBatch | None = None,
        kl_reference=None,
        kl_direction=None,
        with_routers=False,
        **kwargs,
    ):
        if packed_batch is None:
            return original(*args, **kwargs)
        if with_routers:
            routers: list[Tensor] = []
            logps = token_logps(self, packed_batch, routers)
            from sepo.forward.routers import balancing_loss

            return logps, balancing_loss(causal_lm(self), tuple(routers), packed_batch)
        if kl_reference is not None:
            from sepo.forward.token_kl import token_logps_and_kl

            return token_logps_and_kl(self, kl_reference, packed_batch, kl_direction)
        return token_logps(self, packed_batch)

    forward.takes_packed_batches = True  # type: ignore[attr-defined]
    # Generation reads the signature: if `position_ids` were missing there, positions would include the padding.
    parameters = signature(original).parameters.values()
    forward.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter("self", Parameter.POSITIONAL_ONLY), *parameters]
    )
    model.forward = types.MethodType(forward, model)


def _matmul_parameters(model: nn.Module) -> int:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in embeddings)
