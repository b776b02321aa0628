"""Wing: supervised fine-tuning of the reference, through TRL."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback

from sepo import processes
from sepo.data.loading import load_rows, source_fingerprint
from sepo.errors import UserError
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import Recipe, SftSettings, TrainingSettings
from sepo.training.check import UNSUPPORTED, check_arguments, require_setup
from sepo.training.checkpoints import existing_model, saving, training_fingerprint
from sepo.training.fit import run_training, training_arguments
from sepo.training.logs import ProgressBar
from sepo.training.trainer import use_one_device


def train_reference(model: str, settings: SftSettings, out: Path, *, seed: int = 0, device: str = "auto") -> Path:
    """Fine-tune `model` on conversations or text with TRL's SFTTrainer. Returns the model folder `out`."""
    _require_trl()
    from trl import SFTTrainer

    processes.join(device)
    dataset = _rows(settings)
    if settings.sample < 1:
        dataset = dataset.shuffle(seed=seed).select(range(max(1, int(settings.sample * len(dataset)))))
    made_with = training_fingerprint(model, settings.training, sft=settings.model_dump(mode="json"), seed=seed)
    made_with["source"] = processes.on_main(lambda: source_fingerprint(settings.source))
    if processes.on_main(lambda: existing_model(out, made_with)) is not None:
        return out
    tokenizer = load_tokenizer(model)
    trainer = SFTTrainer(
        model=load_model(model, device=device, train=True),
        args=sft_arguments(settings, settings.training, out, seed=seed, device=device),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[saving(settings.training), ProgressBar("SFT")],
    )
    trainer.remove_callback(PrinterCallback)
    run_training(trainer, tokenizer, out, made_with)
    return out


def check(recipe: Recipe) -> None:
    """Raise a UserError if the data or the settings of a recipe's fine-tuning cannot be used."""
    if (settings := recipe.reference.sft) is None:
        return
    _require_trl()
    section = "reference.sft.training"
    check_arguments(settings.training, section, UNSUPPORTED)

    def arguments(training: TrainingSettings, folder: Path) -> Any:
        return sft_arguments(settings, training, folder, seed=0, device=recipe.device)

    require_setup(settings.training, section, arguments)
    made = arguments(settings.training, Path("check"))
    rows = made.per_device_train_batch_size * made.gradient_accumulation_steps * processes.launched()
    if rows != settings.training.batch_size:
        raise UserError(
            f"{section}.arguments: per_device_train_batch_size and gradient_accumulation_steps make {rows} rows an "
            f"update over all processes, but batch_size is {settings.training.batch_size}"
        )
    _rows(settings)


def sft_arguments(settings: SftSettings, training: TrainingSettings, out: Path, *, seed: int, device: str) -> Any:
    """TRL's `SFTConfig` of a fine-tuning."""
    from trl import SFTConfig

    arguments = training_arguments(training, out, seed=seed, device=device)
    # TRL pads all rows of a micro-batch to one length, so micro-batches are small.
    rows = arguments["per_device_train_batch_size"]
    micro = next(size for size in (8, 4, 2, 1) if rows % size == 0)
    arguments |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    config = SFTConfig(**arguments | training.arguments, max_length=settings.max_length)
    use_one_device(config)
    return config


def _require_trl() -> None:
    if importlib.util.find_spec("trl") is None:
        raise UserError('reference.sft needs TRL: run pip install -e ".[sft]"')


# The columns that TRL's SFTTrainer reads.
_FORMS = ({"messages"}, {"text"}, {"prompt", "completion"}, {"conversations"})


def _rows(settings: SftSettings) -> datasets.Dataset:
    """The rows to train on."""
    rows = load_rows(settings.source, split=settings.split, config_name=settings.config_name)
    if not any(form <= set(rows.column_names) for form in _FORMS):
        raise UserError(
            f"reference.sft.source '{settings.source}' has the columns {', '.join(rows.column_names)}: expected "
            "messages, prompt and completion, or text"
        )
    if len(rows) == 0:
        raise UserError(f"reference.sft.source '{settings.source}' has no row")
    # With columns `prompt` and `messages` (UltraChat), TRL would read prompt-completion pairs.
    return rows.select_columns(["messages"]) if "messages" in rows.column_names else rows
