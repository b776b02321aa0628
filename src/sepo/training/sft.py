"""Supervised fine-tuning of the reference, through TRL."""

from __future__ import annotations

from pathlib import Path

from transformers import PrinterCallback

from sepo import processes
from sepo.data.loading import load_rows, source_fingerprint
from sepo.errors import UserError
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import SftSettings
from sepo.training.checkpoints import SaveEvery, standing_model, training_fingerprint
from sepo.training.fit import run_training, training_arguments
from sepo.training.progress import ProgressBar


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
    made_with = training_fingerprint(model, settings.training, sft=settings.model_dump(mode="json"), seed=seed)
    made_with["source"] = processes.on_main(lambda: source_fingerprint(settings.source))
    standing = processes.on_main(lambda: standing_model(out, made_with))
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
    run_training(trainer, tokenizer, out, made_with)
    return out
