"""A policy's training to `policy.target_kl`, and what ends that of an oracle at `oracle.target_accuracy`."""

from __future__ import annotations

from pathlib import Path

from sepo.data.splits import sample_prompts
from sepo.data.tables import read_table, swap_sides
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import Recipe, TrainingSettings
from sepo.stages.stage import Model, StageResult
from sepo.stages.train import Train
from sepo.targets.auto_rate import ProbedKl, ReadKl, choose_rate
from sepo.targets.kl_probe import Probe
from sepo.targets.until import (
    LookAtAccuracy,
    LookAtKl,
    Target,
    UntilTarget,
    accuracy_on,
    kl_from,
)
from sepo.training.fit import steps_of, training_types


def train_to_kl(
    recipe: Recipe, start: Model, pairs: StageResult, number: int, train: Train, out: Path
) -> dict[str, float]:
    """Train until `policy.target_kl`; the start is loaded once more, in the types of the training.

    Args:
        pairs: under the policy's tokenizer; the KL is measured on answers to their held-out prompts.
        number: of pairs of the training.
        out: folder of the policy.
    """
    target, training = recipe.policy.target_kl, recipe.policy.training
    assert target is not None
    types = training_types(recipe.policy, start.folder, choose_device(recipe.device).type)
    base = load_model(start.folder, device=recipe.device, dtype=types.dtype, quantization=types.quantization)
    tokenizer, settings = load_tokenizer(start.folder), recipe.eval
    prompts = sample_prompts(read_table(pairs.folder / "held_out", "pairs"), settings.prompts)
    probe = Probe(base, tokenizer, prompts, settings, recipe.seed)
    chosen: dict[str, float] = {}
    if training.learning_rate == "auto":

        def probed(short: TrainingSettings, folder: Path) -> ProbedKl:
            results = train(short, folder, ReadKl(probe))
            return ProbedKl(results["half"], results["end"])

        training = choose_rate(recipe.policy, steps_of(training, number), probed, out)
        chosen = {"target_kl/learning_rate": float(training.learning_rate)}
    until = UntilTarget(
        Target("kl", target, "policy.target_kl", "raise policy.training.num_train_epochs or learning_rate"),
        LookAtKl(target, probe, out),
        kl_from(base, tokenizer, prompts, settings, recipe.seed),
        out,
    )
    return {**train(training, out, until), **chosen}


def until_accuracy(
    recipe: Recipe, pairs: StageResult, reference_logps: StageResult, out: Path, swapped: bool
) -> UntilTarget:
    """Ends the training at `oracle.target_accuracy`.

    Args:
        swapped: the oracle is trained on swapped pairs, and measured on swapped ones.
        out: folder of the oracle.
    """
    target = recipe.oracle.target_accuracy
    assert target is not None
    held_out = read_table(pairs.folder / "held_out", "pairs")
    logps = read_table(reference_logps.folder / "held_out", "logps")
    if swapped:
        held_out, logps = swap_sides(held_out), swap_sides(logps)
    return UntilTarget(
        Target("accuracy", target, "oracle.target_accuracy", "raise oracle.training.num_train_epochs or learning_rate"),
        LookAtAccuracy(),
        accuracy_on(held_out, logps, recipe.tokens_per_row),
        out,
    )
