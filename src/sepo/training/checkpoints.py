"""Complete checkpoints, from which a training resumes, and finished models, which it reuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sepo import processes
from sepo.errors import UserError
from sepo.files import check_writable, differing_file, file_digests, flush, recover_folder, write_text
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.sharding import own_part
from sepo.processes import log
from sepo.recipe.settings import TrainingSettings
from sepo.training.logs import LOGS, RECORDS, keep_logs
from sepo.training.trainer import NonFiniteLossError

STATE_FILE = "trainer_state.json"
_SEAL = "sealed.json"
# Part of every training's fingerprint. Raise it when checkpoints or training change incompatibly.
_TRAINING_FORMAT = 2


class SaveEvery(TrainerCallback):
    """Save a checkpoint every `minutes`, so that short runs write none and long runs lose little.

    `seal_checkpoint` marks each checkpoint that is completely on the disk; a training resumes only from these.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            # Transformers would save a checkpoint, three times the model's size, just before the model itself is saved.
            control.should_save = False
            return control
        if not self.seconds:
            return control
        # Saving is collective, so the clock of the main process decides for all.
        if processes.on_main(lambda: time.monotonic() - self.last > self.seconds):
            control.should_save = True
            self.last = time.monotonic()
        return control

    def on_save(self, args, state, control, **kwargs):
        require_finite_weights(kwargs["model"], state.global_step)
        processes.wait()
        processes.on_main(lambda: seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    def writing(self, trainer: Any) -> contextlib.AbstractContextManager[None]:
        """Inside this context, the trainer writes and reads its checkpoints as `training.checkpoints` says."""
        return contextlib.nullcontext()


# By `training.checkpoints`. The wing `sepo.sharded` adds "sharded".
SAVING = {"whole": SaveEvery}


def saving(training: TrainingSettings) -> SaveEvery:
    """The callback that saves the checkpoints of a training."""
    if training.checkpoints not in SAVING:
        raise ValueError("checkpoints: sharded needs sepo.sharded.enable()")
    return SAVING[training.checkpoints](training.save_minutes)


def require_finite_weights(model: torch.nn.Module, step: int) -> None:
    """Raise a `NonFiniteLossError` if a weight is not finite, so that no such checkpoint is sealed or model saved."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(own_part(parameter)).all()):
            raise NonFiniteLossError(
                f"the weight {name} is not finite after step {step}; lower learning_rate (the earlier checkpoints "
                "are kept)"
            )


def training_fingerprint(model: str, training: TrainingSettings, **rest: Any) -> dict[str, Any]:
    """Everything that the result of a training depends on. The number of processes does not change the result."""
    return {
        "format": _TRAINING_FORMAT,
        "model": processes.on_main(lambda: model_fingerprint(model)),
        "usage": processes.on_main(lambda: usage_fingerprint(model)),  # tokenizer and templates, saved with the weights
        "training": training.model_dump(mode="json"),
        **rest,
    }


def existing_model(out: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results of a finished training with this fingerprint if `out` has its unmodified model, else None.

    Raises:
        UserError: `out` contains something other than a model, which saving would remove.
    """
    check_model_folder(out)
    recover_folder(out)
    if not out.exists():
        return None
    try:
        state = json.loads((out / STATE_FILE).read_text(encoding="utf-8"))
        if state["made_with"] != json.loads(json.dumps(made_with, default=str)):
            return None
        if problem := differing_file(out, state["files"]):
            log(f"  {out}: {problem}; trained again")
            return None
        # A training shorter than its logging has no loss.
        results = {name: None if value is None else float(value) for name, value in state["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    keep_logs(out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # from a run with other settings
    log(f"  {out} exists, trained with the same model, data and settings: reused")
    return results


def check_model_folder(out: Path) -> None:
    """Raise a UserError if saving would remove something other than a model trained here, or cannot write.

    Saving replaces the whole folder, so the parent folder must be writable.
    """
    check_writable(Path(os.path.abspath(out)).parent, "choose another folder for the model")
    if not out.exists() or _has_training(out):
        return
    begun = ("checkpoints", LOGS)  # what a training leaves before its model
    if not out.is_dir() or any(not path.name.startswith(".") and path.name not in begun for path in out.iterdir()):
        has_model = any((out / name).is_file() for name in ("config.json", "adapter_config.json"))
        what = "holds a model that was not trained here" if has_model else "is not a model folder"
        raise UserError(f"'{out}' {what}: its content would be replaced; choose a new folder")


def _has_training(out: Path) -> bool:
    """Whether a training of this package left its record; that of Transformers' Trainer has the same file name."""
    try:
        return "made_with" in json.loads((out / STATE_FILE).read_text(encoding="utf-8"))
    except (ValueError, TypeError):  # damaged
        return True
    except OSError:
        return False


def seal_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as complete: flush its files to the disk, then write their digests."""
    # training_args.bin is a pickle that nothing reads.
    for name in ("training_args.bin", _SEAL):
        (folder / name).unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)
    write_text(folder / _SEAL, json.dumps(file_digests(folder)))


def saved_progress(out: Path) -> str:
    """The message for a training that was stopped in the middle of a step: the checkpoint that is kept, if any."""
    steps = [int(path.parent.name.split("-")[1]) for path in (out / "checkpoints").glob(f"checkpoint-*/{_SEAL}")]
    if not steps:
        return "this training has no checkpoint yet: the same command starts it again, and earlier results are kept"
    return f"the checkpoint of step {max(steps)} is kept; the same command continues from there"


def _checkpoint_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete."""
    try:
        digests = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return differing_file(folder, digests)
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{_SEAL} is damaged"


def _require_same_processes(folder: Path, number: Path) -> None:
    """Raise a UserError if DeepSpeed's checkpoints are of another number of processes, which it cannot read."""
    if processes.sharding() != "deepspeed" or not any(folder.glob("checkpoint-*")):
        return
    try:
        before = int(json.loads(number.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # of an earlier release
        return
    if before != processes.size():
        raise UserError(
            f"the checkpoints in '{folder}' are of {before} processes, and DeepSpeed cannot continue them with "
            f"{processes.size()}: start {before} processes, or delete the folder to train from the beginning"
        )


def last_checkpoint(out: Path, made_with: dict[str, Any]) -> str | None:
    """Return the last complete checkpoint of this training. Removes incomplete ones and those of other trainings."""
    folder = out / "checkpoints"
    record, number = (folder / name for name in RECORDS)
    # A checkpoint of whole weights loads only with the sharding it was saved with.
    sharding = "" if "checkpoints" in made_with.get("training", {}) else processes.sharding()
    text = json.dumps({**made_with, "sharding": sharding}, sort_keys=True, default=str)
    if folder.is_dir() and (not record.is_file() or record.read_text(encoding="utf-8", errors="replace") != text):
        if any(folder.glob("checkpoint-*")):  # Trainer makes the empty folder itself
            log(f"  checkpoints in {folder} were made with other settings or data: removed")
        keep_logs(out)
        shutil.rmtree(folder)
    write_text(record, text)
    _require_same_processes(folder, number)
    numbered = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    write_text(number, json.dumps(processes.size()))
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        problem = _checkpoint_problem(checkpoint)
        if problem is None:
            log(f"  continuing from {checkpoint}")
            return str(checkpoint)
        log(f"  {checkpoint}: {problem}; removed")
        shutil.rmtree(checkpoint)
    return None
