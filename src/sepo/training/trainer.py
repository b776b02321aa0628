"""`PreferenceTrainer` and `PreferenceConfig`: a `transformers.Trainer` over packed pairs.

A batch is a number of pairs; the trainer lays them out as packed rows of a fixed token budget and accumulates the
gradients of the rows. Memory is set by the token budget, statistics by the batch size, and one does not disturb the
other: the loss is the exact mean over the pairs of an update, however they fall into rows, micro-batches and processes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from inspect import Parameter, Signature, signature
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from sepo import processes
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import require_dataset
from sepo.data.tables import provenance_of, require_table
from sepo.errors import UserError, check_number, wrong_type
from sepo.files import expand_home
from sepo.forward.gradients import gradients_in_place, may_accumulate_in_place
from sepo.forward.logps import segment_sums, segment_weights, token_logps
from sepo.forward.memory import keep_freed_memory
from sepo.forward.packing import PackedBatch, Pair
from sepo.forward.prepare import prepare_model, training_noise
from sepo.forward.scoring import dataset_logps, read_like, require_readable, tokens_per_row_for
from sepo.forward.token_kl import token_logps_and_kl
from sepo.models.adapters import causal_lm
from sepo.models.sharding import gather_by_block, sharded_twin
from sepo.recipe.objectives import OBJECTIVES, check_objective
from sepo.training import objectives
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
from sepo.training.dropout import adapter_modules, as_configured, disable_dropout, noisy_parts, train_quietly
from sepo.training.logs import reporters
from sepo.training.objectives import (
    PairSums,
    below_mean_probability,
    guided_weights,
    pair_losses,
    selective_marks,
)


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of a `PreferenceTrainer`: all of `transformers.TrainingArguments`, and these.

    Args:
        objective: a loss of `sepo.training.objectives` by name (docs/objectives.md). "sepo" and "tis_dpo" train on the
            tokens of a selection table, "tgdpo" and "wspo" on one of credit "reward" with every token, the others on
            all response tokens, whichever kind of table they are given.
        beta: KL strength of the objectives with a reference; reward scale of cpo.
        gamma: reward scale of sepo, simpo and confpo.
        margin: target margin of the same.
        alpha: weight of the objective's second term; the default of `sepo.recipe.objectives.OBJECTIVES` if None.
        rate: share of each response's tokens that selective_dpo trains on; the default of the same table if None.
        label_smoothing: probability that a label is flipped, for sepo, simpo, confpo, cpo, dpo, selective_dpo and tbpo.
        tokens_per_row: token budget of a packed row, which bounds the memory of a step; a default for the device
            when None. `per_device_train_batch_size` counts pairs and may need many rows.
        layout: "auto" packs rows where the model takes them (checked once), "packed" and "padded" insist.
        max_length, max_prompt_length, as_chat, chat_template_kwargs: used only when the trainer is given text to
            tokenise; see `sepo.data.encoding.tokenize_pairs`.
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

    def __post_init__(self):
        if self.output_dir is not None:
            self.output_dir = expand_home(self.output_dir, "output_dir")
        self.report_to = reporters(self.report_to or "none")
        super().__post_init__()
        check_objective(self.objective, self.label_smoothing)
        check_number("beta", self.beta, above=0)
        check_number("gamma", self.gamma, above=0)
        check_number("margin", self.margin, least=0)
        if self.alpha is not None:
            check_number("alpha", self.alpha, least=0)
        if self.rate is not None:
            check_number("rate", self.rate, above=0, most=1)
        for name, least in (("tokens_per_row", 1), ("max_length", 2), ("max_prompt_length", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), whole=True, least=least)
        if self.layout not in ("auto", "packed", "padded"):
            raise UserError(f"layout is '{self.layout}': expected auto, packed or padded")
        # Batches are made of pairs, not of model inputs: nothing may be dropped by column name.
        self.remove_unused_columns = False
        # One process drives one device. Left to itself, Trainer would wrap the model for all visible GPUs
        # (nn.DataParallel), multiply the batch by their number, and fail on packed rows.
        _ = self.device  # counts them
        self._n_gpu = min(self._n_gpu, 1)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; none where they would be all that there are, of which the first has learning rate 0."""
        steps = super().get_warmup_steps(num_training_steps)
        return 0 if steps >= num_training_steps else steps


# What is logged, in the order of the running sums.
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def _no_metrics(device: torch.device) -> Tensor:
    return torch.zeros(len(METRICS) + 1, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names the step and the pairs."""


class PreferenceTrainer(Trainer):
    """Train a causal LM (or a PEFT model of one) on preference pairs.

    Args:
        model: the model, or a name that `sepo.models.load_model` takes. Its own dropout is turned off.
        args: a `PreferenceConfig`.
        train_dataset: a table of kind "pairs" (all response tokens are targets) or "selection" (the key tokens are);
            or a `datasets.Dataset` with prompt, chosen and rejected, tokenised here with `processing_class`.
        eval_dataset: the same, optional.
        reference_logps: a table of kind "logps" for the rows of `train_dataset`, for the objectives with a reference.
            Computed from the model as it is given when None, once, before training.
        eval_reference_logps: likewise for `eval_dataset`.
        processing_class: the tokenizer.

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
        eval_dataset: pa.Table | datasets.Dataset | None = None,
        reference_logps: pa.Table | None = None,
        eval_reference_logps: pa.Table | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = args or PreferenceConfig("preference_trainer")
        if not isinstance(args, PreferenceConfig):
            raise wrong_type("args", args, "a PreferenceConfig, which takes all of TrainingArguments")
        if not hasattr(processing_class, "get_vocab") and processing_class is not None:
            raise wrong_type("processing_class", processing_class, "a tokenizer in memory (load_tokenizer gives one)")
        if not isinstance(callbacks, list | None):
            raise wrong_type("callbacks", callbacks, "a list of TrainerCallback")
        if isinstance(model, str | os.PathLike):
            from sepo.models import load_model, load_tokenizer

            processing_class = processing_class or load_tokenizer(model)
            model = load_model(model, train=True)
        if not isinstance(model, nn.Module):
            raise wrong_type("model", model, "a name, a folder or a causal language model in memory")
        if args.device.type == "cuda" and not _placed_elsewhere(model):
            model = model.to(args.device)  # it is tried out where it will run
        self.tokens_per_row = args.tokens_per_row or tokens_per_row_for(args.device)
        prepare_model(model, args.layout, longest=0, tokens_per_row=0, device=args.device)
        train = self._dataset(model, args, train_dataset, reference_logps, processing_class, "train")
        evaluation = self._dataset(model, args, eval_dataset, eval_reference_logps, processing_class, "eval")
        longest = max(data.pairs.longest if data is not None else 0 for data in (train, evaluation))
        layout = prepare_model(
            model, args.layout, longest=longest, tokens_per_row=self.tokens_per_row, device=args.device
        )
        if args.device.type == "cpu":
            keep_freed_memory()
        # Whether stored log-probabilities of a reference are said to be those of the model as it is given.
        self.reference_is_start = reference_logps is None
        self._start_checked = False
        self._silenced = disable_dropout(model)
        self._noisy_parts = noisy_parts(model)
        adapters = adapter_modules(model)
        self._adapters_draw = any(isinstance(one, nn.Dropout) and one.p > 0 for one in adapters)
        _require_quiet(model, [*self._noisy_parts, *adapters])
        # The KL needs every logit of the reference, which cannot be stored: the model as it is given stays beside.
        self.kl_direction = OBJECTIVES[args.objective].kl_direction(args.alpha)
        self.kl_reference = _frozen_copy(model, args.device) if self.kl_direction else None
        _bind_packed_forward(model)
        # Running sums of METRICS and the number of pairs since the last log, on the device.
        self._metrics = {mode: _no_metrics(args.device) for mode in ("train", "eval")}
        self._update_pairs: list[int] = []  # of the update at hand, to find out whose gradient went wrong
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
        # Reported losses are means over pairs already: Trainer must not divide them by the accumulation steps.
        self.loss_is_scaled_for_ga = True

    def _set_up_zero_3(self, model: nn.Module) -> None:
        """Where DeepSpeed is going to cut up the weights: blocks are gathered whole, and the model is to be saved."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return
        gather_by_block(causal_lm(model))
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True

    @staticmethod
    def _dataset(model, args, data, reference_logps, tokenizer, part: str) -> PairDataset | None:
        """The pairs of `train_dataset` or `eval_dataset`; `part` says which, for messages."""
        if data is None:
            return None
        if not isinstance(data, pa.Table):
            data = require_dataset(f"{part}_dataset", data)
            if tokenizer is None:
                raise UserError("a dataset of text needs processing_class: pass the model's tokenizer")
            data, report = tokenize_pairs(
                data,
                tokenizer,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                as_chat=args.as_chat,
                chat_template_kwargs=args.chat_template_kwargs,
            )
            processes.log(report.summary())
        objective = OBJECTIVES[args.objective]
        # A table of scores has the columns of pairs too, but whoever trains on key tokens has forgotten to select them.
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
        if reference_logps is None or not _same_numerics(args, model, reference_logps):
            # A policy that is going to be cut up may not fit on one device.
            reader = sharded_twin(model, args.device) if processes.read_sharded() else model.to(args.device)
            with _autocast(args):
                reference_logps = dataset_logps(reader, data, tokens_per_row=args.tokens_per_row, over_processes=True)
            del reader
        if args.objective == "tgdpo":
            alpha = objective.alpha_or_default(args.alpha)
            data = reweighted(data, lambda rewards, sign: guided_weights(rewards, sign, alpha, args.beta))
        if objective.baselines:
            measured = with_baselines(data, reference_logps, args.beta, objective.targets == "matched")
            return PairDataset(measured, reference_logps, True)
        return PairDataset(data, reference_logps)

    # --- the loss ---------------------------------------------------------------------------------------------------

    def _losses(self, model: nn.Module, batch: PackedBatch, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and implicit rewards (chosen, rejected), each `[pairs]`."""
        args = self.args
        kls: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if self.kl_reference is None:
            logps = model(packed_batch=batch)
        else:
            logps, token_kls = model(packed_batch=batch, kl_reference=self.kl_reference, kl_direction=self.kl_direction)
            kls = segment_sums(token_kls, batch, weighted=True)
        if args.objective == "confpo":
            marked = below_mean_probability(logps, batch.segments, 2 * batch.num_pairs)
            batch = replace(batch, weights=marked.to(batch.weights.dtype))
        errors = matched = None
        if OBJECTIVES[args.objective].baselines:
            baselines, weights = batch.weights, torch.ones_like(batch.weights)
            if args.objective == "wspo":
                errors = segment_sums((args.beta * (logps - baselines)) ** 2, batch)[0]
            elif args.objective == "tbpo":
                power = OBJECTIVES["tbpo"].alpha_or_default(args.alpha)
                advantages = logps - baselines + token_kls
                matched = objectives.tbpo(
                    advantages, batch.segments, batch.num_pairs, args.beta, power, args.label_smoothing
                )
            else:
                rate = OBJECTIVES[args.objective].rate if args.rate is None else args.rate
                assert rate is not None
                marked = selective_marks(logps, baselines, batch.segments, 2 * batch.num_pairs, rate)
                weights = marked.to(weights.dtype)
            batch = replace(batch, weights=weights)
            if args.objective != "wspo":
                reference = torch.stack(segment_sums(baselines, batch, weighted=True))
        sums = PairSums(
            *segment_sums(logps, batch, weighted=True),
            *segment_weights(batch),
            *((None, None) if reference is None else reference),
            *kls,
        )
        sums.chosen_errors, sums.matched = errors, matched
        if reference is not None and model.training and self.state.global_step == 0 and not self._start_checked:
            self._check_start(sums, batch)
        return pair_losses(
            args.objective,
            sums,
            beta=args.beta,
            gamma=args.gamma,
            margin=args.margin,
            alpha=args.alpha,
            label_smoothing=args.label_smoothing,
        )

    def _check_start(self, sums: PairSums, batch: PackedBatch) -> None:
        """Before any training policy and reference are one model: each log-ratio is zero, and DPO's loss ln 2.

        Asked once, of the first row: it finds a reference that was read in other types or is of another model, and
        noise in training.
        """
        self._start_checked = True
        if self._adapters_draw:  # the user asked for it
            return
        assert sums.reference_chosen is not None
        assert sums.reference_rejected is not None
        with torch.no_grad():
            ratios = torch.stack([sums.chosen - sums.reference_chosen, sums.rejected - sums.reference_rejected])
            ratio = ratios.abs().max().item()
            largest = torch.stack([sums.chosen_counts.max(), sums.rejected_counts.max()]).max().item()
            scale = batch.weights.max().item()
        # Rounding adds up as a random walk does: per token about 1e-6 nats in float32, 0.06 in bfloat16.
        allowed = (0.25 if self.args.bf16 or self.args.fp16 else 1e-3) * scale * math.sqrt(largest / scale + 1)
        if ratio <= allowed:
            return
        text = (
            f"before any training, the log-probability of a response is off by {ratio:.3g} nats from the reference's: "
        )
        if self.reference_is_start:
            raise UserError(f"{text}the model is not what the reference was read from, or draws at random in training")
        processes.log(f"{text}the reference is another model than the one that is trained")

    def _batch_loss(self, model: nn.Module, batch: PackedBatch, reference: Tensor | None, mode: str) -> Tensor:
        """Losses of the pairs of one packed batch; its metrics are added to the running ones of `mode`, if any."""
        with self.compute_loss_context_manager():
            losses, chosen, rejected = self._losses(model, batch, reference)
            losses = losses * batch.pair_weights
        if mode:
            with torch.no_grad():
                values = (losses, chosen, rejected, chosen - rejected, objectives.accuracy(chosen, rejected))
                sums = torch.stack([value.sum() for value in values]).to(self._metrics[mode].dtype)
                self._metrics[mode][:-1] += sums
                self._metrics[mode][-1] += len(losses)
        return losses

    def _require_finite(self, losses: list[Tensor], pair_ids: list[int]) -> None:
        """Name the pairs whose loss is not finite; asked once for many rows, since asking waits for the device."""
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
        """Forward and backward over the packed rows of one batch; returns the mean loss of its pairs (its share)."""
        train_quietly(model, self._noisy_parts)
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
        seen: list[Tensor] = []
        pair_ids: list[int] = []
        for index, (batch, reference, counts) in enumerate(rows):
            # Gradients travel between processes once an update, with the last row.
            with contextlib.nullcontext() if index == len(rows) - 1 else self._hold_gradients(model):
                batch = batch.to(self.args.device)
                reference = reference if reference is None else reference.to(self.args.device)
                losses = self._batch_loss(model, batch, reference, "train" if counts else "")
                loss = losses.sum() * counts
                # Processes average their gradients, so the sum over processes needs their number back.
                self.accelerator.backward(loss * (self.args.world_size / pairs_in_update), **self._backward_options)
                total += loss.detach() / pairs_in_update
                seen.append(losses.detach())
                pair_ids += batch.pair_ids
        self._require_finite(seen, pair_ids)
        self._update_pairs += [pair_id for batch in inputs["batches"] for pair_id in batch.pair_ids]
        return total * self.args.world_size

    def _rows(self, inputs: dict[str, Any]) -> list[tuple[PackedBatch, Tensor | None, bool]]:
        """The packed rows of one batch, as many in every process: some wrappers (FSDP, ZeRO) wait for each other in
        each forward. The last of a row says whether it counts; one that fills up does not.
        """
        rows = [(*row, True) for row in zip(inputs["batches"], inputs["references"], strict=True)]
        if self.args.world_size == 1:
            return rows
        number = torch.tensor([len(rows)], device=self.args.device)
        most = int(self.accelerator.gather(number).max())
        if most > len(rows):
            filler: dict[str, Any] = self.data_collator([self._shortest])  # type: ignore[list-item]
            rows += [(filler["batches"][0], filler["references"][0], False)] * (most - len(rows))
        return rows

    @property
    def _shortest(self) -> tuple[Pair, tuple[float, float] | None]:
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        return dataset[dataset.shortest]

    @contextlib.contextmanager
    def _hold_gradients(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, gradients add up in this process.

        Not where the weights are cut up (FSDP): held back, the gradients of all rows but the last would be whole in
        every process, 52 GB of them for 13 billion weights. There each row is reduced, and shards add up.
        """
        if self.is_fsdp_enabled:
            yield
            return
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            with self.accelerator.no_sync(model):
                yield
            return
        # DeepSpeed takes an optimizer step with each backward pass unless it is told that more will come.
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    @property
    def _backward_options(self) -> dict[str, bool]:
        # DeepSpeed would divide by the accumulation steps once more.
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Stop before the optimizer step if a gradient is not finite; names the pair."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        pair_ids, self._update_pairs = self._update_pairs, []
        # A gradient scaler (fp16) skips such steps itself.
        if norm is None or getattr(self.accelerator, "scaler", None) is not None:
            return norm
        if not math.isfinite(float(norm)):
            raise NonFiniteLossError(
                f"the gradient of {self._pair_of_bad_gradient(pair_ids)} is not finite at step "
                f"{self.state.global_step}; lower learning_rate or continue from the last checkpoint"
            )
        return norm

    def _pair_of_bad_gradient(self, pair_ids: list[int]) -> str:
        """Find the pair whose gradient alone is not finite, by doing the pairs of the update one by one."""
        every = f"one of the pairs {', '.join(map(str, pair_ids))}"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # a process alone cannot do a backward pass there
            return every
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
        return every

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Number of pairs in one update, over accumulation steps and processes."""
        pairs = torch.tensor(float(sum(batch["num_pairs"] for batch in batch_samples)), device=device)
        return self.accelerator.gather(pairs[None]).sum() if self.args.world_size > 1 else pairs

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # The epoch is asked for, not set: a loader that skips the batches before a checkpoint passes no epoch on.
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

    def as_configured(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the model's config says what it said before its noise was turned off, as when it is saved."""
        return as_configured(self._silenced)

    def _prepare_inputs(self, inputs):
        return inputs  # rows move to the device one by one

    def floating_point_ops(self, inputs) -> int:
        """Matmul FLOPs of a step: 6 for each parameter outside the embeddings and each token read."""
        tokens = sum(batch.num_tokens for batch in inputs["batches"])
        return 6 * tokens * _matmul_parameters(self.accelerator.unwrap_model(self.model))

    # --- evaluation and logging -------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss, implicit rewards and accuracy over the evaluation pairs."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is not None and not isinstance(dataset, PairDataset):
            if OBJECTIVES[self.args.objective].reads_reference:
                # Computed now, the reference would be the model as it is after training.
                raise UserError(
                    f"evaluating {self.args.objective} needs the reference: pass eval_dataset when the trainer is made"
                )
            dataset = self._dataset(self.model, self.args, dataset, None, self.processing_class, "eval")
        loader = self.get_eval_dataloader(dataset)
        model = self.model_wrapped
        training = model.training
        model.eval()
        self._metrics["eval"].zero_()
        seen: list[Tensor] = []
        pair_ids: list[int] = []
        with torch.no_grad():
            for inputs in loader:
                for batch, reference, counts in self._rows(inputs):
                    reference = reference if reference is None else reference.to(self.args.device)
                    seen.append(
                        self._batch_loss(model, batch.to(self.args.device), reference, "eval" if counts else "")
                    )
                    pair_ids += batch.pair_ids
        self._require_finite(seen, pair_ids)
        model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._take("eval").items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, as TRL does, to what `Trainer` logs."""
        if "loss" in logs:
            logs = {**self._take("train"), **logs}
        super().log(logs, start_time)

    def _take(self, mode: str) -> dict[str, float]:
        """Means of the running metrics over all processes, each of which must ask; starts them anew."""
        sums = self._metrics[mode]
        if self.args.world_size > 1:
            # The same numbers in every process, also in one that had no pair since the last log.
            sums = self.accelerator.reduce(sums.clone(), "sum")
        *totals, count = sums.tolist()
        self._metrics[mode].zero_()
        return {name: total / max(count, 1) for name, total in zip(METRICS, totals, strict=True)} if count else {}


def _placed_elsewhere(model: nn.Module) -> bool:
    """Does somebody else decide where the weights are (a launcher that cuts them up, a quantised base)?"""
    by_somebody = processes.sharding() or getattr(model, "is_quantized", False)
    return bool(by_somebody) or getattr(model, "hf_device_map", None) is not None


def _frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is given, to stay so: cut up as the one that is trained is going to be."""
    if processes.read_sharded():
        return sharded_twin(model, device)
    return copy.deepcopy(model).to(device).requires_grad_(False).eval()


def _require_quiet(model: nn.Module, parts: list[nn.Module]) -> None:
    """Raise a UserError for a model that draws at random in training outside of `parts`, and cannot be kept from it."""
    if _placed_elsewhere(model):  # its first step sees to it (`_check_start`)
        return
    noise = training_noise(model, lambda: train_quietly(model, parts))
    if not noise <= 0.01:
        raise UserError(
            f"model '{causal_lm(model).config.name_or_path}' draws at random in training, and not by a setting that is "
            f"known here (log-probabilities differ by {noise:.3g} from evaluation): it cannot be trained on preferences"
        )


def _autocast(args: TrainingArguments) -> torch.autocast:
    """The types that the policy's forward is computed in; the reference is read in the same."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype=dtype, enabled=bool(args.fp16 or args.bf16))


def _same_numerics(args: TrainingArguments, model: nn.Module, logps: pa.Table) -> bool:
    """May stored log-probabilities stand beside those of the training's own forward?

    In bfloat16 the sum over a response is off by about a nat from the same sum in float32, as much as a training moves
    it: a reference read in other types would make the first loss another than ln 2, and bias every one after it.
    """
    if "dtype" not in provenance_of(logps):  # a table of the user's own making
        return not (args.fp16 or args.bf16)
    with _autocast(args):
        return read_like(logps, model)


def _bind_packed_forward(model: nn.Module) -> None:
    """Let `model(packed_batch=...)` return token log-probabilities, and with `kl_reference` the KL to it as well.

    Wrappers (DDP, FSDP, DeepSpeed, autocast) act on the call of the module they wrap, so the packed path must go
    through that call rather than around it.
    """
    original = model.forward
    if getattr(original, "takes_packed_batches", False):
        return

    def forward(self, *args, packed_batch: PackedBatch | None = None, kl_reference=None, kl_direction=None, **kwargs):
        if packed_batch is None:
            return original(*args, **kwargs)
        if kl_reference is not None:
            return token_logps_and_kl(self, kl_reference, packed_batch, kl_direction)
        return token_logps(self, packed_batch)

    forward.takes_packed_batches = True  # type: ignore[attr-defined]
    # Generation goes by the names: without `position_ids` among them it would count the padding as places.
    own = signature(original).parameters.values()
    forward.__signature__ = Signature([Parameter("self", Parameter.POSITIONAL_ONLY), *own])  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _matmul_parameters(model: nn.Module) -> int:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in embeddings)
