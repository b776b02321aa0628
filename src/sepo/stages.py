"""The stages of the method as functions of folders: read tables and models, write tables and models.

    prepare_data -> train_reference -> train_model (DPO) -> logps_pass, score_pairs -> select -> train_model (SePO)

Each can be called alone; the stage commands do, and `pipeline.py` strings them together. Passes over a dataset work
shard by shard, and a shard that stands already, made from the same model and pairs, is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from sepo.data import DataReport, split_pairs, tokenize_pairs, tokenizer_fingerprint
from sepo.errors import UserError
from sepo.loading import load_preferences, load_rows
from sepo.logps import dataset_logps
from sepo.models import LoraSettings, load_model, load_tokenizer, model_fingerprint, save_model
from sepo.recipe import EMBEDDED_DATA, DataSettings, LoraConfig, PolicySettings, SftSettings, TrainingSettings
from sepo.rewards import token_rewards
from sepo.selection import check_rule, dataset_thresholds, select_key_tokens
from sepo.tables import FORMAT_VERSION, provenance_of, shard_path, table_paths, write_shard, write_table, write_text
from sepo.trainer import PreferenceConfig, PreferenceTrainer

PAIRS_PER_SHARD = 1000


def say(text: str) -> None:
    """Print a line of progress to standard error, where it does not disturb results on standard output."""
    print(text, file=sys.stderr, flush=True)


# --- data -----------------------------------------------------------------------------------------------------------


def embedded_data() -> Path:
    """Return the parquet file of the embedded sentiment task (assets/README.md)."""
    return Path(str(resources.files("sepo") / "assets" / "sentiment_pairs.parquet"))


def prepare_data(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Read, validate, tokenise and split a preference dataset into `out/train` and `out/held_out`.

    Returns:
        counts: `train`, `held_out`, and the report of what was dropped and why.
    """
    split, held_out_split = settings.split, settings.held_out_split
    if settings.source == EMBEDDED_DATA:
        held_out_split = held_out_split or "held_out"
    table, report = _tokenize(settings, split, tokenizer, progress)
    reports = {split: report}
    # Below 1 it is a share, from 1 on a number of pairs.
    number = int(settings.held_out) if settings.held_out >= 1 else settings.held_out
    if held_out_split or settings.held_out_source:
        name = held_out_split if held_out_split and settings.held_out_source is None else "held_out"
        held_out, reports[name] = _tokenize(*held_out_data(settings, held_out_split), tokenizer, progress)
        if number >= 1:
            held_out = held_out.slice(0, int(number))
        train, _ = split_pairs(table, held_out=0, sample=settings.sample, seed=seed)
    else:
        train, held_out = split_pairs(table, held_out=number, sample=settings.sample, seed=seed)
    write_table(out / "train", train, PAIRS_PER_SHARD)
    write_table(out / "held_out", held_out, PAIRS_PER_SHARD)
    for name, one in reports.items():
        say(f"  {name}: {one.summary()}")
    return {
        "train": len(train),
        "held_out": len(held_out),
        "report": {name: one.to_dict() for name, one in reports.items()},
    }


def held_out_data(settings: DataSettings, split: str | None) -> tuple[DataSettings, str]:
    """Where held-out pairs of their own come from: the settings to read them with, and their split."""
    if settings.held_out_source is None:
        return settings, split or "train"
    return settings.model_copy(update={"source": settings.held_out_source, "config_name": None}), split or "train"


def read_pairs(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, progress: bool = True) -> pa.Table:
    """Read and tokenise one split without dividing it: what the stage commands work on."""
    table, report = _tokenize(settings, settings.split, tokenizer, progress)
    say(f"  {settings.split}: {report.summary()}")
    return table


def _tokenize(
    settings: DataSettings, split: str, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> tuple[pa.Table, DataReport]:
    return tokenize_pairs(
        read_split(settings, split),
        tokenizer,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        as_chat=settings.as_chat,
        progress=progress,
    )


def read_split(settings: DataSettings, split: str) -> datasets.Dataset:
    """Read the rows of one split, columns renamed; raises a UserError for whatever is wrong with the source."""
    if settings.source != EMBEDDED_DATA:
        return load_preferences(
            settings.source, split=split, config_name=settings.config_name, columns=dict(settings.columns)
        )
    dataset = load_preferences(embedded_data(), columns=dict(settings.columns))
    rows = [index for index, name in enumerate(dataset["split"]) if name == split]
    if not rows:
        raise UserError(f"{EMBEDDED_DATA} has no split '{split}': expected train or held_out")
    return dataset.select(rows)


def check_same_tokenizer(
    role: str, tokenizer: PreTrainedTokenizerBase, other_role: str, other: PreTrainedTokenizerBase
) -> None:
    """Raise a UserError unless both tokenizers give the same ids: token rewards are tied to ids."""
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise UserError(
            f"{role} and {other_role} have different tokenizers: token rewards are tied to token ids; "
            "choose models that share a tokenizer"
        )


def check_table_tokenizer(table: pa.Table, tokenizer: PreTrainedTokenizerBase, path: str, model: str) -> None:
    """Raise a UserError unless a table was made with this tokenizer."""
    made_with = provenance_of(table).get("tokenizer")
    if made_with is not None and made_with != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"'{path}' was made with another tokenizer than that of '{model}': "
            "train a model that shares the oracle's tokenizer, or score again"
        )


# --- reference ------------------------------------------------------------------------------------------------------


def train_reference(model: str, settings: SftSettings, out: Path, *, seed: int = 0, device: str = "auto") -> Path:
    """Fine-tune `model` on conversations or text with TRL's SFTTrainer; returns the model folder `out`."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise UserError('reference.sft needs TRL: run pip install "sepo[sft]"') from None
    dataset = load_rows(settings.source, split=settings.split, config_name=settings.config_name)
    if "messages" in dataset.column_names:
        # TRL takes a column `prompt` beside it for a prompt-completion pair (UltraChat has both).
        dataset = dataset.select_columns(["messages"])
    if settings.sample < 1:
        dataset = dataset.shuffle(seed=seed).select(range(max(1, int(settings.sample * len(dataset)))))
    tokenizer = load_tokenizer(model)
    arguments = training_arguments(settings.training, out, seed=seed, device=device)
    # TRL pads a whole micro-batch: a few rows at a time, accumulated.
    rows = arguments["per_device_train_batch_size"]
    micro = next(size for size in (8, 4, 2, 1) if rows % size == 0)
    arguments |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    arguments |= settings.training.arguments
    trainer = SFTTrainer(
        model=load_model(model, device=device, train=True),
        args=SFTConfig(**arguments, max_length=settings.max_length),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[SaveEvery(settings.training.save_minutes), ProgressBar("SFT")],
    )
    trainer.remove_callback(PrinterCallback)
    made_with = {"model": model_fingerprint(model), "sft": settings.model_dump(mode="json"), "seed": seed}
    trainer.train(resume_from_checkpoint=_last_checkpoint(out, made_with))
    return _finish_training(trainer, tokenizer, out)


# --- training -------------------------------------------------------------------------------------------------------


class SaveEvery(TrainerCallback):
    """Save a checkpoint when `minutes` have passed since the last: short runs write none, long ones lose little."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.seconds and time.monotonic() - self.last > self.seconds and state.global_step < state.max_steps:
            control.should_save = True
            self.last = time.monotonic()
        return control


class ProgressBar(TrainerCallback):
    """One bar for a training run, with the latest loss and accuracy beside it; what remains is in view."""

    def __init__(self, description: str):
        self.description = description
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"  {self.description}", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": logs["loss"], "accuracy": logs.get("rewards/accuracies")}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def training_arguments(settings: TrainingSettings, out: Path, *, seed: int, device: str = "auto") -> dict[str, Any]:
    """Translate `TrainingSettings` into keyword arguments of `transformers.TrainingArguments`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % processes:
        raise UserError(f"batch_size {settings.batch_size} is not a multiple of the {processes} processes")
    use_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    arguments: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size // processes,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16 if settings.bf16 is not None else not use_cpu,
        "activation_checkpointing": settings.activation_checkpointing,
        "optim": "adamw_torch_fused",
        "save_strategy": "no" if not settings.save_minutes else "steps",
        "save_steps": 2**31 - 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": settings.report_to,
        "seed": seed,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "disable_tqdm": True,  # ProgressBar below shows one bar instead of a log
    }
    return {**arguments, **settings.arguments}


def train_model(
    model: str,
    table: pa.Table,
    out: Path,
    training: TrainingSettings,
    *,
    reference_logps: pa.Table | None = None,
    lora: LoraConfig | None = None,
    quantization: str | None = None,
    seed: int = 0,
    device: str = "auto",
    callbacks: Sequence[TrainerCallback] = (),
    **objective: Any,
) -> dict[str, float]:
    """Train a model on a pairs or selection table and save it to `out`.

    Args:
        callbacks: besides the progress bar and the checkpoints.
        objective: fields of `PreferenceConfig`: objective="dpo", beta=0.1 or objective="sepo", gamma=2.0, ...

    Returns:
        `seconds`, the mean `loss` over the run, and `steps`.
    """
    tokenizer = load_tokenizer(model)
    config = PreferenceConfig(
        **training_arguments(training, out, seed=seed, device=device),
        tokens_per_row=training.tokens_per_row,
        **objective,
    )
    trainer = PreferenceTrainer(
        model=load_model(
            model,
            device=device,
            train=True,
            lora=LoraSettings(**lora.model_dump()) if lora else None,
            quantization=quantization,
        ),
        args=config,
        train_dataset=table,
        reference_logps=reference_logps,
        processing_class=tokenizer,
        callbacks=[
            SaveEvery(training.save_minutes),
            ProgressBar(str(objective.get("objective", "training")).upper()),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    made_with = {
        "model": model_fingerprint(model),
        "pairs": _table_digest(table),
        "training": training.model_dump(mode="json"),
        "lora": lora.model_dump(mode="json") if lora else None,
        "quantization": quantization,
        "seed": seed,
        **objective,
    }
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(out, made_with))
    seconds = time.monotonic() - started
    _finish_training(trainer, tokenizer, out)
    return {"seconds": seconds, "loss": result.training_loss, "steps": result.global_step}


def _last_checkpoint(out: Path, made_with: dict[str, Any]) -> str | None:
    """Return the last checkpoint of the same training run; checkpoints of other settings or data are removed."""
    folder = out / "checkpoints"
    record = folder / "made_with.json"
    text = json.dumps(made_with, sort_keys=True, default=str)
    if folder.is_dir() and (not record.is_file() or record.read_text(encoding="utf-8") != text):
        if any(folder.glob("checkpoint-*")):  # Trainer makes the empty folder itself
            say(f"  checkpoints in {folder} were made with other settings or data: removed")
        shutil.rmtree(folder)
    write_text(record, text)
    found = get_last_checkpoint(str(folder))
    if found:
        say(f"  continuing from {found}")
    return found


def _finish_training(trainer, tokenizer: PreTrainedTokenizerBase, out: Path) -> Path:
    """Save the trained model beside its training history, and drop the checkpoints."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        history = json.dumps({"log_history": trainer.state.log_history, "global_step": trainer.state.global_step})
        save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out)
        write_text(out / "trainer_state.json", history)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return out


# --- scoring --------------------------------------------------------------------------------------------------------


def logps_pass(
    model: str,
    pairs: Path,
    out: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokens_per_row: int | None = None,
    description: str = "log-probabilities",
) -> Path:
    """Store the log-probability of every response token of a pairs table under a frozen model.

    The table is written shard by shard; shards of the same model and pairs that stand already are kept, so that an
    interrupted pass continues where it stopped.
    """
    fingerprint = {"model": model_fingerprint(model), "dtype": dtype}
    paths = table_paths(pairs, "pairs")
    todo = []
    total = 0
    for index, path in enumerate(paths):
        table = pq.read_table(path)
        expected = {
            **fingerprint,
            "tokenizer": provenance_of(table).get("tokenizer"),
            "pairs": _table_digest(table),
        }
        if not _shard_matches(shard_path(out, index), expected):
            todo.append((index, path, expected))
            total += len(table)
    for stale in sorted(out.glob("part-*.parquet"))[len(paths) :]:
        stale.unlink()
    if not todo:
        return out
    loaded = load_model(model, device=device, dtype=dtype)
    with tqdm(total=total, desc=f"  {description}", unit="pair", smoothing=0.05) as bar:
        for index, path, expected in todo:
            table = dataset_logps(
                loaded,
                pq.read_table(path),
                tokens_per_row=tokens_per_row,
                provenance=expected,
                progress=bar.update,
            )
            write_shard(out, index, table)
    return out


def _shard_matches(path: Path, expected: dict[str, Any]) -> bool:
    try:
        found = provenance_of(pq.read_schema(path))
    except (OSError, pa.ArrowInvalid, ValueError):
        return False
    return found.get("version") == FORMAT_VERSION and all(found.get(key) == value for key, value in expected.items())


def _table_digest(table: pa.Table) -> str:
    """Fingerprint of the numbers in a table, independent of how it is chunked."""
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        column = table.column(name).combine_chunks()
        if pa.types.is_list(column.type):
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            column = column.flatten()
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


def score_pairs(pairs: Path, oracle_logps: Path, reference_logps: Path, out: Path) -> Path:
    """Join stored log-probabilities into a scores table, shard by shard."""
    shards = [table_paths(folder, kind) for folder, kind in ((pairs, "pairs"), (oracle_logps, "logps"))]
    shards.append(table_paths(reference_logps, "logps"))
    _clear_shards(out)
    for index, paths in enumerate(zip(*shards, strict=True)):
        write_shard(out, index, token_rewards(*(pq.read_table(path) for path in paths)))
    return out


def select(scores: Path, out: Path, k_chosen: float = 0.3, k_rejected: float = 0.3, **rule: Any) -> Path:
    """Write the key tokens of a scores table, shard by shard; `rule` are keywords of `select_key_tokens`."""
    check_rule(k_chosen, k_rejected, **rule)
    paths = table_paths(scores, "scores")
    # A rule over the whole dataset is a threshold for each shard.
    settings = dataset_thresholds((pq.read_table(path) for path in paths), k_chosen, k_rejected, **rule)
    _clear_shards(out)
    for index, path in enumerate(paths):
        write_shard(out, index, select_key_tokens(pq.read_table(path), k_chosen, k_rejected, **settings))
    return out


def objective_settings(policy: PolicySettings) -> dict[str, Any]:
    """The keywords of `train_model` that a recipe's policy section sets."""
    return policy.model_dump(include={"objective", "beta", "gamma", "margin", "alpha", "label_smoothing"})


def _clear_shards(folder: Path) -> None:
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
