"""Random pairs of awkward shapes, and the plain formula that everything fast is held against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sepo.packing import CHOSEN, REJECTED, Pair
from sepo.tables import make_table


def random_ids(rng: np.random.Generator, size: int, vocabulary: int = 101) -> tuple[int, ...]:
    return tuple(int(token) for token in rng.integers(4, vocabulary, size))


def awkward_pairs(seed: int = 0) -> list[Pair]:
    """Pairs of one token, with shared prompts, shared and equal responses, all and some positions as targets."""
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


def pairs_table(pairs: list[Pair]):
    columns = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")
    return make_table("pairs", {name: [getattr(pair, name) for pair in pairs] for name in columns})


def plain_logps(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Log-probabilities of the targets, one unpadded sequence a forward, through the model's own logits."""
    parts = []
    for pair in pairs:
        for side in (CHOSEN, REJECTED):
            ids, positions, _ = pair.side(side)
            tokens = torch.tensor([[*pair.prompt_ids, *ids]])
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
            logps = logits.log_softmax(-1)[torch.arange(len(ids)), tokens[0, len(pair.prompt_ids) :]]
            parts.append(logps if positions is None else logps[list(positions)])
    return torch.cat(parts)
