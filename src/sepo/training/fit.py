"""A whole training: model and table in, trained model in a folder out. It resumes from the last checkpoint."""

from __future__ import annotations

import contextlib
import gc
import math
import pickle
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from sepo import processes
from sepo.data.rows import TEMPLATE_OPTIONS
from sepo.data.tables import PLAIN_TEXT, provenance_of, table_digest
from sepo.errors import Interrupted, UserError, log_kept_on_interrupt, one_line
from sepo.files import file_digests, replace_folder, write_json
from sepo.forward.scoring import Types
from sepo.models.devices import choose_training_device, dtype_name, fast_bfloat16
from sepo.models.folders import is_adapter
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import LoraSettings, OracleSettings, PolicySettings, TrainingSettings
from sepo.training.batches import pairs_seen
from sepo.training.checkpoints import (
    STATE_FILE,
    SaveEvery,
    existing_model,
    last_checkpoint,
    require_finite_weights,
    saved_progress,
    saving,
    training_fingerprint,
)
from sepo.training.interrupt import StopSignals, StopWhenAsked, asked_anywhere
from sepo.training.logs import ProgressBar, carry_logs, log_into, reporters
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer


def training_arguments(settings: TrainingSettings, out: Path, *, seed: int, device: str = "auto") -> dict[str, Any]:
    """Translate `TrainingSettings` into keyword arguments of `transformers.TrainingArguments`."""
    number = processes.launched()
    if settings.batch_size % number:
        raise UserError(f"batch_size {settings.batch_size} is not a multiple of the {number} processes")
    chosen = choose_training_device(device)
    use_cpu = chosen.type == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size // number,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16 if settings.bf16 is not None else fast_bfloat16(chosen),
        "activation_checkpointing": settings.activation_checkpointing,
        "optim": "adamw_torch_fused",
        "save_strategy": "no" if not settings.save_minutes else "steps",
        "save_steps": 2**31 - 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": reporters(settings.report_to),
        "seed": seed,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        # A separate process packs the rows while this one keeps the GPU busy.
        "dataloader_num_workers": 0 if use_cpu else 1,
        "disable_tqdm": True,  # `ProgressBar` takes its place
    }
    if settings.router_aux_loss_coef:
        arguments["router_aux_loss_coef"] = settings.router_aux_loss_coef
    return {**arguments, **settings.arguments}


def training_types(settings: OracleSettings | PolicySettings, model: str, device: str) -> Types:
    """The types in which a training on a kind of device reads pairs; its reference is read in the same.

    Args:
        model: name or folder of the model that is trained.
    """
    training, adapter = settings.training, settings.lora is not None or is_adapter(Path(model))
    planned = device == "cuda" and not torch.cuda.is_available()  # a plan for a GPU that is not here
    bf16 = planned or fast_bfloat16(torch.device(device)) if training.bf16 is None else training.bf16
    low = {"bf16": bf16, **training.arguments}
    autocast = "float16" if low.get("fp16") else "bfloat16" if low["bf16"] else None
    return Types(dtype_name("auto", device, trained=not adapter), settings.quantization, autocast)


def steps_of(settings: TrainingSettings, pairs: int) -> int:
    """Number of updates of a training."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * math.ceil(pairs / settings.batch_size))


def pairs_to_see(settings: TrainingSettings, pairs: int) -> int:
    """Number of pairs that a training sees, with repetitions. Trainer runs whole updates."""
    return pairs_seen(steps_of(settings, pairs), pairs, settings.batch_size)


def epochs(settings: TrainingSettings, pairs: float) -> float:
    """How often a training sees each pair, on average."""
    number = max(round(pairs), 1)
    return pairs_to_see(settings, number) / number


def train_model(
    model: str,
    table: pa.Table,
    out: Path,
    training: TrainingSettings,
    *,
    reference_logps: pa.Table | None = None,
    reference_is_start: bool = True,
    lora: LoraSettings | None = None,
    quantization: str | None = None,
    seed: int = 0,
    device: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    until: Mapping[str, Any] | None = None,
    **objective: Any,
) -> dict[str, float]:
    """Train a model on a pairs or selection table and save it to `out`.

    Args:
        reference_logps: log-probabilities of the rows of `table`, in the `training_types`.
        reference_is_start: they are those of `model` as it is here; False: of another model, which is logged.
        callbacks: additional callbacks beside those for the progress bar and the checkpoints. What one has as
            `results` (float by name) joins the results.
        until: what a callback that ends the training depends on; a part of the training's fingerprint.
        objective: fields of `PreferenceConfig`: objective="dpo", beta=0.1 or objective="sepo", gamma=2.0, ...

    Returns:
        `seconds`, the mean `loss` over the run, and `steps`; those of the earlier run if `out` already has this model.
    """
    processes.join(device)
    made_with = training_fingerprint(
        model,
        training,
        pairs=table_digest(table),
        reference_logps=None if reference_logps is None else table_digest(reference_logps),
        lora=lora.model_dump(mode="json") if lora else None,
        quantization=quantization,
        seed=seed,
        **{name: value for name, value in provenance_of(table).items() if name in (TEMPLATE_OPTIONS, PLAIN_TEXT)},
        **({} if until is None else {"until": dict(until)}),
        **objective,
    )
    existing = processes.on_main(lambda: existing_model(out, made_with))
    if existing is not None:
        return existing
    tokenizer = load_tokenizer(model)
    arguments = training_arguments(training, out, seed=seed, device=device)
    bar = ProgressBar(str(objective.get("objective", "training")).upper())
    trainer = PreferenceTrainer(
        model=load_model(model, device=device, train=True, lora=lora, quantization=quantization, seed=seed),
        args=PreferenceConfig(**arguments, tokens_per_row=training.tokens_per_row, **objective),
        train_dataset=table,
        reference_logps=reference_logps,
        processing_class=tokenizer,
        callbacks=[saving(training), bar, *callbacks],
        reference_is_start=reference_is_start,
    )
    trainer.remove_callback(PrinterCallback)
    return run_training(trainer, tokenizer, out, made_with)


def run_training(
    trainer: Any, tokenizer: PreTrainedTokenizerBase, out: Path, made_with: dict[str, Any]
) -> dict[str, float]:
    """Train from the last complete checkpoint, and save the trained model with its history in `out`.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived. The current step was finished, and its checkpoint or the model saved.
    """
    signals = StopSignals()
    stopping = StopWhenAsked(signals)
    trainer.add_callback(stopping)
    log_into(trainer, out)
    with signals, log_kept_on_interrupt(lambda: saved_progress(out)), contextlib.ExitStack() as stack:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SaveEvery):
                stack.enter_context(callback.writing(trainer))
        results = _train(trainer, tokenizer, out, made_with, stopping)
        if asked_anywhere(signals):
            raise Interrupted(
                f"the model is trained and kept in '{out}'; the same command continues from there",
                signals.number or signal.SIGINT,
            )
    _release(trainer)
    return results


def _train(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    made_with: dict[str, Any],
    stopping: StopWhenAsked,
) -> dict[str, float]:
    started = time.monotonic()
    checkpoint = processes.on_main(lambda: last_checkpoint(out, made_with))
    try:
        # Trainer loads optimizer, schedule and random state with torch's restricted loader, which runs no code.
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    except pickle.UnpicklingError as error:
        raise UserError(f"'{checkpoint}' cannot be continued from ({one_line(error, 200)}): delete it") from None
    if stopping.stopped_at is not None:
        raise Interrupted(
            f"the checkpoint of step {stopping.stopped_at} of {trainer.state.max_steps} is kept; "
            "the same command continues from there",
            stopping.signals.number or signal.SIGINT,
        )
    require_finite_weights(trainer.model, trainer.state.global_step)
    seconds = time.monotonic() - started
    # A collective call: all processes gather the weights of a sharded model (FSDP, DeepSpeed).
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if processes.sharding() else None
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    # Trainer's own mean covers only the steps since the last resume. A run shorter than logging_steps has no other.
    loss = sum(losses) / len(losses) if losses else (None if checkpoint else trained.training_loss)
    results = {"seconds": seconds, "loss": loss, "steps": trainer.state.global_step}
    for callback in trainer.callback_handler.callbacks:
        results |= getattr(callback, "results", {})

    def save() -> dict[str, float]:
        configured = getattr(trainer, "as_configured", contextlib.nullcontext)
        with replace_folder(out) as temporary, configured():
            save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, temporary, state_dict=state_dict)
            state = {"log_history": history, "global_step": trainer.state.global_step, "results": results}
            state |= {"made_with": made_with, "files": file_digests(temporary)}
            write_json(temporary / STATE_FILE, state, indent=None)
            carry_logs(out, temporary)  # after the digests, since logs are not part of the model
        return results

    return processes.on_main(save)


def _release(trainer: Any) -> None:
    """Free the memory of a training. Trainer, accelerator and model refer to each other, so weights, gradients and
    optimizer states would otherwise stay in (GPU) memory during the next stage, until a garbage collection.
    """
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def objective_settings(policy: PolicySettings) -> dict[str, Any]:
    """The fields of `PreferenceConfig` that the policy section of a recipe sets, as keywords for `train_model`."""
    names = {"objective", "beta", "gamma", "margin", "alpha", "label_smoothing"}
    return policy.model_dump(include=names if policy.rate is None else {*names, "rate"})
