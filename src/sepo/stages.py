"""The stages of the method as functions of folders: read tables and models, write tables and models.

    prepare_data -> train_reference -> train_oracle -> logps_pass, score_pairs -> select -> train_model

Each can be called alone; the stage commands do, and `pipeline.py` strings them together. Passes over a dataset work
shard by shard, and a shard that stands already, made from the same model and pairs, is kept. Training continues from
its last whole checkpoint, and a finished model made from the same model, pairs and settings is kept too.

Under a launcher of several processes training and passes are shared by all of them; everything else runs in the main
one, which alone writes (processes.py).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from sepo import processes
from sepo.data import DataReport, group_by_prompt, sample_pairs, split_pairs, tokenize_pairs, tokenizer_fingerprint
from sepo.errors import UserError, one_line
from sepo.loading import load_preferences, load_rows, source_fingerprint
from sepo.logps import dataset_logps
from sepo.models import (
    LoraSettings,
    load_model,
    load_tokenizer,
    model_fingerprint,
    replace_folder,
    save_model,
)
from sepo.recipe import (
    EMBEDDED_DATA,
    DataSettings,
    LoraConfig,
    OracleSettings,
    PolicySettings,
    SftSettings,
    TrainingSettings,
)
from sepo.rewards import combine_scores, token_rewards
from sepo.selection import check_rule, dataset_thresholds, select_key_tokens
from sepo.tables import (
    FORMAT_VERSION,
    file_digest,
    provenance_of,
    read_shard,
    read_table,
    shard_path,
    table_digest,
    table_paths,
    write_shard,
    write_table,
    write_text,
)
from sepo.trainer import NonFiniteLossError, PreferenceConfig, PreferenceTrainer

PAIRS_PER_SHARD = 1000


def say(text: str) -> None:
    """Print a line of progress to standard error, where it does not disturb results on standard output."""
    if processes.is_main():
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
    write_pairs(out / "train", train)
    write_pairs(out / "held_out", held_out)
    for name, one in reports.items():
        say(f"  {name}: {one.summary()}")
    return {
        "train": len(train),
        "held_out": len(held_out),
        "report": {name: one.to_dict() for name, one in reports.items()},
    }


def write_pairs(folder: Path, table: pa.Table) -> None:
    """Write a table of kind "pairs" in shards.

    A scoring pass takes a shard at a time and reads a prompt or response that occurs in it several times once. Where
    there is more than one shard, the pairs of one prompt are therefore brought into the same: for the AlpacaEval pairs
    (ten a prompt, rows of 2,048) that leaves 55 % of the tokens of a pass over single sequences instead of 68 %.
    """
    if len(table) > PAIRS_PER_SHARD:
        table = group_by_prompt(table)
    write_table(folder, table, PAIRS_PER_SHARD)


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
    processes.join(device)
    dataset = load_rows(settings.source, split=settings.split, config_name=settings.config_name)
    if "messages" in dataset.column_names:
        # TRL takes a column `prompt` beside it for a prompt-completion pair (UltraChat has both).
        dataset = dataset.select_columns(["messages"])
    if settings.sample < 1:
        dataset = dataset.shuffle(seed=seed).select(range(max(1, int(settings.sample * len(dataset)))))
    arguments = training_arguments(settings.training, out, seed=seed, device=device)
    # TRL pads a whole micro-batch: a few rows at a time, accumulated.
    rows = arguments["per_device_train_batch_size"]
    micro = next(size for size in (8, 4, 2, 1) if rows % size == 0)
    arguments |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    arguments |= settings.training.arguments
    made_with = _fingerprint(model, settings.training, sft=settings.model_dump(mode="json"), seed=seed)
    made_with["source"] = processes.on_main(lambda: source_fingerprint(settings.source))
    standing = processes.on_main(lambda: _standing(out, made_with))
    if standing is not None:
        return out
    tokenizer = load_tokenizer(model)
    trainer = SFTTrainer(
        model=load_model(model, device=device, train=True),
        args=SFTConfig(**arguments, max_length=settings.max_length),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[SaveEvery(settings.training.save_minutes), ProgressBar("SFT")],
    )
    trainer.remove_callback(PrinterCallback)
    _train(trainer, tokenizer, out, made_with)
    return out


# --- training -------------------------------------------------------------------------------------------------------


class SaveEvery(TrainerCallback):
    """Save a checkpoint when `minutes` have passed since the last: short runs write none, long ones lose little.

    A checkpoint that is whole on the disk is sealed (`seal_checkpoint`); only a sealed one is ever continued from.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if not self.seconds or state.global_step >= state.max_steps:
            return control
        # One clock decides for all processes: saving is a joint act.
        if processes.on_main(lambda: time.monotonic() - self.last > self.seconds):
            control.should_save = True
            self.last = time.monotonic()
        return control

    def on_save(self, args, state, control, **kwargs):
        require_finite_weights(kwargs["model"], state.global_step)
        processes.wait()
        processes.on_main(lambda: seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


def require_finite_weights(model: torch.nn.Module, step: int) -> None:
    """Raise a `NonFiniteLossError` if a weight is not finite: no such checkpoint is sealed, no such model kept."""
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP: the part of this process
        if not bool(torch.isfinite(own).all()):
            raise NonFiniteLossError(
                f"the weight {name} is not finite after step {step}; lower learning_rate: "
                "the checkpoints before it are kept"
            )


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
    number = processes.launched()
    if settings.batch_size % number:
        raise UserError(f"batch_size {settings.batch_size} is not a multiple of the {number} processes")
    use_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
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
        # Rows are laid out by a process beside the one that keeps the GPU busy.
        "dataloader_num_workers": 0 if use_cpu else 1,
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
    processes.join(device)
    made_with = _fingerprint(
        model,
        training,
        pairs=table_digest(table),
        reference_logps=None if reference_logps is None else table_digest(reference_logps),
        lora=lora.model_dump(mode="json") if lora else None,
        quantization=quantization,
        seed=seed,
        **objective,
    )
    standing = processes.on_main(lambda: _standing(out, made_with))
    if standing is not None:
        return standing
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
    return _train(trainer, tokenizer, out, made_with)


def train_oracle(
    reference: str,
    pairs: Path,
    reference_logps: Path,
    out: Path,
    settings: OracleSettings,
    *,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, float]:
    """Train one oracle: DPO on the reference, over `settings.sample` of the pairs.

    Args:
        reference: the model that it starts from.
        pairs, reference_logps: all training pairs, and their stored log-probabilities under the reference.
        out: its model folder.
        seed: of the draw of pairs and of their order; one for each oracle (`oracle_seeds`).

    Returns:
        the number of `pairs`, and what `train_model` returns.
    """
    table, logps = read_table(pairs, "pairs"), read_table(reference_logps, "logps")
    sample = sample_pairs(table, settings.sample, seed=seed)
    rows = np.isin(table.column("pair_id").to_numpy(), sample.column("pair_id").to_numpy())
    results = train_model(
        reference,
        sample,
        out,
        settings.training,
        reference_logps=logps.filter(pa.array(rows)),
        lora=settings.lora,
        quantization=settings.quantization,
        seed=seed,
        device=device,
        objective="dpo",
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
    )
    return {"pairs": len(sample), **results}


def oracle_seeds(seed: int, count: int) -> list[int]:
    """A seed for each of several oracles of a run, the run's own first; runs at neighbouring seeds share none."""
    return [seed + 1000 * member for member in range(count)]


def _train(trainer: Any, tokenizer: PreTrainedTokenizerBase, out: Path, made_with: dict[str, Any]) -> dict[str, float]:
    """Train from the last whole checkpoint on, and put the finished model with its history into `out`."""
    started = time.monotonic()
    checkpoint = processes.on_main(lambda: _last_checkpoint(out, made_with))
    try:
        # Trainer reads optimizer, schedule and random state with torch's restricted loader: numbers only, no code.
        trainer.train(resume_from_checkpoint=checkpoint)
    except pickle.UnpicklingError as error:
        raise UserError(f"'{checkpoint}' cannot be continued from ({one_line(error, 200)}): delete it") from None
    require_finite_weights(trainer.model, trainer.state.global_step)
    seconds = time.monotonic() - started
    # A sharded model (FSDP, DeepSpeed) is gathered by all processes together.
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharding() else None
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    # The trainer's own mean covers the steps since the last restart only.
    loss = sum(losses) / max(len(losses), 1)
    results = {"seconds": seconds, "loss": loss, "steps": trainer.state.global_step}

    def save() -> dict[str, float]:
        with replace_folder(out) as temporary:
            save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, temporary, state_dict=state_dict)
            state = {"log_history": history, "global_step": trainer.state.global_step, "results": results}
            state |= {"made_with": made_with, "files": _file_digests(temporary)}
            write_text(temporary / STATE_FILE, json.dumps(state))
        return results

    return processes.on_main(save)


# --- what stands already --------------------------------------------------------------------------------------------

STATE_FILE = "trainer_state.json"
_SEAL = "sealed.json"
# Part of every training's fingerprint: raised when checkpoints or training change in a way that must not be mixed.
_TRAINING_FORMAT = 2


def sharding() -> str:
    """How the launcher cuts up a model: "fsdp", "deepspeed" or nothing. Checkpoints of one kind fit no other."""
    kinds = ("fsdp", "deepspeed")
    return next((k for k in kinds if os.environ.get(f"ACCELERATE_USE_{k.upper()}", "false").lower() == "true"), "")


def _fingerprint(model: str, training: TrainingSettings, **rest: Any) -> dict[str, Any]:
    """Everything that a training depends on, but for the number of processes, which does not change its result."""
    return {
        "format": _TRAINING_FORMAT,
        "model": processes.on_main(lambda: model_fingerprint(model)),
        "training": training.model_dump(mode="json"),
        **rest,
    }


def _file_digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def recover_folder(folder: Path) -> None:
    """Undo what a process killed inside `replace_folder` left: put the old folder back, or remove the remains."""
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for leftover in (new, old, new.with_name(f".{new.name}.new"), new.with_name(f".{new.name}.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def _standing(out: Path, made_with: dict[str, Any]) -> dict[str, float] | None:
    """Return the results of a finished training with this fingerprint if its model stands in `out`, unaltered.

    Raises:
        UserError: `out` holds something else, which saving the model would remove.
    """
    recover_folder(out)
    if not out.exists():
        return None
    known = ("config.json", "adapter_config.json", "checkpoints", STATE_FILE)
    if not out.is_dir() or (any(out.iterdir()) and not any((out / name).exists() for name in known)):
        raise UserError(f"'{out}' is not a model folder: its content would be replaced; choose a new folder")
    try:
        state = json.loads((out / STATE_FILE).read_text(encoding="utf-8"))
        same = state["made_with"] == json.loads(json.dumps(made_with, default=str))
        if not same:
            return None
        if problem := _differing_file(out, state["files"]):
            say(f"  {out}: {problem}; trained again")
            return None
        results = {name: float(value) for name, value in state["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of an attempt with other settings
    say(f"  {out} stands already, made with the same model, data and settings: kept")
    return results


def _differing_file(folder: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != digest:
            return f"{name} was altered"
    return None


def seal_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as whole: its files are on the disk, and their checksums are written last."""
    # A pickle of the arguments: nobody reads it, and nobody should.
    for name in ("training_args.bin", _SEAL):
        (folder / name).unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    write_text(folder / _SEAL, json.dumps(_file_digests(folder)))


def _checkpoint_problem(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole."""
    try:
        digests = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return _differing_file(folder, digests)
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{_SEAL} is damaged"


def _last_checkpoint(out: Path, made_with: dict[str, Any]) -> str | None:
    """Return the last whole checkpoint of the same training; others, unfinished and damaged ones are removed."""
    folder = out / "checkpoints"
    record = folder / "made_with.json"
    text = json.dumps({**made_with, "sharding": sharding()}, sort_keys=True, default=str)
    if folder.is_dir() and (not record.is_file() or record.read_text(encoding="utf-8", errors="replace") != text):
        if any(folder.glob("checkpoint-*")):  # Trainer makes the empty folder itself
            say(f"  checkpoints in {folder} were made with other settings or data: removed")
        shutil.rmtree(folder)
    write_text(record, text)
    numbered = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        problem = _checkpoint_problem(checkpoint)
        if problem is None:
            say(f"  continuing from {checkpoint}")
            return str(checkpoint)
        say(f"  {checkpoint}: {problem}; removed")
        shutil.rmtree(checkpoint)
    return None


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
    processes.join(device)
    shards = len(table_paths(pairs, "pairs"))
    todo = processes.on_main(lambda: _shards_to_do(model, pairs, out, dtype))
    if not todo:
        return out

    def write(index: int, table: pa.Table) -> None:
        write_shard(out, index, table, shards)

    loaded = load_model(model, device=device, dtype=dtype)
    total = sum(item["pairs"] for item in todo)
    with tqdm(
        total=total, desc=f"  {description}", unit="pair", smoothing=0.05, disable=not processes.is_main() or None
    ) as bar:
        for item in todo:
            index = item["index"]
            table = dataset_logps(
                loaded,
                read_shard(shard_path(pairs, index), "pairs"),
                tokens_per_row=tokens_per_row,
                provenance=item["provenance"],
                progress=lambda done: bar.update(done * processes.size()),
                over_processes=True,
            )
            processes.on_main(partial(write, index, table))
    return out


def _shards_to_do(model: str, pairs: Path, out: Path, dtype: str) -> list[dict[str, Any]]:
    """The shards of a pass that do not stand yet, each with its provenance and number of pairs."""
    fingerprint = {"model": model_fingerprint(model), "dtype": dtype}
    paths = table_paths(pairs, "pairs")
    todo, problems = [], []
    for index, path in enumerate(paths):
        table = read_shard(path, "pairs")
        made_from = {"tokenizer": provenance_of(table).get("tokenizer"), "pairs": table_digest(table)}
        expected = {**fingerprint, **made_from}
        stored = shard_path(out, index)
        problem = _shard_problem(stored, {**expected, "shard": index, "shards": len(paths)})
        if problem is not None:
            todo.append({"index": index, "provenance": expected, "pairs": len(table)})
            problems += [f"{stored} {problem}"] if stored.exists() else []
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        say(f"  {problems[0]}{more}: computed again")
    for stale in sorted(out.glob("part-*.parquet"))[len(paths) :]:
        stale.unlink()
    return todo


def _shard_problem(path: Path, expected: dict[str, Any]) -> str | None:
    """Say why a stored shard cannot be used; None if it is whole and was made from what is expected."""
    if not path.is_file():
        return "is missing"
    try:
        with open(path, "rb") as file:
            found = provenance_of(pq.read_schema(file))
        for key, value in {"version": FORMAT_VERSION, **expected}.items():
            if found.get(key) != value:
                return f"was made with another {key}"
        read_shard(path, "logps")
    except (UserError, OSError, ValueError, pa.ArrowException) as error:
        return f"is damaged ({one_line(error, 200)})"
    return None


def score_pairs(pairs: Path, oracle_logps: Sequence[Path], reference_logps: Path, out: Path) -> Path:
    """Join stored log-probabilities into a scores table, shard by shard; several oracles' rewards are averaged."""
    kinds = ((pairs, "pairs"), (reference_logps, "logps"), *((store, "logps") for store in oracle_logps))
    shards = list(zip(*(table_paths(folder, kind) for folder, kind in kinds), strict=True))
    _clear_shards(out)
    for index, (pair, reference, *oracles) in enumerate(shards):
        table, base = read_shard(pair, "pairs"), read_shard(reference, "logps")
        scores = [token_rewards(table, read_shard(oracle, "logps"), base) for oracle in oracles]
        write_shard(out, index, scores[0] if len(scores) == 1 else combine_scores(scores), len(shards))
    return out


def select(scores: Path, out: Path, k_chosen: float = 0.3, k_rejected: float = 0.3, **rule: Any) -> Path:
    """Write the key tokens of a scores table, shard by shard; `rule` are keywords of `select_key_tokens`."""
    check_rule(k_chosen, k_rejected, **rule)
    paths = table_paths(scores, "scores")
    for path in paths:
        if path.parent.resolve() == out.resolve():
            raise UserError(f"'{out}' holds the score table itself: choose another folder for the selection")
        read_shard(path, "scores")  # all of it is sound before the old selection goes
    # A rule over the whole dataset is a threshold for each shard.
    settings = dataset_thresholds((read_shard(path, "scores") for path in paths), k_chosen, k_rejected, **rule)
    _clear_shards(out)
    for index, path in enumerate(paths):
        table = select_key_tokens(read_shard(path, "scores"), k_chosen, k_rejected, **settings)
        write_shard(out, index, table, len(paths))
    return out


def objective_settings(policy: PolicySettings) -> dict[str, Any]:
    """The keywords of `train_model` that a recipe's policy section sets."""
    return policy.model_dump(include={"objective", "beta", "gamma", "margin", "alpha", "label_smoothing"})


def _clear_shards(folder: Path) -> None:
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
