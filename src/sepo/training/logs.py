"""Reporters of a training, their files, and the progress bar.

The files of reporters are kept in `logs/` of the model's folder. TensorBoard writes there directly. Others write beside
the checkpoints (CodeCarbon); `keep_logs` moves their files before the checkpoints are removed.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    default_logdir,
    get_available_reporting_integrations,
)

from sepo.bars import Bar, progress_bar
from sepo.errors import UserError, nearest
from sepo.processes import log_once

LOGS = "logs"
# Files beside checkpoints that are no reporter's: of `checkpoints.py`, and (by the start of their names) of callbacks.
RECORDS, OF_CALLBACKS = ("made_with.json", "processes.json"), ("checkpoint-", "target-")
# Reporters that Transformers never lists as installed; it checks for them only when they are used.
_NEVER_LISTED = ("flyte", "azure_ml")


def reporters(report_to: str | Sequence[str]) -> list[str]:
    """The reporters named by a setting. "all" means every installed one, and logs their names.

    Raises:
        UserError: a reporter is unknown or not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    installed = list(_installed())
    if "all" in names:
        log_once(f"  report_to=all: {', '.join(installed) or 'no reporter is installed, so nothing is reported'}")
        return installed
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ("none", "all", *INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to names '{name}'{nearest(name, known)}: expected {', '.join(known)}")
        if name not in (*installed, *_NEVER_LISTED):
            choices = f"; installed are {', '.join(installed)}" if installed else ""
            raise UserError(f"report_to names {name}, which is not installed here: install it, or use none{choices}")
    return names


@functools.cache
def _installed() -> tuple[str, ...]:
    """Transformers looks for each package in every folder of the path."""
    return tuple(get_available_reporting_integrations())


def log_into(trainer: Any, out: Path) -> None:
    """Send TensorBoard's events to a new folder in the logs of a model, unless the user has set a folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(out, LOGS, os.path.basename(default_logdir()))


def keep_logs(out: Path) -> None:
    """Move files that reporters wrote beside the checkpoints of `out` to its logs, before checkpoints are removed."""
    written = [
        path
        for path in sorted((out / "checkpoints").glob("*"))
        if path.name not in RECORDS and not path.name.startswith(OF_CALLBACKS)
    ]
    for path in written:
        (out / LOGS).mkdir(exist_ok=True)
        names = (path.name, *(f"{path.stem}-{number}{path.suffix}" for number in range(2, 10_000)))
        path.rename(next(place for name in names if not (place := out / LOGS / name).exists()))


def carry_logs(out: Path, new: Path) -> None:
    """Copy the logs of `out` into the folder that will replace it."""
    keep_logs(out)
    if (out / LOGS).is_dir():
        shutil.copytree(out / LOGS, new / LOGS, dirs_exist_ok=True)


class ProgressBar(TrainerCallback):
    """A progress bar of the steps with the ETA and the latest loss and accuracy."""

    def __init__(self, description: str):
        self.description = description
        self.bar: Bar | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            done = state.global_step
            self.bar = progress_bar(
                True, total=state.max_steps, initial=done, desc=f"  {self.description}", unit="step"
            )

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
