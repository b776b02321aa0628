"""Stage "reference": the small model that the oracle starts from; fewer layers or fine-tuned if a recipe says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedConfig

from sepo import processes
from sepo.data.loading import source_fingerprint
from sepo.errors import UserError
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.names import check_model, load_config, resolve_model
from sepo.recipe.settings import Recipe, SftSettings
from sepo.stages.stage import Model, Stage


class FineTune(Protocol):
    """Supervised fine-tuning (`sepo.sft`)."""

    def __call__(self, model: str, settings: SftSettings, out: Path, *, seed: int, device: str) -> Path:
        """Fine-tune the model of a folder into the folder `out`."""


def check(recipe: Recipe, elsewhere: bool = False) -> None:
    """Check the model and its layers; `elsewhere` as in `train.check`."""
    check_model(recipe.reference.model, revision=recipe.reference.revision, weights=not elsewhere)
    if recipe.reference.layers is not None:
        config(recipe)
        if recipe.policy.model is None:
            raise UserError(
                "reference.layers leaves a model that cannot write text: set policy.model, the model to align"
            )


def config(recipe: Recipe) -> PreTrainedConfig:
    """The config of the model that oracle and reference start from."""
    whole = load_config(recipe.reference.model, revision=recipe.reference.revision)
    if recipe.reference.layers is None:
        return whole
    from sepo.models.shrink import cut_config

    return cut_config(whole, recipe.reference.layers)


def hash_model(name: str, revision: str | None = None) -> Model:
    """A model by its name, in a local folder, with the digests of its files."""
    folder = resolve_model(name, revision=revision)
    content, usage = processes.on_main(lambda: [model_fingerprint(folder), usage_fingerprint(folder)])
    return Model(folder, content, usage)


def stage(recipe: Recipe, model: Model, fine_tune: FineTune | None = None) -> Stage | None:
    """Keep some layers of `model`, fine-tune it, or both; None if the recipe uses the model unchanged.

    Args:
        fine_tune: needed for `reference.sft`.
    """
    layers, sft = recipe.reference.layers, recipe.reference.sft
    if layers is None and sft is None:
        return None

    def run(folder: Path) -> dict[str, Any]:
        source, cut = model.folder, folder.with_name(f"{folder.name}-cut")
        if layers is not None:
            from sepo.models.shrink import shrink_model

            source = str(cut if sft is not None else folder)
            processes.on_main(lambda: shrink_model(model.folder, layers, source))
        if sft is not None:
            if fine_tune is None:
                raise ValueError("reference.sft needs sepo.api.run_recipe")
            fine_tune(source, sft, folder, seed=recipe.seed, device=recipe.device)
            processes.on_main(lambda: shutil.rmtree(cut, ignore_errors=True))
        return {}

    return Stage(
        kind="reference",
        what=_what(recipe),
        depends={
            "model": model.inherited(),
            "reference": {"layers": layers, "sft": None if sft is None else sft.model_dump(mode="json")},
            "source": sft and processes.on_main(lambda: source_fingerprint(sft.source)),
            "seed": recipe.seed,
        },
        outputs=(".",),
        run=run,
        facts={"sft": sft},
        verifies=sft is not None,
    )


def _what(recipe: Recipe) -> str:
    layers, sft = recipe.reference.layers, recipe.reference.sft
    parts = [f"{layers} layers of {recipe.reference.model}"] if layers is not None else []
    return ", ".join([*parts, f"SFT on {sft.source}"] if sft is not None else parts)
