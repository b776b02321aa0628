"""What trainings of the stages "oracle" and "train" cost."""

from __future__ import annotations

import math

from sepo.forward.scoring import tokens_per_row_for
from sepo.planning.memory import Training
from sepo.recipe.settings import OracleSettings, PolicySettings
from sepo.stages.stage import ModelSize, PairSizes, Sizes, Work
from sepo.training.fit import epochs


def training_work(
    settings: OracleSettings | PolicySettings, model: ModelSize, pairs: PairSizes, targets: float, share: float = 1.0
) -> tuple[Work, ...]:
    """A training on a share of the pairs.

    Args:
        targets: tokens of all pairs that are trained on.
    """
    training = settings.training
    passes = epochs(training, pairs.pairs * share)
    updates = training.max_steps
    if updates <= 0:
        updates = math.ceil(math.ceil(pairs.pairs * share / training.batch_size) * training.num_train_epochs)
    tokens = pairs.tokens * share * passes
    return (
        Work("load", model),
        Work(
            "train", model, tokens, targets * share * passes, updates, training=training, lora=settings.lora,
            quantization=settings.quantization,
        ),
    )  # fmt: skip


def training_need(
    settings: OracleSettings | PolicySettings, sizes: Sizes, model: ModelSize, targets: float, beside: bool = False
) -> Training:
    """The memory of a training; `targets` and `beside` as above and in `Training`."""
    training, pairs = settings.training, sizes.train
    budget = training.tokens_per_row or tokens_per_row_for(sizes.device)
    # A row holds no more than the pairs that a process has of an update.
    mean = pairs.tokens / max(pairs.pairs, 1)
    tokens = max(min(budget, math.ceil(mean * training.batch_size / sizes.processes)), pairs.longest)
    return Training(
        model.shape,
        training,
        sizes.device,
        tokens,
        math.ceil(tokens * targets / max(pairs.tokens, 1)),
        pairs.longest,
        settings.lora,
        settings.quantization,
        sizes.processes,
        beside=beside,
    )
