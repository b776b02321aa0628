"""Stage "reference": the small model that the oracle starts from, as it is or after supervised fine-tuning."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sepo import processes
from sepo.data.loading import load_rows, source_fingerprint
from sepo.errors import UserError
from sepo.models.fingerprint import model_fingerprint
from sepo.models.names import check_model, resolve_model
from sepo.recipe.settings import Recipe
from sepo.stages.stage import Cost, Model, Sizes, Stage
from sepo.training.fit import check_training
from sepo.training.memory import fine_tuning_parts
from sepo.training.sft import train_reference


def check(recipe: Recipe, elsewhere: bool = False) -> None:
    """The model and, where it is fine-tuned, its data, its settings and the library that does it; `elsewhere` as in
    `train.check`.
    """
    check_model(recipe.reference.model, revision=recipe.reference.revision, weights=not elsewhere)
    sft = recipe.reference.sft
    if sft is None:
        return
    if importlib.util.find_spec("trl") is None:
        raise UserError('reference.sft needs TRL: run pip install "sepo[sft]"')
    check_training(sft.training)
    load_rows(sft.source, split=sft.split, config_name=sft.config_name)


def start(recipe: Recipe) -> Model:
    """The model that the recipe names, in a local folder."""
    folder = resolve_model(recipe.reference.model, revision=recipe.reference.revision)
    return Model(folder, processes.on_main(lambda: model_fingerprint(folder)))


def stage(recipe: Recipe, model: Model) -> Stage | None:
    """Fine-tuning of `model`; None if the recipe takes it as it is."""
    sft = recipe.reference.sft
    if sft is None:
        return None

    def work(folder: Path) -> dict[str, Any]:
        train_reference(model.folder, sft, folder, seed=recipe.seed, device=recipe.device)
        return {}

    return Stage(
        kind="reference",
        what=f"SFT on {sft.source}",
        depends={
            "model": model.content,
            "reference": {"sft": sft.model_dump(mode="json")},
            "source": processes.on_main(lambda: source_fingerprint(sft.source)),
            "seed": recipe.seed,
        },
        outputs=(".",),
        work=work,
        verifies=True,
    )


def cost(recipe: Recipe, sizes: Sizes) -> Cost | None:
    """Its time is not estimated: the length of the data is known only when they are read."""
    sft = recipe.reference.sft
    if sft is None:
        return None
    parts = fine_tuning_parts(sizes.small.shape, sft.training, sizes.device, sft.max_length, sizes.processes)
    return Cost(f"SFT on {sft.source}", memory=parts)
