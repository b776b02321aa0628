"""Random pairs of awkward shapes, inputs made from them, and the plain forward that fast paths are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.data.tables import CONTEXT_COLUMNS, make_table
from sepo.forward.packing import CHOSEN, REJECTED, Pair, pack
from sepo.training.trainer import PreferenceConfig


def random_ids(rng: np.random.Generator, size: int, vocabulary: int = 101) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(4, vocabulary, size))


def awkward_pairs(seed: int = 0) -> list[Pair]:
    """Pairs with one-token texts, shared prompts, shared and equal responses, and all or some positions as targets."""
    rng = np.random.default_rng(seed)
    long, short = random_ids(rng, 21), random_ids(rng, 1)
    one, two, three = (random_ids(rng, size) for size in (17, 9, 1))
    return [
        Pair(10, long, one, two),
        Pair(11, short, three, random_ids(rng, 1)),
        Pair(12, long, two, three, (0, 8), (0,)),  # prompt and a response shared with pair 10
        Pair(13, random_ids(rng, 4), one, one),  # equal responses
        Pair(14, short, one, random_ids(rng, 30), (16,), (0, 5), (0.5,), (2.0, 0.25)),
        Pair(15, long, random_ids(rng, 12), one, (3,), None),
    ]


def pairs_of_turns(seed: int = 0) -> list[Pair]:
    """Pairs whose responses have several assistant turns: context before and between them, all or some targets."""
    rng = np.random.default_rng(seed)
    long, short = random_ids(rng, 21), random_ids(rng, 1)
    one, two, three = (random_ids(rng, size) for size in (17, 9, 1))
    return [
        Pair(16, long, one, two, chosen_context_ids=random_ids(rng, 5), chosen_context_at=(3, 3, 3, 9, 16)),
        Pair(17, long, one, two, (2, 3, 11), None, (0.5, 1.0, 2.0), chosen_context_ids=two[:3],
             chosen_context_at=(0, 3, 12), rejected_context_ids=two[:2], rejected_context_at=(0, 8)),
        Pair(18, short, one, one, rejected_context_ids=three, rejected_context_at=(1,)),
        Pair(19, long, one, two),  # the responses of pair 16, without their context
    ]  # fmt: skip


def pairs_table(pairs: list[Pair]):
    context = CONTEXT_COLUMNS if any(len(getattr(pair, name)) for pair in pairs for name in CONTEXT_COLUMNS) else ()
    columns = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", *context)
    return make_table("pairs", {name: [getattr(pair, name) for pair in pairs] for name in columns})


def plain_logps(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Log-probabilities of the targets from the model's own logits, one unpadded sequence per forward."""
    parts = []
    for pair in pairs:
        for side in (CHOSEN, REJECTED):
            ids, positions, _ = pair.side(side)
            tokens = torch.tensor([[*pair.prompt_ids, *ids]])
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logps = logits.log_softmax(-1)[torch.arange(len(ids)), tokens[0, len(pair.prompt_ids) :]]
            parts.append(logps if positions is None else logps[list(positions)])
    return torch.cat(parts)


def some_pairs(number=12, seed=5):
    """A table of pairs whose prompts and responses have 1 to 14 tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 15, (number, 3))
    return pairs_table([Pair(i, *(random_ids(rng, int(size)) for size in row)) for i, row in enumerate(sizes)])


def many_rows():
    """The pairs of four rows: awkward ones, long ones, many branches of one prompt, and the last two together."""
    rng = np.random.default_rng(5)
    few = [Pair(i, random_ids(rng, 1 + 37 * i), random_ids(rng, 1 + 90 * i), random_ids(rng, 70)) for i in range(6)]
    shared = random_ids(rng, 150)
    many = [Pair(i, shared, random_ids(rng, 20 + i), random_ids(rng, 140)) for i in range(7)]
    return [awkward_pairs(), few, many, [*few, *many]]


def attention_inputs(pairs, heads=6, kv_heads=2, dim=16, dtype=torch.float64):
    """Queries, keys and values of a packed row, and its layout."""
    layout = pack(pairs).layout
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.length)
    query, key, value = (
        torch.randn(*shape, n, dim, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return query, key, value, layout


def config(folder, **settings):
    """A `PreferenceConfig` for short trainings on a CPU."""
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
    }
    return PreferenceConfig(str(folder), **{**defaults, **settings})


def weights(model):
    """All weights of a model in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
