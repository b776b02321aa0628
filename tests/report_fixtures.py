"""Small tokenizers and score tables for the tests of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sepo.data import tables

END = "<|im_end|>"
_CORPUS = [f"Question {i}: what is the answer? The answer is {i}, and that is all.\n" for i in range(20)]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that every character beyond ASCII is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """A byte-level BPE trained on a few sentences, with an end-of-turn control token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def score_table(
    tokenizer: Tokenizer, subset: Sequence[str] | None = None, texts: Sequence[str] | None = None
) -> pa.Table:
    """Score six pairs of plain sentences, or one pair per text of `texts`, with rewards that tie often.

    Pair ids have gaps; prompts share their first and last line, as under a chat template.
    """
    rng = np.random.default_rng(0)
    chosen = list(texts) if texts else [f"The answer is {i}, and that is all.{END}" * (1 + i % 3) for i in range(6)]
    rejected = list(texts) if texts else [f"What is the answer? {i}{END}" * (1 + (i + 1) % 3) for i in range(6)]
    prompts = [f"user\nQuestion {i}\nassistant\n" for i in range(len(chosen))]

    def encode(lines: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]

    columns = {"prompt_ids": encode(prompts), "chosen_ids": encode(chosen), "rejected_ids": encode(rejected)}
    rewards = {
        f"{side}_rewards": [
            (np.round(rng.normal(shift, 0.3, len(ids)) * 20) / 20).astype(np.float32) for ids in columns[f"{side}_ids"]
        ]
        for side, shift in (("chosen", 0.1), ("rejected", -0.1))
    }
    pair_ids = [3 * i + 1 for i in range(len(chosen))]
    table = tables.make_table("scores", {"pair_id": pair_ids, **columns, **rewards}, {"tokenizer": "test"})
    if subset is not None:
        table = table.append_column("subset", pa.array([subset[i % len(subset)] for i in range(len(chosen))]))
    return table
