"""What a training reports, and to whom. What reporters write into files stays in `logs/` of the model's folder.

Event files of TensorBoard go there from the start. Other reporters write beside the checkpoints (CodeCarbon), which are
removed when the training is done; their files are brought to the logs before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    default_logdir,
    get_available_reporting_integrations,
)

from sepo.errors import UserError, nearest
from sepo.processes import log_once

LOGS = "logs"
# Transformers says of these only when they are used whether they are there.
_NEVER_LISTED = ("flyte", "azure_ml")


def reporters(report_to: str | Sequence[str]) -> list[str]:
    """The reporters that a setting names; "all" is every one that is installed, and a line says which.

    Raises:
        UserError: there is none of a name, or it is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    installed = get_available_reporting_integrations()
    if "all" in names:
        log_once(f"  report_to=all: {', '.join(installed) or 'no reporter is installed, so nothing is reported'}")
        return installed
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ("none", "all", *INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to names '{name}'{nearest(name, known)}: expected {', '.join(known)}")
        if name not in (*installed, *_NEVER_LISTED):
            there = f"; installed are {', '.join(installed)}" if installed else ""
            raise UserError(f"report_to names {name}, which is not installed here: install it, or use none{there}")
    return names


def log_into(trainer: Any, out: Path) -> None:
    """Let TensorBoard's events go to the logs of a model folder, a folder for each attempt; the user's own stays."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(out, LOGS, os.path.basename(default_logdir()))


def keep_logs(out: Path) -> None:
    """Bring what reporters wrote beside the checkpoints of `out` to its logs, before the checkpoints go."""
    written = [
        path
        for path in sorted((out / "checkpoints").glob("*"))
        if path.name != "made_with.json" and not path.name.startswith("checkpoint-")
    ]
    for path in written:
        (out / LOGS).mkdir(exist_ok=True)
        names = (path.name, *(f"{path.stem}-{number}{path.suffix}" for number in range(2, 10_000)))
        path.rename(next(place for name in names if not (place := out / LOGS / name).exists()))


def carry_logs(out: Path, new: Path) -> None:
    """Put the logs of `out` into the folder that will take its place."""
    keep_logs(out)
    if (out / LOGS).is_dir():
        shutil.copytree(out / LOGS, new / LOGS, dirs_exist_ok=True)
