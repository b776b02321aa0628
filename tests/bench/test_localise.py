"""Localisation against plain loops, and its ends: the truth finds everything, its opposite nothing."""

import numpy as np
import pytest

from sepo.bench.credit.localise import beyond, localise
from sepo.data.ragged import flat, ragged
from sepo.data.tables import make_table
from sepo.evaluate.fidelity import token_truth
from sepo.evaluate.words import word_truth
from tiny_models import tiny_tokenizer

TEXTS = {
    "chosen": ["good soup, good day", "a good one", "plain words"],
    "rejected": ["bad soup, bad day", "good but bad", "bad bad"],
}
TRUTH = word_truth(lambda word: {"good": 1.0, "bad": -1.0}.get(word, 0.0))


def table(rewards_of):
    tokenizer = tiny_tokenizer()
    columns = {"pair_id": [0, 1, 2], "prompt_ids": [[1], [2], [3]]}
    for side, texts in TEXTS.items():
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        columns[f"{side}_ids"] = ids
        columns[f"{side}_rewards"] = [[0.0] * len(row) for row in ids]
    scores = make_table("scores", columns)
    for side in TEXTS:
        values = token_truth(tokenizer, scores, side, TRUTH)
        rewards = ragged(rewards_of(np.nan_to_num(values)).astype(np.float32), flat(scores.column(f"{side}_ids"))[1])
        scores = scores.set_column(scores.column_names.index(f"{side}_rewards"), f"{side}_rewards", rewards)
    return tokenizer, scores


def test_the_truth_finds_everything_and_its_opposite_nothing():
    right = localise(*table(lambda values: values), TRUTH)
    assert right["oracle"] == (1.0, 1.0, pytest.approx((0.5 + 1 + 0.5) / 3))  # two wrong words of equal value twice
    wrong = localise(*table(lambda values: -values), TRUTH)["oracle"]
    assert wrong.auc == 0
    assert wrong.precision < 0.5
    assert wrong.first_error == pytest.approx(0.5 / 3)  # "bad bad" has no other word
    assert beyond(right).auc == 1 - max(value.auc for name, value in right.items() if name != "oracle")


def test_precision_and_first_error_agree_with_plain_loops():
    rng = np.random.default_rng(0)
    tokenizer, scores = table(lambda values: values + rng.normal(0, 1, len(values)))
    found = localise(tokenizer, scores, TRUTH)["oracle"]
    precisions = []
    for side, sign in (("chosen", 1), ("rejected", -1)):
        worth = sign * token_truth(tokenizer, scores, side, TRUTH)
        ranked = sign * flat(scores.column(f"{side}_rewards"))[0]
        order = [i for i in np.argsort(-ranked) if not np.isnan(worth[i])]
        hits = [worth[i] > 0 for i in order]
        precisions.append(np.mean([np.mean(hits[: i + 1]) for i, hit in enumerate(hits) if hit]))
    assert found.precision == pytest.approx(np.mean(precisions))
    at, right = 0, []
    rewards = scores.column("rejected_rewards").to_pylist()
    worth = token_truth(tokenizer, scores, "rejected", TRUTH)
    for row, text in zip(rewards, TEXTS["rejected"], strict=True):
        words = [i for i in range(len(row)) if not np.isnan(worth[at + i])]
        lowest = min(words, key=lambda i: row[i])
        first = text.index("bad")
        right.append(first <= lowest < first + 3)
        at += len(row)
    assert found.first_error == pytest.approx(np.mean(right))
