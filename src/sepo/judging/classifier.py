"""Reward models: checkpoints of a sequence classifier, read whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sepo.errors import UserError
from sepo.models.checkpoint import BESIDE, ENDS, listed, load_reported


def load_classifier(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForSequenceClassification.from_pretrained` that fails on missing weights; one or two outputs.

    Raises:
        UserError: names the weights that are missing (a language model has no classification head) or of another size,
            or the number of outputs.
    """
    model, report = load_reported(AutoModelForSequenceClassification, folder, name, options)
    what = f"the checkpoint of '{name}'"
    if missing := report["missing_keys"]:
        raise UserError(
            f"{what} lacks {listed(missing)}: they would be drawn at random; is it a reward model "
            "(sequence classification)?"
        )
    if mismatched := report["mismatched_keys"]:
        raise UserError(f"{what} holds {listed(key for key, *_ in mismatched)} in another size than config.json says")
    if unread := [key for key in report["unexpected_keys"] if not BESIDE.search(key) and not ENDS.search(key)]:
        raise UserError(f"{what} holds {listed(unread)}, for which {type(model).__name__} has no place")
    if (model.config.num_labels or 0) > 2:
        raise UserError(f"'{name}' has {model.config.num_labels} outputs: expected one (a reward), or two (bad, good)")
    return model
